"""What of torchvision's detectors can be cut: every family over several backbones, traced, verified, cut, and trained.

Run ``python -m benchmarks.prunable``; it writes ``benchmarks/results/topology.jsonl``, one row a detector, and
``topology.md``, the same for people. A name or part of one behind it (``retinanet``, ``swin``) takes only these, and
prints them. Rows that are there stay. With ``--table`` only ``topology.md`` is written.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FrozenBatchNorm2d, feature_pyramid_network

from benchmarks import markdown
from jdkd.detect import read
from jdkd.detect.reading import SIZE, few_regions
from jdkd.graph import Topology
from jdkd.rewrite import Architecture, Rewrite, build, load_architecture, mask, prune, save_architecture
from jdkd.rewrite.comparison import errors, returned_by
from jdkd.rewrite.trial import comparable

RESULTS = Path(__file__).parent / "results" / "topology.jsonl"
TABLE = RESULTS.with_suffix(".md")
CLASSES = 5
SIZES = {"min_size": 96, "max_size": 128}
KEPT = 0.7
Build = Callable[[], nn.Module]


class Pyramid(nn.Module):
    """An FPN over some stages of a plain sequence of layers.

    Args:
        body: the sequence.
        stages: which of its layers' outputs the pyramid takes, and with how many channels.
        width: channels of the pyramid.
        norm: of its convolutions.
        channels_last: whether the body's maps are ``[N, H, W, C]``, as those of a transformer.
    """

    def __init__(
        self,
        body: nn.Sequential,
        stages: dict[int, int],
        width: int = 256,
        norm: Callable[[int], nn.Module] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.body, self.stages, self.out_channels = body[: max(stages) + 1], [*stages], width
        self.channels_last = channels_last
        top = feature_pyramid_network.LastLevelMaxPool()
        self.fpn = feature_pyramid_network.FeaturePyramidNetwork([*stages.values()], width, top, norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = OrderedDict()
        for place, layer in enumerate(self.body):
            x = layer(x)
            if place in self.stages:
                levels[str(len(levels))] = x.permute(0, 3, 1, 2).contiguous() if self.channels_last else x
        return self.fpn(levels)


def group_norm(channels: int) -> nn.Module:
    """Norm groups of 8 channels, or of all where that does not fit."""
    return nn.GroupNorm(max(1, channels // 8), channels)


def resnet(name: str, norm: Callable[..., nn.Module]) -> nn.Module:
    return resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm, trainable_layers=5)


def efficientnet() -> nn.Module:
    return Pyramid(models.efficientnet_b0(weights=None).features, {2: 24, 3: 40, 5: 112, 7: 320}, norm=nn.BatchNorm2d)


def regnet() -> nn.Module:
    net = models.regnet_y_400mf(weights=None)
    return Pyramid(nn.Sequential(net.stem, *net.trunk_output), {1: 48, 2: 104, 3: 208, 4: 440})


def swin() -> nn.Module:
    return Pyramid(models.swin_t(weights=None).features, {1: 96, 3: 192, 5: 384, 7: 768}, channels_last=True)


def mobilenet_v2() -> nn.Module:
    return Pyramid(models.mobilenet_v2(weights=None).features, {3: 24, 6: 32, 13: 96, 17: 320}, norm=group_norm)


def mobilenet_v3() -> nn.Module:
    return mobilenet_backbone(backbone_name="mobilenet_v3_large", fpn=True, weights=None, trainable_layers=6)


BACKBONES: dict[str, Build] = {
    "resnet18, batch norm": functools.partial(resnet, "resnet18", nn.BatchNorm2d),
    "resnet50, frozen batch norm": functools.partial(resnet, "resnet50", FrozenBatchNorm2d),
    "mobilenet_v2, group norm in the FPN": mobilenet_v2,
    "efficientnet_b0": efficientnet,
    "swin_t": swin,
    "mobilenet_v3_large": mobilenet_v3,
    "regnet_y_400mf": regnet,
    "resnext50, group norm": functools.partial(resnet, "resnext50_32x4d", group_norm),
    "resnet101, frozen batch norm": functools.partial(resnet, "resnet101", FrozenBatchNorm2d),
}


def _levels(backbone: nn.Module) -> int:
    return len(backbone.fpn.inner_blocks) + 1  # and the pooled one


def _anchors(backbone: nn.Module, shapes: int = 3) -> detection.anchor_utils.AnchorGenerator:
    levels = _levels(backbone)
    sizes = tuple((8 * 2**k,) for k in range(levels))
    return detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0)[:shapes] if shapes > 1 else (1.0,),) * levels)


def two_stage(family: type[nn.Module], backbone: nn.Module, **heads: nn.Module) -> nn.Module:
    few = {"rpn_post_nms_top_n_test": 50, "rpn_post_nms_top_n_train": 50, "box_detections_per_img": 10}
    return family(backbone, CLASSES, rpn_anchor_generator=_anchors(backbone), **few, **SIZES, **heads)


def retinanet(backbone: nn.Module) -> nn.Module:
    return detection.RetinaNet(backbone, CLASSES, anchor_generator=_anchors(backbone), **SIZES)


def fcos(backbone: nn.Module) -> nn.Module:
    return detection.FCOS(backbone, CLASSES, anchor_generator=_anchors(backbone, shapes=1), **SIZES)


def ssd(backbone: nn.Module, lite: bool = False) -> nn.Module:
    levels = _levels(backbone)
    anchors = detection.anchor_utils.DefaultBoxGenerator([[2]] * levels)
    channels = [backbone.out_channels] * levels
    norm = functools.partial(nn.BatchNorm2d, eps=0.001)
    head = SSDLiteHead(channels, anchors.num_anchors_per_location(), CLASSES, norm) if lite else None
    backbone.out_channels = channels
    return detection.ssd.SSD(backbone, anchors, (128, 128), CLASSES, head=head)


def detectors() -> Iterator[tuple[str, str, Build]]:
    """Yields family, backbone, and what builds the detector."""
    families = {
        "Faster R-CNN": functools.partial(two_stage, detection.FasterRCNN),
        "Mask R-CNN": functools.partial(two_stage, detection.MaskRCNN),
        "Keypoint R-CNN": functools.partial(two_stage, detection.KeypointRCNN),
        "RetinaNet": retinanet,
        "FCOS": fcos,
        "SSD": ssd,
        "SSDlite": functools.partial(ssd, lite=True),
    }
    plain = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    yield "SSD", "vgg16, as torchvision has it", functools.partial(detection.ssd300_vgg16, **plain)
    yield (
        "SSDlite",
        "mobilenet_v3_large, as torchvision has it",
        functools.partial(detection.ssdlite320_mobilenet_v3_large, **plain),
    )
    yield (
        "Faster R-CNN",
        "resnet50 v2, as torchvision has it",
        functools.partial(detection.fasterrcnn_resnet50_fpn_v2, **plain, **SIZES),
    )
    yield (
        "RetinaNet",
        "resnet50 v2, as torchvision has it",
        functools.partial(detection.retinanet_resnet50_fpn_v2, **plain, **SIZES),
    )
    for name, backbone in BACKBONES.items():
        for family, head in families.items():
            yield family, name, lambda head=head, backbone=backbone: head(backbone())


def detector(family: str, backbone: str) -> nn.Module:
    """A builder, for ``jdkd.rewrite.Architecture``."""
    return next(build for *names, build in detectors() if names == [family, backbone])()


def images(count: int = 1) -> list[Tensor]:
    return [torch.rand(3, 96, 128 - 32 * k, generator=torch.Generator().manual_seed(k)) for k in range(count)]


def targets(family: str, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
    """One box in each picture, with what the family wants beside it."""
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0]])
    found = []
    for picture in pictures:
        target = {"boxes": boxes.clone(), "labels": torch.tensor([1])}
        if family == "Mask R-CNN":
            target["masks"] = torch.ones(1, *picture.shape[1:], dtype=torch.uint8)
        if family == "Keypoint R-CNN":
            target["keypoints"] = torch.tensor([[[30.0, 30.0, 1.0]] * 17])
        found.append(target)
    return found


def cut(topology: Topology, kept: float = KEPT) -> dict[str, range]:
    """The first units of every group."""
    return {group.name: range(max(1, round(kept * group.units))) for group in topology.groups}


def worst_error(model: nn.Module, topology: Topology) -> float:
    """The largest relative difference, in float32, of anything that a module of the cut and of the masked model
    return in the same shape."""
    with few_regions(model, *SIZE):
        example = ([torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))],)
        drawn, keep = comparable(model, example).model.float(), cut(topology)
        found = errors(returned_by(prune(drawn, topology, keep), example), mask(drawn, topology, keep), example)
    return max(error for error in found.values() if error is not None)


def learning(family: str, model: nn.Module) -> set[str]:
    """The parameters that one step of training reaches; its losses must be finite."""
    torch.manual_seed(0)
    pictures = images(2)
    losses = model.train()(pictures, targets(family, pictures))
    sum(losses.values()).backward()
    assert all(map(torch.isfinite, losses.values())), f"losses are not finite: {losses}"
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_cut(family: str, model: nn.Module, topology: Topology, folder: Path) -> tuple[nn.Module, dict[str, float]]:
    """Cuts a detector everywhere; the result runs, learns all that the whole learns, and is saved and loaded.

    Args:
        family: of the detector.
        model: carries its ``architecture``; it takes a step of training too.
        topology: what was read off it.
        folder: where a checkpoint may go.

    Returns:
        The cut detector, and the seconds that cutting and building took.
    """
    begin = time.process_time()
    small = Rewrite(keep=cut(topology)).apply(model, topology)
    rewritten = time.process_time()
    build(small.architecture, "meta")
    built = time.process_time()
    save_architecture(folder, small, small.architecture)
    loaded, pictures = load_architecture(folder), images(2)
    with torch.no_grad():
        answers = [each.eval()(copy.deepcopy(pictures)) for each in (small, loaded)]
    assert all(torch.equal(one[key], other[key]) for one, other in zip(*answers, strict=True) for key in one), "loaded"
    missed = learning(family, copy.deepcopy(model)) - learning(family, small)
    assert not missed, f"no gradient reaches {sorted(missed)[:5]} any more"
    return small, {"rewrite_seconds": round(rewritten - begin, 2), "build_seconds": round(built - rewritten, 2)}


def frozen_parameters(model: nn.Module, topology: Topology) -> dict[str, int]:
    """How many parameters stand in no group, by the reason."""
    numbers = dict(model.named_parameters())
    free = {slot.tensor for group in topology.groups for slot in group.slots}
    reasons: dict[str, int] = {}
    for frozen in topology.frozen:
        stuck = {tensor for tensor, _ in frozen.tensors if tensor in numbers and tensor not in free}
        if stuck:
            reason = re.sub(r" in [\w.]+(?=;|$)", "", frozen.reason)  # without the module
            reasons[reason] = reasons.get(reason, 0) + sum(numbers[name].numel() for name in stuck)
    return reasons


def row(family: str, backbone: str) -> dict[str, Any]:
    """One detector, measured."""
    torch.manual_seed(0)
    architecture = Architecture("benchmarks.prunable:detector", {"family": family, "backbone": backbone})
    model = build(architecture).eval()
    model.architecture = architecture
    begin = time.process_time()
    topology = read(model)
    traced = time.process_time()
    checked = read(model, check=True)
    verified = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        small, seconds = check_cut(family, model, checked, Path(folder))
    total = sum(p.numel() for p in model.parameters())
    return {
        "detector": family,
        "backbone": backbone,
        "parameters": total,
        "prunable_share": round(checked.prunable_share(), 4),
        "groups": len(checked.groups),
        "growing_groups": sum(group.grows for group in checked.groups),
        "disagreeing_groups": len(topology.groups) - len(checked.groups),
        "worst_relative_error": float(f"{worst_error(model, checked):.1e}"),
        "blocks": sum(len(blocks.blocks) for blocks in checked.block_lists),
        "identity_blocks": sum(all(all(e) for e in ends) for blocks in checked.block_lists for ends in blocks.ends),
        "left_after_a_cut_of_30_percent": round(sum(p.numel() for p in small.parameters()) / total, 4),
        "frozen_parameters": frozen_parameters(model, checked),
        "unknown_operators": sorted(checked.unknown),
        "trace_seconds": round(traced - begin, 2),
        "verify_seconds": round(verified - traced - (traced - begin), 2),
        **seconds,
        "threads": torch.get_num_threads(),
    }


def load() -> list[dict[str, Any]]:
    """The rows of the result file."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown: shares, what they were measured with, and what is frozen."""
    backbones = list(dict.fromkeys(each["backbone"] for each in rows))
    shares = {(each["detector"], each["backbone"]): f"{100 * each['prunable_share']:.2f}" for each in rows}
    families = list(dict.fromkeys(each["detector"] for each in rows))
    lines = [
        "# What of torchvision's detectors can be cut",
        "",
        "Written by `python -m benchmarks.prunable --table` from `topology.jsonl`. Share of the parameters, in",
        "percent, that stand in a group of channels that can be cut, after `verify`:",
        "",
        markdown.table(
            ("backbone", *families), "l",
            [(name, *(shares.get((family, name), "") for family in families)) for name in backbones],
        ),
        "",
        "Each was cut by 30 % everywhere: it runs, takes a step of training that reaches every parameter that one of",
        "the whole detector reaches, and is saved and loaded with equal outputs. Left is the share of the parameters",
        "after it; the error is the largest relative one between cut and masked, in float32, of any module's output;",
        "seconds are processor time of one core.",
        "",
        markdown.table(
            ("detector", "backbone", "parameters / M", "groups", "disagree", "left / %", "error", "trace / s",
             "verify / s", "rewrite / s", "build / s"), "l",
            [
                (r["detector"], r["backbone"], f"{r['parameters'] / 1e6:.1f}", r["groups"], r["disagreeing_groups"],
                 f"{100 * r['left_after_a_cut_of_30_percent']:.0f}", f"{r['worst_relative_error']:.0e}",
                 *(r[f"{name}_seconds"] for name in ("trace", "verify", "rewrite", "build")))
                for r in rows
            ],
        ),
        "",
        "What stands in no such group, with the largest share of a detector's parameters that it keeps:",
        "",
        markdown.table(("because", "up to / %", "in"), "l", _frozen(rows)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _frozen(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Every reason, the largest share of parameters that it keeps, and in which detector."""
    found = [
        (100 * number / each["parameters"], reason, f"{each['detector']}, {each['backbone']}")
        for each in rows
        for reason, number in each["frozen_parameters"].items()
    ]
    worst = {reason: (share, who) for share, reason, who in sorted(found)}
    return [
        (reason, f"{share:.3f}" if share >= 0.001 else "< 0.001", who)
        for reason, (share, who) in sorted(worst.items(), key=lambda each: -each[1][0])
    ]


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    rows = load()
    done = {(each["detector"], each["backbone"]) for each in rows}
    for family, backbone, _ in detectors() if wanted != ["--table"] else ():
        if wanted and not any(word.lower() in f"{family} {backbone}".lower() for word in wanted):
            continue
        if not wanted and (family, backbone) in done:
            continue
        measured = row(family, backbone)
        print(json.dumps(measured), flush=True)
        if not wanted:
            rows.append(measured)
            RESULTS.write_text("".join(json.dumps(each) + "\n" for each in rows))
    if not wanted or wanted == ["--table"]:
        TABLE.write_text(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
