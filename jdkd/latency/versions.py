"""See :func:`measure_table`: versions of a base, timed in turn with it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.detect.input_size import input_size, require_visible, size_attributes
from jdkd.detect.proposals import nms_counts
from jdkd.detect.regions import region_attributes
from jdkd.graph import BlockList, Topology
from jdkd.latency.calls import check_images
from jdkd.latency.clock import Clock
from jdkd.latency.folding import fuse_for_inference
from jdkd.latency.layers import as_floats, part_of, positions
from jdkd.latency.protocol import MeasuringCallback, measure_quick
from jdkd.latency.runtimes import Eager, Runtime
from jdkd.latency.table import REGIONS, LatencyTable, regions_of
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Rewrite
from jdkd.rewrite.blocks import removable
from jdkd.rewrite.channels import require_traced

SHARES = 0.5, 0.25  # of a part's channels that stay in the versions that are measured
SIZES = 0.75, 0.5  # of the input's short side in them,
STRIDE = 32  # rounded to a multiple of this, to which images are padded
AT_ONCE = 12  # versions in memory and measured in turn with the base
TURNS = 3  # that the base takes with its NMS and without
ROUNDS = 5  # of a measurement; each times every version twice
FEWER = 0.5, 0.25  # of the regions in the versions that are measured


def measure_table(
    model: nn.Module,
    topology: Topology,
    images: Sequence[Tensor],
    *,
    device: str | torch.device = "cpu",
    rounds: int = ROUNDS,
    runtime: Runtime | None = None,
    clock: Clock | None = None,
    progress: MeasuringCallback | None = None,
) -> LatencyTable:
    """Measures a base and versions of it, as they would be deployed and in turn: cut in one part, shorter, of smaller
    images, with fewer regions.

    The versions are not trained, and what they detect is nothing to time NMS by: they keep as many boxes as the base.

    Args:
        model: the base, trained, as the cost of NMS depends on the detections.
        topology: of it.
        images: ``[3, H, W]`` on the host, uint8 or floats in 0..1.
        device: where to measure.
        rounds: of a measurement, see :class:`jdkd.latency.Schedule`.
        runtime: what runs them; by default torch, eagerly.
        clock: see :func:`jdkd.latency.measure`.
        progress: called with (versions measured, versions, {}).

    Raises:
        InputError: there is no image, or one that the base does not see; the topology is of another model.
    """
    model, runtime = unwrapped(model), runtime or Eager()
    check_images(images)
    require_visible(model, [(f"images[{i}]", *image.shape[1:]) for i, image in enumerate(images)])
    require_traced(model, topology)
    versions = _versions(model, topology)
    deployed = fuse_for_inference(model)
    kept = nms_counts(deployed, [as_floats(image, deployed) for image in images])
    sizes, counted = _positions(model, topology, images[0])
    now = {name: counts[-1] for name, counts in counted.items()}
    regions, per_region = regions_of(model), _of_regions(model, topology, images[0], now)
    table = LatencyTable(_containers(topology), sizes, counted, (), kept=kept, regions=regions, of_regions=per_region)
    rows = [(table.features(model), 1.0)]
    how: dict[str, Any] = {"rounds": rounds, "warmup_limit": 0.5, "device": device, "clock": clock, "runtime": runtime}
    table = replace(table, nms=_nms_share(deployed, images, kept, how))
    for start in range(0, len(versions), AT_ONCE):
        some = versions[start : start + AT_ONCE]
        timed = {"base": deployed}
        timed |= {str(k): fuse_for_inference(each.apply(model, topology)) for k, each in enumerate(some)}
        with runtime.steady_nms(kept):
            report = measure_quick(timed, images, **how)
        medians = [timing.modes()["end_to_end"].p50 for timing in report.models.values()]
        for each, median in zip(some, medians[1:], strict=True):
            rows.append((table.features(model, topology, each), median / medians[0]))
        if progress:
            progress(start + len(some), len(versions), {})
    return replace(
        table, rows=tuple((features, table.with_nms(ratio, features.get(REGIONS, 0))) for features, ratio in rows)
    )


def _nms_share(deployed: nn.Module, images: Sequence[Tensor], kept: Sequence[int], how: Mapping[str, Any]) -> float:
    """What the base's NMS takes over the rest of it.

    Timed in turns, of which the median counts: between one measurement and the next a machine can change its speed, and
    of a base without a costly NMS a third of the latency once seemed to be that.
    """
    shares, runtime = [], how["runtime"]
    for _ in range(TURNS):
        whole, rest = (_median(deployed, images, how, context) for context in (nullcontext(), runtime.steady_nms(kept)))
        shares.append(whole / rest - 1)
    return max(0.0, statistics.median(shares))


def _median(
    deployed: nn.Module, images: Sequence[Tensor], how: Mapping[str, Any], context: AbstractContextManager[None]
) -> float:
    """Milliseconds of a base by itself."""
    with context:
        return measure_quick({"base": deployed}, images, **how).models["base"].modes()["end_to_end"].p50


def _versions(model: nn.Module, topology: Topology) -> list[Rewrite]:
    """A part cut, all cut, half of a list's blocks gone that may go, all of all, another input size, fewer regions."""
    containers, parts = _containers(topology), defaultdict(list)
    for group in topology.groups:
        parts[part_of(group.makers[0], containers)].append(group)
    found = []
    for groups in [*parts.values(), topology.groups]:
        for share in SHARES:
            keep = {group.name: range(group.shrunk(share)) for group in groups if group.shrunk(share) < group.units}
            found += [Rewrite(keep=keep)] if keep else []
    lists = {blocks: removable(model, blocks) for blocks in topology.block_lists}
    for blocks, count in lists.items():
        found += [Rewrite(blocks={blocks.name: range(len(blocks.blocks) - (count + 1) // 2)})] if count else []
    found += _shortest(topology, {blocks: count for blocks, count in lists.items() if count})
    found += [Rewrite(attributes=size_attributes(model, size)) for size in _sizes(model)[:-1]]
    found += [Rewrite(attributes=region_attributes(model, count)) for count in fewer_regions(model)]
    return list({repr(each): each for each in found}.values())


def _shortest(topology: Topology, lists: Mapping[BlockList, int]) -> list[Rewrite]:
    """All blocks gone that may go, and the rest cut as well: how much of a latency is none that a cut saves.

    Without these, a cost for each layer and a fixed one are hardly told apart.

    Args:
        topology: of the base.
        lists: how many blocks of each may go.
    """
    if not lists:
        return []
    left = {blocks.name: range(len(blocks.blocks) - count) for blocks, count in lists.items()}
    gone = tuple(f"{path}." for blocks in lists for path in blocks.blocks[len(left[blocks.name]) :])
    stay = [group for group in topology.groups if not all(maker.startswith(gone) for maker in group.makers)]
    keep = {group.name: range(group.shrunk(SHARES[-1])) for group in stay if group.shrunk(SHARES[-1]) < group.units}
    return [Rewrite(blocks=left), Rewrite(blocks=left, keep=keep)]


def _containers(topology: Topology) -> tuple[str, ...]:
    return tuple(dict.fromkeys(blocks.container for blocks in topology.block_lists))


def _positions(
    model: nn.Module, topology: Topology, image: Tensor
) -> tuple[tuple[int, ...], dict[str, tuple[float, ...]]]:
    """Sizes, and at each of them how often every weight is applied."""
    sizes = _sizes(model)
    if not sizes:
        return (0,), {name: (count,) for name, count in positions(model, image).items()}
    counted = [
        positions(Rewrite(attributes=size_attributes(model, size)).apply(model, topology), image) for size in sizes
    ]
    names = counted[-1]
    return sizes, {name: tuple(each.get(name, 0.0) for each in counted) for name in names}


def _sizes(model: nn.Module) -> tuple[int, ...]:
    """Short sides of the input that are measured, ascending, its own the last; none without one."""
    now = input_size(model)
    if now is None:
        return ()
    smaller = {max(1, round(share * now[0] / STRIDE)) * STRIDE for share in SIZES}
    return (*sorted(size for size in smaller if size < now[0]), now[0])


def fewer_regions(model: nn.Module) -> tuple[int, ...]:
    """Numbers of regions that are measured, descending; none of a detector that proposes none, or one."""
    now = regions_of(model)
    return tuple(count for share in FEWER if (count := round(share * now)))


def _of_regions(model: nn.Module, topology: Topology, image: Tensor, now: Mapping[str, float]) -> tuple[str, ...]:
    """Weights that are applied less often where fewer regions are proposed, of those that are applied ``now``."""
    fewer = fewer_regions(model)
    if not fewer:
        return ()
    counted = positions(Rewrite(attributes=region_attributes(model, fewer[-1])).apply(model, topology), image)
    return tuple(name for name, count in now.items() if counted.get(name, 0.0) < count)
