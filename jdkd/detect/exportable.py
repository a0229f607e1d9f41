"""See :func:`exportable`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.rpn import permute_and_flatten
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign, roi_align

from jdkd.detect.anchors import Anchors, DefaultBoxes
from jdkd.detect.contract import not_scripted
from jdkd.detect.heads import class_head
from jdkd.detect.input_size import input_transform
from jdkd.detect.reppoints import Deformable
from jdkd.detect.roi_scales import fix_roi_scales
from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped

NOTHING = -1.0  # the score of what is no detection; those of detections are above 0
LEAST_SIDE = 1e-2  # pixels, below which torchvision's box heads drop a box
HEAD_OUTPUTS = "cls_logits", "bbox_regression", "bbox_ctrness"  # of a one-stage head, that detections are made of
Suppress = Callable[[Tensor, Tensor, float, int], Tensor]
"""``(boxes [B, n, 4], scores [B, G, n], iou, most)`` -> ``[M, 3]``, the batch, group and box of what is kept.

A box is of the group where its score is above :data:`NOTHING`; of each group at most so many are asked for."""


def exportable(model: nn.Module, suppress: Suppress, *, half: bool = False, final: bool = True) -> Exportable:
    """A detector as a function of tensors alone, which finds what the detector does in evaluation.

    No shape in it but that of what a suppression keeps depends on values: candidates and proposals are a fixed number
    of the best of every level, and what is no detection is kept with a score of 0.

    Args:
        model: of torchvision's make or ours, in torch's wrappers or not; left as it was.
        suppress: the non-maximum suppression.
        half: with weights and features in fp16; boxes and scores are computed in fp32 all the same.
        final: suppress what is found. Without it, all candidates are returned.

    Raises:
        InputError: there is no such form of this detector.
    """
    not_scripted(model, "export")
    inner = unwrapped(model)
    if reason := _why_not(inner, final):
        raise InputError(f"{type(inner).__name__} cannot be exported{reason}.")
    inner = _sampling_by_grids(copy.deepcopy(inner)).eval().requires_grad_(False)
    fix_roi_scales(inner)
    kinds = ((FasterRCNN, TwoStages), (SSD, SingleShot), (nn.Module, OneStage))
    made = next(kind for family, kind in kinds if isinstance(inner, family))(inner, suppress, final)
    return made.to_half() if half else made


def _why_not(model: nn.Module, final: bool) -> str | None:
    """Why a detector cannot be exported, as the sentence goes on, and what can."""
    if not isinstance(model, FCOS | RetinaNet | FasterRCNN | SSD) or class_head(model) is None:
        return (
            ": what follows its heads is known for FCOS, RetinaNet, ATSS, GFL, RepPoints, SSD, SSDlite and Faster and "
            "Mask R-CNN alone; give a detector of these"
        )
    heads = getattr(model, "roi_heads", None)
    if heads is not None and heads.has_keypoint():
        return ": its key points are read off heat maps one by one, by their size; give one without"
    if heads is not None and heads.has_mask() and not final:
        return (
            " with its last non-maximum suppression outside: its masks are made of the boxes that this keeps; export "
            "it with the suppression inside"
        )
    if (channels := len(input_transform(model).image_mean)) != 3:
        return f": it takes images of {channels} channel(s); give one that takes RGB"
    return None


class Exportable(nn.Module):
    """What :func:`exportable` makes.

    Called with ``images`` [N, 3, H, W] in 0..1, resized and padded at the right and the bottom, and ``sizes`` [N, 2],
    height and width of each without the padding. Returns ``boxes`` [N, D, 4] xyxy in the same pixels, ``labels`` [N, D]
    and ``scores`` [N, D], the highest first and 0 where there is no more detection; from a detector with masks also
    ``masks`` [N, D, R, R], of each box.

    Attributes:
        names: of what it returns.
        with_stages: return also what it has computed on the way, whose names are then ``stage_names``.
    """

    def __init__(self, model: nn.Module, suppress: Suppress, final: bool) -> None:
        super().__init__()
        self.model, self.suppress, self.final = model, suppress, final
        self.names: tuple[str, ...] = ("boxes", "labels", "scores")
        self.with_stages = False
        self.stage_names: list[str] = []
        self.dtype = torch.float32
        self.limits: nn.Module = model  # what says the thresholds, and how many detections are kept
        transform = input_transform(model)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(transform, f"image_{name}"), dtype=torch.float32)
            self.register_buffer(name, values.view(-1, 1, 1))

    def to_half(self) -> Exportable:
        self.model.half()
        self.dtype = torch.float16
        return self

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        stages = {"the normalised image": self._normalised(images, sizes)}
        levels = self.model.backbone(stages["the normalised image"].to(self.dtype))
        levels = dict(levels) if isinstance(levels, Mapping) else {"0": levels}
        stages |= {f"level {name}": level for name, level in levels.items()}
        found = self.find(levels, images, sizes, stages)
        self.stage_names = list(stages)
        return (*found, *(stage.float() for stage in stages.values())) if self.with_stages else found

    def find(
        self, levels: dict[str, Tensor], images: Tensor, sizes: Tensor, stages: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """What is in images, of whose features these are the levels; adds to the stages."""
        raise NotImplementedError

    def _normalised(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Of mean 0 and spread 1; the padding is 0."""
        rows, columns = (torch.arange(images.shape[dim], device=images.device) for dim in (2, 3))
        inside = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])  # [N, H, W]
        return torch.where(inside[:, None], (images - self.mean) / self.std, 0.0)

    def _best(self, boxes: Tensor, labels: Tensor, scores: Tensor, groups: Tensor, iou: float, count: int):
        """The detections among candidates ``boxes`` [B, n, 4], ``labels`` and ``scores`` [N, C], for B n = N C.

        ``groups`` [B, G, n] are the scores by group, of which each is suppressed by itself; there are C candidates.
        """
        if self.final:
            most = self.limits.detections_per_img
            scores = _kept(self.suppress, boxes, groups, iou, most).reshape(scores.shape)
            scores, which = scores.topk(min(most, count), dim=1)
        boxes = boxes.reshape(*labels.shape, 4)
        if self.final:
            boxes, labels = _rows(boxes, which), labels.gather(1, which)
        there = scores > 0
        return torch.where(there[..., None], boxes, 0.0), torch.where(there, labels, 0), scores.clamp(min=0)


class OneStage(Exportable):
    """FCOS, RetinaNet and what classifies every place as they do."""

    def __init__(self, model: nn.Module, suppress: Suppress, final: bool) -> None:
        super().__init__(model, suppress, final)
        self.anchors = Anchors(model.anchor_generator)
        self.outputs = class_head(model).outputs

    def find(
        self, levels: dict[str, Tensor], images: Tensor, sizes: Tensor, stages: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        model, parts, classes = self.model, [], self.outputs
        most = model.topk_candidates
        for number, (name, level) in enumerate(levels.items()):
            head = {key: output.float() for key, output in model.head([level]).items() if key in HEAD_OUTPUTS}
            stages |= {f"{key} of level {name}": output for key, output in head.items()}
            scores = head["cls_logits"].sigmoid()  # [N, A, K]
            if "bbox_ctrness" in head:
                scores = (scores * head["bbox_ctrness"].sigmoid()).sqrt()
            scores, which = _top(scores.flatten(1), most)  # [N, k]
            place = torch.where(scores > NOTHING, which.div(classes, rounding_mode="floor"), 0)
            boxes = _decoded(
                model.box_coder, _rows(head["bbox_regression"], place), self.anchors(number, level, images)[place]
            )
            scores = torch.where(scores > model.score_thresh, scores, NOTHING)
            parts.append((_clipped(boxes, sizes), which % classes, scores))
        boxes, labels, scores = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))  # [N, C, 4], [N, C] twice
        every = torch.arange(classes, device=labels.device)
        groups = torch.where(labels[:, None] == every[:, None], scores[:, None], NOTHING)  # [N, K, C]
        return self._best(boxes, labels, scores, groups, model.nms_thresh, most * len(parts))


class SingleShot(Exportable):
    """SSD and SSDlite, which classify every place as one class or the background."""

    def __init__(self, model: nn.Module, suppress: Suppress, final: bool) -> None:
        super().__init__(model, suppress, final)
        self.anchors = DefaultBoxes(model.anchor_generator)
        self.outputs = class_head(model).outputs

    def find(
        self, levels: dict[str, Tensor], images: Tensor, sizes: Tensor, stages: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        model, most, classes = self.model, self.model.topk_candidates, self.outputs - 1
        head = {key: output.float() for key, output in model.head(list(levels.values())).items()}
        stages |= head
        codes = head["bbox_regression"]  # [N, A, 4]
        anchors = torch.cat([self.anchors(number, level, images) for number, level in enumerate(levels.values())])
        boxes = _clipped(_decoded(model.box_coder, codes, anchors.expand_as(codes)), sizes)
        scores = head["cls_logits"].softmax(dim=-1)[..., 1:].transpose(1, 2)  # [N, K, A]
        scores, which = _top(scores.flatten(0, 1), most)  # [N K, k]
        place = torch.where(scores > NOTHING, which, 0)
        scores = torch.where(scores > model.score_thresh, scores, NOTHING)
        boxes = _rows(boxes, place.reshape(-1, classes * most)).reshape(-1, most, 4)  # [N K, k, 4]
        groups, scores = scores[:, None], scores.reshape(-1, classes * most)
        labels = torch.arange(1, self.outputs, device=boxes.device)[:, None].expand(classes, most).reshape(1, -1)
        return self._best(boxes, labels.expand_as(scores), scores, groups, model.nms_thresh, classes * most)


class TwoStages(Exportable):
    """Faster and Mask R-CNN."""

    def __init__(self, model: nn.Module, suppress: Suppress, final: bool) -> None:
        super().__init__(model, suppress, final)
        self.anchors = Anchors(model.rpn.anchor_generator)
        self.limits = model.roi_heads
        if model.roi_heads.has_mask():
            self.names = (*self.names, "masks")

    def find(
        self, levels: dict[str, Tensor], images: Tensor, sizes: Tensor, stages: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        heads = self.model.roi_heads
        proposals, there = self._proposed(levels, images, sizes, stages)  # [N, P, 4], [N, P]
        stages["proposals"] = proposals
        count = proposals.shape[1]
        pooled = _pooled(heads.box_roi_pool, levels, proposals).to(self.dtype)
        logits, codes = (output.float() for output in heads.box_predictor(heads.box_head(pooled)))  # [N P, K (4)]
        classes = heads.box_predictor.cls_score.out_features
        boxes = heads.box_coder.decode_single(codes, proposals.reshape(-1, 4)).reshape(-1, count, classes, 4)
        boxes = _clipped(boxes[:, :, 1:].transpose(1, 2).flatten(1, 2), sizes)  # [N, (K - 1) P, 4]
        scores = logits.softmax(dim=-1).reshape(-1, count, classes)[:, :, 1:].transpose(1, 2)  # [N, K - 1, P]
        scores = torch.where((scores > heads.score_thresh) & there[:, None], scores, NOTHING).flatten(1)
        scores = torch.where(_sides(boxes) >= LEAST_SIDE, scores, NOTHING)
        labels = torch.arange(1, classes, device=boxes.device)[:, None].expand(classes - 1, self.kept).reshape(1, -1)
        labels = labels.expand_as(scores)
        of_class = boxes.reshape(-1, self.kept, 4)  # [N (K - 1), P, 4]
        groups = scores.reshape(-1, 1, self.kept)
        found = self._best(of_class, labels, scores, groups, heads.nms_thresh, self.kept * (classes - 1))
        return (*found, self._masks(levels, *found[:2])) if heads.has_mask() else found

    @property
    def kept(self) -> int:
        """Proposals of an image."""
        rpn = self.model.rpn
        return min(rpn.post_nms_top_n(), rpn.pre_nms_top_n() * self.anchors.levels)

    def _proposed(
        self, levels: dict[str, Tensor], images: Tensor, sizes: Tensor, stages: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The proposals, and which of them are any."""
        rpn, parts = self.model.rpn, []
        most = rpn.pre_nms_top_n()
        for number, (name, level) in enumerate(levels.items()):
            (logits,), (codes,) = rpn.head([level])
            logits, codes = logits.float(), codes.float()
            stages |= {f"objectness of level {name}": logits, f"bbox_deltas of level {name}": codes}
            batch, each, height, width = logits.shape
            logits = permute_and_flatten(logits, batch, each, 1, height, width).flatten(1)  # [N, A]
            codes = permute_and_flatten(codes, batch, each, 4, height, width)  # [N, A, 4]
            logits, which = _top(logits, most, -torch.inf)
            real = logits > -torch.inf
            place = torch.where(real, which, 0)
            boxes = _decoded(rpn.box_coder, _rows(codes, place), self.anchors(number, level, images)[place])
            boxes, scores = _clipped(boxes, sizes), logits.sigmoid()
            real = real & (_sides(boxes) >= rpn.min_size) & (scores >= rpn.score_thresh)
            parts.append((boxes, torch.where(real, scores, NOTHING)))
        boxes, scores = (torch.stack(each, dim=1) for each in zip(*parts, strict=True))  # [N, L, k, 4], [N, L, k]
        kept = _kept(self.suppress, boxes.flatten(0, 1), scores.flatten(0, 1)[:, None], rpn.nms_thresh, self.kept)
        scores, which = kept.reshape(-1, most * len(parts)).topk(self.kept, dim=1)
        there = scores > NOTHING
        return torch.where(there[..., None], _rows(boxes.flatten(1, 2), which), 0.0), there

    def _masks(self, levels: dict[str, Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """How sure each pixel of every box is, ``[N, D, R, R]``."""
        heads = self.model.roi_heads
        pooled = _pooled(heads.mask_roi_pool, levels, boxes).to(self.dtype)
        logits = heads.mask_predictor(heads.mask_head(pooled)).float()  # [N D, K, R, R]
        side = logits.shape[-1]
        own = labels.reshape(-1, 1, 1, 1).expand(-1, 1, side, side)
        return logits.gather(1, own).sigmoid().reshape(-1, boxes.shape[1], side, side)


class SampledByGrid(nn.Module):
    """A deformable convolution by bilinear sampling of a grid, which every runtime has.

    Args:
        conv: of one group and stride 1.
    """

    def __init__(self, conv: Deformable) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, feature: Tensor, offset: Tensor) -> Tensor:  # [N, C, H, W], [N, 2 k k, H, W] as y and x in turn
        conv, dtype = self.conv, feature.dtype
        feature, offset, weight, bias = (each.float() for each in (feature, offset, conv.weight, conv.bias))
        (batch, channels, height, width), taps = feature.shape, conv.kernel_size[0] * conv.kernel_size[1]
        tap = torch.arange(taps, device=feature.device)[:, None, None]  # [T, 1, 1]
        row, column = tap.div(conv.kernel_size[1], rounding_mode="floor"), tap % conv.kernel_size[1]
        y = torch.arange(height, device=feature.device)[:, None] + (row * conv.dilation[0] - conv.padding[0])
        x = torch.arange(width, device=feature.device) + (column * conv.dilation[1] - conv.padding[1])
        offset = offset.reshape(batch, taps, 2, height, width)
        y, x = y + offset[:, :, 0], x + offset[:, :, 1]  # [N, T, H, W], in pixels
        grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1).flatten(1, 2)
        found = F.grid_sample(feature, grid, align_corners=False).reshape(batch, channels, taps, height, width)
        weight = weight.flatten(2).transpose(1, 2).flatten(1)[:, :, None, None]  # [O, T C, 1, 1]
        return F.conv2d(found.transpose(1, 2).flatten(1, 2), weight, bias).to(dtype)


def _sampling_by_grids(model: nn.Module) -> nn.Module:
    for path, module in list(model.named_modules()):
        if isinstance(module, Deformable):
            model.set_submodule(path, SampledByGrid(module))
    return model


def _top(scores: Tensor, most: int, least: float = NOTHING) -> tuple[Tensor, Tensor]:
    """So many of the highest of each row, and where they were: ``[N, A]`` to twice ``[N, k]``; ``least`` fills up."""
    return F.pad(scores, (0, most), value=least).topk(most, dim=1)


def _rows(values: Tensor, which: Tensor) -> Tensor:
    """Rows of ``[N, A, 4]`` by their numbers ``[N, k]``: ``[N, k, 4]``."""
    return values.gather(1, which[..., None].expand(-1, -1, 4))


def _decoded(coder: nn.Module, codes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes ``[N, k, 4]`` of codes and anchors of the same shape."""
    decode = getattr(coder, "decode_single", None) or coder.decode
    return decode(codes.reshape(-1, 4), anchors.reshape(-1, 4)).reshape(codes.shape)


def _clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes ``[N, k, 4]`` cut to images of so many rows and columns ``[N, 2]``."""
    ends = sizes.flip(1).to(boxes.dtype)[:, None]  # [N, 1, 2], x and y
    return torch.minimum(boxes.clamp(min=0), torch.cat((ends, ends), dim=2))


def _sides(boxes: Tensor) -> Tensor:
    """The shorter side of each box: ``[N, k, 4]`` to ``[N, k]``."""
    return (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1)


def _kept(suppress: Suppress, boxes: Tensor, groups: Tensor, iou: float, most: int) -> Tensor:
    """The score of each box ``[B, n]`` that a suppression keeps; see :data:`Suppress`."""
    kept = suppress(boxes, groups, iou, most)
    scores = groups.amax(dim=1)
    stays = torch.zeros_like(scores).index_put((kept[:, 0], kept[:, 2]), torch.ones_like(kept[:, 0]).to(scores.dtype))
    return torch.where(stays > 0, scores, NOTHING)


def _pooled(pool: MultiScaleRoIAlign, levels: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
    """What torchvision's pool makes of boxes ``[N, M, 4]``: ``[N M, C, R, R]`` in fp32."""
    read = [level.float() for name, level in levels.items() if name in pool.featmap_names]
    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None, None]
    regions = torch.cat((image.expand(-1, boxes.shape[1], 1), boxes), dim=2).reshape(-1, 5)
    how = {"output_size": pool.output_size, "sampling_ratio": pool.sampling_ratio}
    if len(read) == 1:
        return roi_align(read[0], regions, spatial_scale=pool.scales[0], **how)
    number = pool.map_levels([regions[:, 1:]])
    found = regions.new_zeros(regions.shape[0], read[0].shape[1], *pool.output_size)
    for place, (level, scale) in enumerate(zip(read, pool.scales, strict=True)):
        (here,) = torch.where(number == place)
        found = found.index_put((here,), roi_align(level, regions[here], spatial_scale=scale, **how))
    return found
