"""Every convolution of Faster R-CNNs over ResNets, with the size of the image that it meets.

The shapes come of the detectors themselves: one is built without memory, features and region proposals run over one
800x1344 image, to which 800x1333 is padded, and every convolution that is called is noted. A side of a layer is elastic
if :func:`jdkd.detect.read` has it in a group; the image's three channels and the predictions are in none.
P7, which one-stage detectors have and these do not, is there with the 3x3 convolution of a head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jdkd.detect import detector, read

BACKBONES = ("resnet50", "resnet101")
P6, P7 = "P6 rpn 3x3 256->256", "P7 head 3x3 256->256"
IMAGE = (800, 1344)


@dataclass(frozen=True)
class ConvShape:
    """A convolution and the image it meets, square in everything but the image.

    Args:
        in_channels, out_channels: of the whole layer.
        kernel, stride, padding: in taps and pixels.
        size: height and width of the image that goes in, in pixels.
        bias: whether it has one.
        elastic: whether its input and its output channels belong to a group.
    """

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    size: tuple[int, int]
    bias: bool
    elastic: tuple[bool, bool]

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in self.size)
        return height, width

    def active(self, width: float) -> tuple[int, int]:
        """Input and output channels at a share of the width; a side that is not elastic stays whole."""
        inputs, outputs = (
            int(maximum * width) if elastic else maximum
            for maximum, elastic in zip((self.in_channels, self.out_channels), self.elastic, strict=True)
        )
        return inputs, outputs


@dataclass(frozen=True)
class LayerCall:
    """A convolution that a detector calls, by the path of its module."""

    module: str
    shape: ConvShape

    @property
    def label(self) -> str:
        """Where it is, and what: ``layer2 3x3 128->128``, ``P3 fpn 3x3 256->256``."""
        shape, (room, *path) = self.shape, self.module.removeprefix("backbone.").split(".")
        if room == "body":
            place = path[0] if len(path) > 1 else "stem"
        else:
            place = f"P{round(math.log2(IMAGE[1] / shape.size[1]))} {room}"
        stride = f" /{shape.stride}" if shape.stride > 1 else ""
        return f"{place} {shape.kernel}x{shape.kernel} {shape.in_channels}->{shape.out_channels}{stride}"


@functools.cache
def calls(name: str) -> tuple[LayerCall, ...]:
    """Every call of a convolution by backbone, pyramid and region proposals for one image, in order.

    Args:
        name: of the backbone, in torchvision.
    """
    make, found = functools.partial(detector, "fasterrcnn", name, 1), []
    with torch.device("meta"):
        model, image = make(), torch.empty(1, 3, *IMAGE)
    sides = {(slot.tensor, slot.dim) for group in read(make()).groups for slot in group.slots}

    def note(conv: nn.Conv2d, given: Sequence[Tensor], output: Tensor, module: str) -> None:
        elastic = ((f"{module}.weight", 1) in sides, (f"{module}.weight", 0) in sides)
        square = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        size = (given[0].shape[2], given[0].shape[3])
        shape = ConvShape(conv.in_channels, conv.out_channels, *square, size, conv.bias is not None, elastic)
        found.append(LayerCall(module, shape))

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(functools.partial(note, module=path))
    model.rpn.head([*model.backbone(image).values()])
    return tuple(found)


def backbone(name: str) -> tuple[ConvShape, ...]:
    """The convolutions of a backbone without the pyramid, in order."""
    return tuple(call.shape for call in calls(name) if call.module.startswith("backbone.body."))


@functools.cache
def distinct() -> dict[str, ConvShape]:
    """Every distinct shape over all :data:`BACKBONES`, by the label of its first call, and that of P7.

    R101-FPN repeats layers of R50-FPN and adds no shape; the region proposals share the pyramid's 3x3 up to P5.
    """
    first: dict[ConvShape, str] = {}
    for name in BACKBONES:
        for call in calls(name):
            first.setdefault(call.shape, call.label)
    found = {label: shape for shape, label in first.items()}
    height, width = found[P6].size
    return {**found, P7: dataclasses.replace(found[P6], size=(math.ceil(height / 2), math.ceil(width / 2)))}
