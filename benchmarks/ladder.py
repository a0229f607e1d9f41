"""See :class:`Ladder`: a base detector and students that are cut from it to shares of its arithmetic."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from jdkd.detect import open_model, read
from jdkd.detect.sources import has_own_weights
from jdkd.errors import InputError
from jdkd.graph import Topology
from jdkd.latency.layers import positions, shapes_after
from jdkd.rewrite import Rewrite

RUNGS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # shares of the base's multiply-accumulates
CLOSE, NEAR = 0.005, 0.02  # of the base's, within which a student is to be and has to be of its rung
FINEST = 1000  # shares of the channels that are tried, between none and all
CLASSES = 80
# What rows call the detectors that were built of another module before.
NAMES = {f"faster_rcnn_r{depth}_fpn": f"fasterrcnn:resnet{depth}" for depth in (18, 50, 101)}


def fresh(name: str, size: tuple[int, int]) -> nn.Module:
    """A detector with random weights, the same ones every time.

    Args:
        name: of :func:`jdkd.detect.open_model`, of what is built and not loaded, or of :data:`NAMES`.
        size: height and width in pixels; the detector resizes its images to these.

    Raises:
        InputError: there is no such detector, or it has weights of its own.
    """
    source = NAMES.get(name, name)
    if has_own_weights(source):
        raise InputError(f"--model {name} may have trained weights, and a ladder has random ones; give --detectors.")
    torch.manual_seed(0)
    return open_model(source, classes=CLASSES, min_size=min(size), max_size=max(size))


class Ladder(Mapping[str, nn.Module]):
    """A base and its students by their names, the base first; a student is cut when it is asked for, and not kept.

    A student keeps about the same share of every channel group, in numbers of channels as
    :meth:`jdkd.graph.ChannelGroup.shrunk` gives them, and the first ones of each, as random weights know no better.

    Args:
        name: of the base.
        base: the detector.
        size: height and width of the image whose arithmetic is counted, in pixels.
        rungs: shares of the base's multiply-accumulates.
    """

    def __init__(self, name: str, base: nn.Module, size: tuple[int, int], rungs: Sequence[float] = RUNGS) -> None:
        for share in rungs:
            if not 0 < share < 1:
                raise InputError(f"--rungs has {share:g}; give shares of the base's arithmetic between 0 and 1.")
        self._base, self._topology = base.eval(), read(base)
        like = next(base.parameters())
        self._places = positions(base, torch.zeros(3, *size, device=like.device))
        self._shares = {name: 1.0} | {f"{name} cut to {share:g}": share for share in rungs}
        self._steps = list(_steps(self._topology))

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __getitem__(self, name: str) -> nn.Module:
        share = self._shares[name]
        return self._base if share == 1 else self.cut(share).apply(self._base, self._topology)

    def cut(self, share: float) -> Rewrite:
        """What leaves a share of the base's multiply-accumulates: groups are cut alike, but for those of which one more
        step would be too much.

        Raises:
            InputError: none comes near.
        """
        whole, steps, taken = self._arithmetic([]), self._steps, []
        while steps:
            small = bisect_right(
                range(1, len(steps) + 1), -share * whole, key=lambda count: -self._arithmetic(taken + steps[:count])
            )
            taken, steps = taken + steps[:small], steps[small:]
            if self._arithmetic(taken) <= (share + CLOSE) * whole:
                break
            steps = [step for step in steps if step[0] != steps[0][0]]
        found = self._arithmetic(taken) / whole
        if abs(found - share) > NEAR:
            raise InputError(f"no cut of all channels leaves {share:g} of the arithmetic: {found:.3f} is the nearest.")
        return _after(taken)

    def _arithmetic(self, steps: Sequence[tuple[str, int]]) -> float:
        """Multiply-accumulates for one image after some steps."""
        shapes = shapes_after(self._base, self._topology, _after(steps))
        return sum(places * math.prod(shapes[name]) for name, places in self._places.items())


def _after(steps: Sequence[tuple[str, int]]) -> Rewrite:
    return Rewrite(keep={group: range(units) for group, units in steps})


def _steps(topology: Topology) -> Iterator[tuple[str, int]]:
    """Groups and the units that they are cut to, one step of one group at a time while the share of all falls."""
    left = {group.name: group.units for group in topology.groups}
    for number in range(FINEST - 1, 0, -1):
        for group in topology.groups:
            if (units := group.shrunk(number / FINEST)) < left[group.name]:
                left[group.name] = units
                yield group.name, units
