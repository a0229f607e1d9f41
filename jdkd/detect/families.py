"""See :func:`detector`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign

from jdkd.detect.atss import ATSS, ATSSHead
from jdkd.detect.backbones import PYRAMIDS, Extended, Pyramid, maps_of
from jdkd.detect.gfl import GFL, GFLHead
from jdkd.detect.input_size import Regions, require_order, require_whole, smallest_anchor
from jdkd.detect.norms import GROUP, exchange_norms, group_norm
from jdkd.detect.reppoints import RepPoints, RepPointsHead
from jdkd.detect.roi_scales import set_roi_scales
from jdkd.errors import InputError, one_of_these
from jdkd.rewrite import Architecture
from jdkd.rewrite.architecture import set_architecture

BUILDER = "jdkd.detect:detector"
RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Family:
    """What a family has where nothing else is said.

    Args:
        build: what makes a detector of it.
        pyramid: what its heads read; None where they read the backbone's own maps.
        box_head: hidden units of its box head, if it has one.
        keypoints: that it finds of an object, if it does.
        min_size: to which it resizes the short side of an image, in pixels.
        square: whether it resizes images to a square.
        anchor_scale: its finest anchors, in sizes of a Faster R-CNN's; None where anchors are strides.
    """

    build: Callable[[Options], nn.Module]
    pyramid: str | None
    box_head: int | None = None
    keypoints: int | None = None
    min_size: int = 800
    square: bool = False
    anchor_scale: int | None = 1


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`detector`, all of them known."""

    family: str
    backbone: str
    classes: int
    pyramid: str | None
    channels: int
    norm: str | None
    min_size: int
    max_size: int
    anchors: tuple[int, ...] | None
    box_head: int | None
    keypoints: int | None
    max_detections: int

    @property
    def outputs(self) -> int:
        """Classes with the background, as torchvision counts them."""
        return self.classes + 1

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the anchors, one a level; none in a family without them."""
        return self.anchors or ()

    @property
    def candidates(self) -> int:
        """Regions or boxes that are looked at before a final non-maximum suppression."""
        return Regions.of(self.min_size).proposals

    @property
    def is_second(self) -> bool:
        """Whether it is torchvision's second version of a family."""
        return self.family.endswith("_v2")


def detector(
    family: str,
    backbone: str,
    classes: int | Sequence[str],
    *,
    pyramid: str | None = None,
    channels: int = 256,
    norm: str | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    anchors: Sequence[int] | None = None,
    box_head: int | None = None,
    keypoints: int | None = None,
    max_detections: int = 100,
) -> nn.Module:
    """Builds a detector of torchvision's parts over any backbone, with fresh weights.

    A family over the backbone that torchvision has it with takes torchvision's state dict, and gives its outputs.

    Args:
        family: of :data:`FAMILIES`: ``"fasterrcnn"``, ``"maskrcnn"``, ``"keypointrcnn"``, ``"retinanet"``, ``"fcos"``,
            ``"ssd"``, ``"ssdlite"``, ``"fasterrcnn_v2"``, ``"maskrcnn_v2"`` and ``"retinanet_v2"``; and, which
            torchvision lacks, ``"atss"``, ``"gfl"`` and ``"reppoints"``.
        backbone: of :func:`jdkd.detect.backbones.backbone_names`, or ``"timm:NAME"``.
        classes: number of object classes, without background, or their names.
        pyramid: ``"P2-P6"`` or ``"P3-P7"``; by default what the family has (P3-P7 for those of one stage). SSD and
            SSDlite have none: their heads read six maps of strides 8 and 16 on.
        channels: of the pyramid and of the heads.
        norm: ``"batch"``, ``"frozen"`` (of the backbone's body), ``"sync"`` or ``"group"``; by default batch norms,
            and the layer norms of the backbones that have them.
        min_size, max_size: the short side of an image is resized to the first, in pixels, unless the long side would
            exceed the second. SSD and SSDlite resize to a square of the first. Below 400 pixels, fewer regions are
            proposed (300) and sampled (64), with one point per bin.
        anchors: size per level, in pixels; by default they follow ``min_size``. FCOS's and RepPoints' are the
            strides and SSD's are shares of the image.
        box_head: hidden units of the box head of the families of two stages [1024].
        keypoints: points per object of a Keypoint R-CNN [17].
        max_detections: detections that are kept of an image.

    Returns:
        The detector, which carries its ``architecture``.

    Raises:
        InputError: there is no such family, backbone, norm or pyramid, or they do not go together.
    """
    names = () if isinstance(classes, int | float) else class_names(classes)
    known = _options(
        family,
        pyramid=pyramid,
        min_size=min_size,
        max_size=max_size,
        anchors=anchors,
        backbone=backbone,
        classes=len(names) if names else classes,
        channels=channels,
        norm=norm,
        box_head=box_head,
        keypoints=keypoints,
        max_detections=max_detections,
    )
    model = FAMILIES[family].build(known)
    if norm is not None:
        exchange_norms(model.get_submodule("backbone.body") if norm == "frozen" else model, norm)
    set_architecture(model, Architecture(BUILDER, asdict(known), classes=names))
    return model


def class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the object classes, label k is the k-th.

    Raises:
        InputError: they are no list of names, none, empty or repeated.
    """
    listed = () if isinstance(names, str) or not isinstance(names, Sequence) else tuple(names)
    if (
        not listed
        or not all(isinstance(name, str) and name.strip() for name in listed)
        or len(set(listed)) < len(listed)
    ):
        raise InputError(f"classes must be names, each once, or how many there are, got {names!r:.200}.")
    return listed


def _options(
    family: str,
    *,
    pyramid: str | None,
    min_size: int | None,
    max_size: int | None,
    anchors: Sequence[int] | None,
    **known: Any,
) -> Options:
    """What was left open, closed.

    Raises:
        InputError: something does not exist or does not go together.
    """
    if family not in FAMILIES:
        raise InputError(f"family {family!r} is none of {', '.join(FAMILIES)}; {one_of_these(family, FAMILIES)}.")
    has = FAMILIES[family]
    if not isinstance(known["backbone"], str):
        raise InputError(f"backbone must be a name, got {known['backbone']!r:.80}; give resnet50 or the like.")
    if pyramid is not None and pyramid not in tuple(PYRAMIDS):
        raise InputError(f"pyramid must be {' or '.join(PYRAMIDS)}, got {pyramid!r}.")
    if pyramid is not None and has.pyramid is None:
        raise InputError(
            f"{family} has no pyramid, as its heads read the backbone's own maps; leave pyramid {pyramid!r} out, or "
            "give retinanet or fcos, which have one."
        )
    for name in ("box_head", "keypoints"):
        if known[name] is None:
            known[name] = getattr(has, name)
        elif getattr(has, name) is None:
            raise InputError(f"{family} has no {name}; leave {name} {known[name]!r} out.")
    counts = ("classes", "channels", "box_head", "keypoints", "max_detections")
    sizes = {name: known[name] for name in counts} | {"min_size": min_size, "max_size": max_size}
    require_whole({name: size for name, size in sizes.items() if size is not None})
    if known["channels"] % (step := 32 if family in OF_32_GROUPS else GROUP):
        raise InputError(f"channels of {family} must be a multiple of {step}, got {known['channels']}.")
    least = has.min_size if min_size is None else min_size
    most = max_size if max_size is not None else least if has.square else max(1333, least)
    if has.square and most != least:
        raise InputError(
            f"{family} resizes images to {least}x{least}; leave max_size {most} out, or give it as min_size."
        )
    require_order(least, most)
    return Options(
        family=family,
        pyramid=pyramid or has.pyramid,
        min_size=least,
        max_size=most,
        anchors=_anchors(family, pyramid or has.pyramid, least, anchors),
        **known,
    )


def _anchors(family: str, pyramid: str | None, min_size: int, given: Sequence[int] | None) -> tuple[int, ...] | None:
    scale = FAMILIES[family].anchor_scale
    if pyramid is None or scale is None:
        own = PYRAMIDS[pyramid] if pyramid else None
        if given is not None and tuple(given) != own:
            why = "are the strides of its levels" if pyramid else "are shares of the image"
            raise InputError(f"the anchors of {family} {why}; leave anchors out.")
        return own
    levels = len(PYRAMIDS[pyramid])
    if given is None:
        given = [scale * smallest_anchor(min_size) << level for level in range(levels)]
    found = tuple(given) if isinstance(given, Sequence) else (given,)
    if len(found) != levels or any(type(size) is not int or size < 1 for size in found):
        raise InputError(f"anchors must be {levels} whole numbers of pixels, one per level, got {list(found)}.")
    return found


def _pyramid(options: Options, **how: Any) -> Pyramid:
    return Pyramid(maps_of(options.backbone), cast(str, options.pyramid), options.channels, **how)


def _two_stages(options: Options) -> FasterRCNN:
    """Ren et al., NeurIPS 2015; He et al., ICCV 2017; the second versions as Li et al., 2021, have them."""
    norm = nn.BatchNorm2d if options.is_second else None
    backbone = _pyramid(options, norm=norm)
    width, regions = options.channels, Regions.of(options.min_size)

    def pool(size: int) -> MultiScaleRoIAlign:
        read = [name for name in backbone.strides if name.isdigit()]
        made = MultiScaleRoIAlign(read, size, sampling_ratio=regions.roi_samples)
        set_roi_scales(made, [backbone.strides[name] for name in read])
        return made

    anchors = AnchorGenerator(tuple((size,) for size in options.sides), (RATIOS,) * len(options.sides))
    heads: dict[str, Any] = {"box_predictor": FastRCNNPredictor(options.box_head, options.outputs)}
    if options.is_second:
        heads["box_head"] = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [options.box_head], norm)
    else:
        heads["box_head"] = TwoMLPHead(width * 7**2, options.box_head)
    kind: type[FasterRCNN] = FasterRCNN
    if options.family.startswith("mask"):
        kind = MaskRCNN
        heads["mask_roi_pool"] = pool(14)
        heads["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1, norm)
        heads["mask_predictor"] = MaskRCNNPredictor(width, width, options.outputs)
    elif options.family.startswith("keypoint"):
        kind = KeypointRCNN
        heads["keypoint_roi_pool"] = pool(14)
        heads["keypoint_head"] = KeypointRCNNHeads(width, [2 * width] * 8)
        heads["keypoint_predictor"] = KeypointRCNNPredictor(2 * width, options.keypoints)
        heads["num_keypoints"] = None
    return kind(
        backbone,
        min_size=options.min_size,
        max_size=options.max_size,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(width, len(RATIOS), conv_depth=2 if options.is_second else 1),
        rpn_pre_nms_top_n_train=2 * options.candidates,
        rpn_pre_nms_top_n_test=options.candidates,
        rpn_post_nms_top_n_train=2 * options.candidates,
        rpn_post_nms_top_n_test=options.candidates,
        box_roi_pool=pool(7),
        box_batch_size_per_image=regions.rois,
        box_positive_fraction=regions.positives,
        box_detections_per_img=options.max_detections,
        **heads,
    )


def _retinanet(options: Options) -> RetinaNet:
    """Lin et al., ICCV 2017; three sizes a level; the second version with group norms and a generalised IoU loss."""
    sizes = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in options.sides)
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
    norm = group_norm if options.is_second else None
    head = RetinaNetHead(options.channels, anchors.num_anchors_per_location()[0], options.outputs, norm)
    if options.is_second:
        head.regression_head._loss_type = "giou"
    backbone = _pyramid(options, from_c5=options.is_second)
    return RetinaNet(backbone, options.outputs, anchor_generator=anchors, head=head, **_of_one_stage(options))


def _fcos(options: Options) -> FCOS:
    """Tian et al., ICCV 2019; its one anchor a place says the stride of the level."""
    anchors = AnchorGenerator(tuple((size,) for size in options.sides), ((1.0,),) * len(options.sides))
    head = FCOSHead(options.channels, 1, options.outputs)
    for module in head.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = options.channels // GROUP
    how = _of_one_stage(options)
    return FCOS(_pyramid(options), options.outputs, anchor_generator=anchors, head=head, **how)


def _of_every_place(kind: type[FCOS], head: type[nn.Module], options: Options, **how: float) -> FCOS:
    """A detector with one square anchor at every place, which says how far its head's words reach."""
    anchors = AnchorGenerator(tuple((size,) for size in options.sides), ((1.0,),) * len(options.sides))
    return kind(
        _pyramid(options),
        options.outputs,
        anchor_generator=anchors,
        head=head(options.channels, options.outputs),
        **_of_one_stage(options),
        **how,
    )


def _of_one_stage(options: Options) -> dict[str, int]:
    return {
        "min_size": options.min_size,
        "max_size": options.max_size,
        "topk_candidates": options.candidates,
        "detections_per_img": options.max_detections,
    }


def _ssd(options: Options, lite: bool = False) -> SSD:
    """Liu et al., ECCV 2016; SSDlite as Sandler et al., CVPR 2018, have it."""
    backbone = Extended(maps_of(options.backbone), options.channels, lite=lite)
    levels = len(cast(list[int], backbone.out_channels))
    if lite:
        boxes = DefaultBoxGenerator([[2, 3]] * levels, min_ratio=0.2, max_ratio=0.95)
        how = {"score_thresh": 0.001, "nms_thresh": 0.55, "topk_candidates": 300}
    else:
        boxes = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]])
        how = {}
    given = (backbone.out_channels, boxes.num_anchors_per_location(), options.outputs)
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    return SSD(
        backbone,
        boxes,
        (options.min_size, options.min_size),
        options.outputs,
        head=SSDLiteHead(*given, norm) if lite else SSDHead(*given),
        detections_per_img=options.max_detections,
        **how,
    )


FAMILIES = {
    "fasterrcnn": Family(_two_stages, "P2-P6", 1024),
    "fasterrcnn_v2": Family(_two_stages, "P2-P6", 1024),
    "maskrcnn": Family(_two_stages, "P2-P6", 1024),
    "maskrcnn_v2": Family(_two_stages, "P2-P6", 1024),
    "keypointrcnn": Family(_two_stages, "P2-P6", 1024, 17),
    "retinanet": Family(_retinanet, "P3-P7"),
    "retinanet_v2": Family(_retinanet, "P3-P7"),
    "fcos": Family(_fcos, "P3-P7", anchor_scale=None),
    "ssd": Family(_ssd, None, min_size=300, square=True),
    "ssdlite": Family(partial(_ssd, lite=True), None, min_size=320, square=True),
    "atss": Family(partial(_of_every_place, ATSS, ATSSHead), "P3-P7", anchor_scale=2),
    "gfl": Family(partial(_of_every_place, GFL, GFLHead, score_thresh=0.05), "P3-P7", anchor_scale=2),
    "reppoints": Family(
        partial(_of_every_place, RepPoints, RepPointsHead, score_thresh=0.05, nms_thresh=0.5),
        "P3-P7",
        anchor_scale=None,
    ),
}
"""The families of detectors that :func:`detector` builds, by name."""
OF_32_GROUPS = ("fcos",)  # torchvision makes their heads so
