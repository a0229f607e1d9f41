"""Small detectors that the tests of several rooms share."""

import sys

import torch

from jdkd.detect import DetectorSpec, Stage, build

CLASSES = ("cat", "dog", "bird")


def small_spec(block: str = "basic", **changes) -> DetectorSpec:
    inner = {"basic": ((8,), (16,)), "bottleneck": ((8, 8), (16, 8))}[block]
    stages = tuple(Stage(width, inner) for width in (16, 16, 24, 32))
    spec = DetectorSpec(
        CLASSES, stages, block, stem=8, fpn=16, box_head=24, min_size=64, max_size=96,
        anchors=(8, 16, 32, 64, 128), proposals=50, rois=32,
    )  # fmt: skip
    return spec.replace(**changes)


def detector(spec: DetectorSpec, seed: int = 0) -> torch.nn.Module:
    """A detector whose normalisation statistics and affine parameters are anything but their defaults."""
    torch.manual_seed(seed)
    model = build(spec)
    for name, tensor in model.state_dict().items():
        if tensor.dtype.is_floating_point and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "running_var")) else tensor.uniform_(-0.2, 0.2)
    return model.eval()


def mask_detector(seed: int = 0, classes: tuple[str, ...] = CLASSES) -> torch.nn.Module:
    """A small detector with a mask head of torchvision's; also what `package.module:function` makes."""
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(seed)
    spec = small_spec(classes=tuple(classes))
    model = build(spec)
    del model.architecture
    heads = model.roi_heads
    heads.mask_roi_pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=14, sampling_ratio=2)
    heads.mask_head = MaskRCNNHeads(spec.fpn, (16,), dilation=1)
    heads.mask_predictor = MaskRCNNPredictor(16, 16, len(spec.classes) + 1)
    return model


@torch.no_grad()
def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """Everything that leaves the convolutional part and both heads, for one batch."""
    model.eval()
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    features = model.backbone(x)
    boxes = [torch.tensor([[2.0, 3.0, 40.0, 50.0], [10.0, 8.0, 30.0, 20.0]])] * 2
    regions = model.roi_heads.box_roi_pool(features, boxes, [(64, 96)] * 2)
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(regions))
    objectness, proposals = model.rpn.head(list(features.values()))
    return [logits, deltas, *objectness, *proposals]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def hide_own_detectors(patch) -> None:
    """From now on every import of ``jdkd.detect``, or from it, fails, as where it is not installed."""
    for name in [name for name in sys.modules if name.startswith("jdkd.detect")]:
        patch.setitem(sys.modules, name, None)
