"""Channel groups: which tensors share which channels, declared by the builder instead of traced.

Published tracers fail on two-stage detectors (the RPN is never reached, FrozenBatchNorm breaks silently), so
the one who builds the network says how it is coupled.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jdkd.detect.build import ROI_SIZE
from jdkd.detect.resnet import STAGES
from jdkd.detect.spec import INNER_CONVS, DetectorSpec
from jdkd.errors import InputError

_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Group:
    """Channels that live and die together.

    Args:
        name: e.g. ``"layer2.0.inner1"``, ``"layer2"`` (a residual stream), ``"fpn"``, ``"box_head.fc6"``.
        size: number of channels.
        producers: (tensor name, dimension) of what computes them.
        consumers: (tensor name, dimension, repeat) of what reads them; ``repeat`` consecutive entries of the
            dimension belong to one channel (49 where the RoI is flattened).
    """

    name: str
    size: int
    producers: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int, int], ...]


def inner_group(stage: int, block: int, number: int) -> str:
    """Name of the channels between convolution ``number + 1`` and ``number + 2`` of a block."""
    return f"{STAGES[stage]}.{block}.inner{number + 1}"


def channel_groups(spec: DetectorSpec) -> dict[str, Group]:
    """Every channel group of the detector built from ``spec``, by name.

    Raises:
        InputError: ``spec`` is no spec.
    """
    if not isinstance(spec, DetectorSpec):
        raise InputError(f"channel_groups takes a DetectorSpec, got a {type(spec).__name__}; give model.spec.")
    return {group.name: group for group in (*_backbone_groups(spec), *_neck_and_head_groups(spec))}


def _conv_norm(conv: str, norm: str) -> tuple[tuple[str, int], ...]:
    return ((f"{conv}.weight", 0), *((f"{norm}.{tensor}", 0) for tensor in _NORM))


def _backbone_groups(spec: DetectorSpec) -> Iterator[Group]:
    body = "backbone.body"
    last = INNER_CONVS[spec.block] + 1  # number of a block's last convolution
    stream = "stem"  # the residual stream that enters the next block
    size = spec.stem
    producers = _conv_norm(f"{body}.conv1", f"{body}.bn1")
    consumers: tuple[tuple[str, int, int], ...] = ()
    for number, (name, stage) in enumerate(zip(STAGES, spec.stages, strict=True)):
        for i, inner in enumerate(stage.blocks):
            block = f"{body}.{name}.{i}"
            consumers += ((f"{block}.conv1.weight", 1, 1),)
            if i == 0 and (number > 0 or size != stage.width):  # the shortcut is projected: a new stream begins
                consumers += ((f"{block}.downsample.0.weight", 1, 1),)
                yield Group(stream, size, producers, consumers)
                stream, size, consumers = name, stage.width, ()
                producers = _conv_norm(f"{block}.downsample.0", f"{block}.downsample.1")
            for k, width in enumerate(inner):
                made = _conv_norm(f"{block}.conv{k + 1}", f"{block}.bn{k + 1}")
                yield Group(inner_group(number, i, k), width, made, ((f"{block}.conv{k + 2}.weight", 1, 1),))
            producers += _conv_norm(f"{block}.conv{last}", f"{block}.bn{last}")
        consumers += ((f"backbone.fpn.inner_blocks.{number}.0.weight", 1, 1),)
    yield Group(stream, size, producers, consumers)


def _neck_and_head_groups(spec: DetectorSpec) -> Iterator[Group]:
    def affine(*layers: str) -> tuple[tuple[str, int], ...]:
        return tuple((f"{layer}.{tensor}", 0) for layer in layers for tensor in ("weight", "bias"))

    levels = range(len(STAGES))
    inner = affine(*(f"backbone.fpn.inner_blocks.{i}.0" for i in levels))
    outer = [f"backbone.fpn.layer_blocks.{i}.0" for i in levels]
    rpn, roi = "rpn.head", "roi_heads"
    yield Group("fpn.top_down", spec.fpn, inner, tuple((f"{layer}.weight", 1, 1) for layer in outer))
    reads = ((f"{rpn}.conv.0.0.weight", 1, 1), (f"{roi}.box_head.fc6.weight", 1, ROI_SIZE**2))
    yield Group("fpn", spec.fpn, affine(*outer), reads)
    reads = ((f"{rpn}.cls_logits.weight", 1, 1), (f"{rpn}.bbox_pred.weight", 1, 1))
    yield Group("rpn", spec.fpn, affine(f"{rpn}.conv.0.0"), reads)
    yield Group("box_head.fc6", spec.box_head, affine(f"{roi}.box_head.fc6"), ((f"{roi}.box_head.fc7.weight", 1, 1),))
    predictor = f"{roi}.box_predictor"
    reads = ((f"{predictor}.cls_score.weight", 1, 1), (f"{predictor}.bbox_pred.weight", 1, 1))
    yield Group("box_head.fc7", spec.box_head, affine(f"{roi}.box_head.fc7"), reads)
