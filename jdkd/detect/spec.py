"""What a detector is made of, as data: a frozen dataclass that goes to JSON and back."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jdkd.errors import InputError

EXPANSION = {"basic": 1, "bottleneck": 4}  # stage width of the published ResNets over their inner width
INNER_CONVS = {"basic": 1, "bottleneck": 2}  # convolutions of a block whose output stays inside the block
_PUBLISHED = {  # blocks per stage, He et al., CVPR 2016, table 1
    "faster_rcnn_r18_fpn": ("basic", (2, 2, 2, 2)),
    "faster_rcnn_r34_fpn": ("basic", (3, 4, 6, 3)),
    "faster_rcnn_r50_fpn": ("bottleneck", (3, 4, 6, 3)),
    "faster_rcnn_r101_fpn": ("bottleneck", (3, 4, 23, 3)),
}
NAMED_SPECS = tuple(_PUBLISHED)
"""What :func:`named_spec` takes."""


@dataclass(frozen=True)
class Stage:
    """One ResNet stage: the width of its residual stream and the inner widths of each of its blocks.

    A basic block has one inner width (the output of its first convolution), a bottleneck has two.
    """

    width: int
    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Regions:
    """How many regions the two stages look at; the arguments are those of :class:`DetectorSpec`."""

    proposals: int = 1000
    rois: int = 512
    positives: float = 0.25
    roi_samples: int = 2

    @classmethod
    def of(cls, min_size: int) -> "Regions":
        """torchvision's numbers, or fewer where the short side of an image is below 400 pixels."""
        return cls(300, 64, 0.5, 1) if min_size < 400 else cls()


@dataclass(frozen=True)
class DetectorSpec:
    """Everything needed to build a detector; equal specs build equal architectures.

    Args:
        classes: names of the object classes, without background; label k is ``classes[k - 1]``.
        stages: the four ResNet stages, at strides 4, 8, 16 and 32.
        block: ``"basic"`` or ``"bottleneck"``.
        stem: output channels of the 7x7 stem.
        fpn: channels of every pyramid level, of its top-down path and of the RPN's hidden layer.
        box_head: hidden units of both fully connected layers of the box head.
        min_size, max_size: the input is resized to this short side, in pixels, unless the long side would
            exceed ``max_size``.
        anchors: anchor size per pyramid level P2-P6, in pixels.
        proposals: proposals per image that survive NMS at inference; training keeps twice as many.
        rois: regions sampled per image to train the box head.
        positives: largest share of them that are objects.
        roi_samples: sampling points per side of each of the 7x7 bins of a region.
        max_detections: detections that are kept of an image, those of the highest scores, and that are scored.
        norm: ``"batch"`` or ``"frozen"`` (statistics and affine parameters fixed).
        head: the detector family.
    """

    classes: tuple[str, ...]
    stages: tuple[Stage, ...]
    block: str = "basic"
    stem: int = 64
    fpn: int = 256
    box_head: int = 1024
    min_size: int = 800
    max_size: int = 1333
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    proposals: int = Regions.proposals
    rois: int = Regions.rois
    positives: float = Regions.positives
    roi_samples: int = Regions.roi_samples
    max_detections: int = 100
    norm: str = "batch"
    head: str = "faster_rcnn"

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(dataclasses.asdict(self), indent=indent, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str = "the spec") -> "DetectorSpec":
        """Reads what :meth:`to_json` wrote.

        Raises:
            InputError: ``text`` is no JSON object, misses a field, has one that is unknown, or describes no
                detector that can be built. ``source`` names it in the message.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} is not JSON ({error}); give what `DetectorSpec.to_json` wrote.") from None
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not {"classes", "stages"} <= fields.keys() <= known:
            got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise InputError(f"{source} must be a JSON object with the fields {sorted(known)}, got {got}.")
        try:
            return cls(**{**_tuples(fields), "stages": tuple(_stage(stage) for stage in fields["stages"])})
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{source} does not describe a detector: {error!r}; compare it with a named spec."
            ) from None

    def replace(self, **changes: Any) -> "DetectorSpec":
        return dataclasses.replace(self, **changes)


def round_width(width: float) -> int:
    """The nearest multiple of 8 channels, at least 8."""
    return max(8, int(width / 8 + 0.5) * 8)


def named_spec(
    name: str,
    classes: Sequence[str],
    *,
    width: float = 1.0,
    depth: float = 1.0,
    fpn: int | None = None,
    box_head: int | None = None,
    min_size: int = 800,
    max_size: int | None = None,
    max_detections: int = 100,
) -> DetectorSpec:
    """A published architecture, narrowed or deepened.

    Args:
        name: one of :data:`NAMED_SPECS`.
        classes: names of the object classes.
        width: multiplies every channel count of the backbone (rounded to multiples of 8), of the FPN and of
            the box head.
        depth: multiplies the number of blocks of every stage.
        fpn, box_head: override the multiplied widths.
        min_size, max_size: input size in pixels; the longest side is 1333 by default, or ``min_size`` where that is
            more. Anchors follow it (32-512 at 800 px, the smallest never under 8), and below 400 px fewer regions are
            proposed (300) and sampled (64, half of them objects), with one point per bin.
        max_detections: detections that are kept of an image.

    Raises:
        InputError: the name is unknown, a multiplier is not positive and finite, or ``max_size`` is below ``min_size``.
    """
    if name not in _PUBLISHED:
        raise InputError(f"spec {name!r} is neither a JSON file nor one of the named specs {', '.join(NAMED_SPECS)}.")
    if not (0 < width < math.inf and 0 < depth < math.inf):
        raise InputError(f"width and depth multiply the spec and must be positive, got {width} and {depth}.")
    if max_size is not None and max_size < min_size:
        raise InputError(
            f"max_size {max_size} is below min_size {min_size}, but limits the long side when the short one is resized "
            "to min_size; give both, the larger one as max_size."
        )
    block, depths = _PUBLISHED[name]
    inner = [round_width(width * channels) for channels in (64, 128, 256, 512)]
    stages = tuple(
        Stage(channels * EXPANSION[block], ((channels,) * INNER_CONVS[block],) * max(1, round(blocks * depth)))
        for channels, blocks in zip(inner, depths, strict=True)
    )
    smallest = smallest_anchor(min_size)
    return DetectorSpec(
        classes=tuple(classes),
        stages=stages,
        block=block,
        stem=round_width(64 * width),
        fpn=round_width(256 * width) if fpn is None else fpn,
        box_head=round_width(1024 * width) if box_head is None else box_head,
        min_size=min_size,
        max_size=max(1333, min_size) if max_size is None else max_size,
        anchors=tuple(smallest << level for level in range(5)),
        max_detections=max_detections,
        **vars(Regions.of(min_size)),
    )


def smallest_anchor(min_size: int) -> int:
    """Size of the anchors of a pyramid's finest level: 32 pixels where images have 800, and never under 8."""
    smallest = 32
    while smallest > 8 and smallest * 800 > 32 * min_size * 1.5:
        smallest //= 2
    return smallest


def _check(spec: DetectorSpec) -> None:
    if spec.head != "faster_rcnn":
        raise InputError(f"head must be 'faster_rcnn', got {spec.head!r}.")
    if spec.block not in EXPANSION or spec.norm not in ("batch", "frozen"):
        raise InputError(
            f"block must be one of {sorted(EXPANSION)} and norm 'batch' or 'frozen', got {spec.block!r} and "
            f"{spec.norm!r}."
        )
    if isinstance(spec.classes, str) or not all(isinstance(name, str) for name in spec.classes):
        raise InputError(f"classes must be a list of names, got {spec.classes!r:.60}.")
    if not 0 <= spec.positives <= 1:
        raise InputError(f"positives is a share of the regions and must be in 0..1, got {spec.positives}.")
    if not spec.classes or len(spec.stages) != 4 or len(spec.anchors) != 5:
        raise InputError(
            "a detector needs at least one class, 4 stages and 5 anchor sizes, got "
            f"{len(spec.classes)}, {len(spec.stages)} and {len(spec.anchors)}."
        )
    for number, stage in enumerate(spec.stages, start=1):
        if not stage.blocks or any(len(block) != INNER_CONVS[spec.block] for block in stage.blocks):
            raise InputError(
                f"stage {number} needs at least one block, each with {INNER_CONVS[spec.block]} inner width(s) "
                f"for {spec.block} blocks, got {stage.blocks}."
            )
    scalars = ("stem", "fpn", "box_head", "min_size", "max_size", "proposals", "rois", "roi_samples", "max_detections")
    sizes = {name: [getattr(spec, name)] for name in scalars} | {"anchors": list(spec.anchors)}
    for number, stage in enumerate(spec.stages, start=1):
        sizes[f"stage {number}"] = [stage.width, *sum(stage.blocks, ())]
    for name, given in sizes.items():
        for size in given:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"every size of a spec must be a positive whole number, got {size!r} for {name}.")


def _stage(fields: dict[str, Any]) -> Stage:
    return Stage(fields["width"], tuple(tuple(block) for block in fields["blocks"]))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
