"""Backbones of torchvision and timm, under their own parameter names, with an FPN or further maps over them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import Conv2dNormActivation

from jdkd.errors import InputError, one_of_these, said

STRIDES = (4, 8, 16, 32)  # of the maps C2 to C5
PYRAMIDS = {"P2-P6": (4, 8, 16, 32, 64), "P3-P7": (8, 16, 32, 64, 128)}  # strides
TIMM = "timm:"
# The children whose outputs are C2 to C5: by how the name begins, the longer beginning first where two fit. The last
# convolution of the mobile networks, which widens the map for a classifier, is left out.
TAPS = {
    "resnet": ("layer1", "layer2", "layer3", "layer4"),
    "resnext": ("layer1", "layer2", "layer3", "layer4"),
    "wide_resnet": ("layer1", "layer2", "layer3", "layer4"),
    "regnet": ("block1", "block2", "block3", "block4"),
    "mobilenet_v2": ("3", "6", "13", "17"),
    "mobilenet_v3_large": ("3", "6", "12", "15"),
    "mobilenet_v3_small": ("1", "3", "8", "11"),
    "efficientnet": ("2", "3", "5", "7"),
    "efficientnet_v2_s": ("2", "3", "5", "6"),
    "swin": ("1", "3", "5", "7"),
    "convnext": ("1", "3", "5", "7"),
}
FLAT = ("mobilenet",)  # their blocks are children, not the stages


class Maps(NamedTuple):
    """A backbone without a pyramid.

    Args:
        body: returns its maps by name, or as a list.
        taken: names or places of C2 to C5 in what it returns.
        channels: of them.
        channels_last: whether they are ``[N, H, W, C]``, as those of a Swin are.
    """

    body: nn.Module
    taken: tuple[str | int, ...]
    channels: tuple[int, ...]
    channels_last: bool = False

    def finest(self, stride: int) -> Maps:
        """Without the maps finer than ``stride``."""
        first = STRIDES.index(stride)
        return self._replace(taken=self.taken[first:], channels=self.channels[first:])


def backbone_names() -> list[str]:
    """torchvision's backbones that have maps of strides 4, 8, 16 and 32."""
    return [name for name in models.list_models(module=models) if _taps(name)]


def maps_of(name: str) -> Maps:
    """A backbone by its name, with fresh weights.

    Args:
        name: of torchvision's :func:`backbone_names`, or ``"timm:NAME"``.

    Raises:
        InputError: it is neither, timm is not installed, or its backbone has no maps of these strides.
    """
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM))
    if name not in (known := backbone_names()):
        raise InputError(
            f"backbone {name!r} is none of {', '.join(known)}, nor {TIMM}NAME; {one_of_these(name, known)}."
        )
    taps = _taps(name)
    network = models.get_model_builder(name)(weights=None)
    children = dict(_children(network))
    if name.startswith(FLAT):
        children = _staged(children, taps)
        taps = tuple(children)
    channels = tuple(_width(children[tap]) for tap in taps)
    getter = IntermediateLayerGetter(nn.Sequential(OrderedDict(children)), {tap: tap for tap in taps})
    return Maps(getter, taps, channels, channels_last=name.startswith("swin"))


def _taps(name: str) -> tuple[str, ...]:
    fitting = [start for start in TAPS if name.startswith(start)]
    return TAPS[max(fitting, key=len)] if fitting else ()


def _children(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers in the order in which they run, without the classifier."""
    if hasattr(network, "features"):
        yield from network.features.named_children()
    elif hasattr(network, "trunk_output"):
        yield "stem", network.stem
        yield from network.trunk_output.named_children()
    else:
        yield from network.named_children()


def _staged(children: Mapping[str, nn.Module], taps: Sequence[str]) -> dict[str, nn.Module]:
    """Runs of children that end with a tap, so that blocks come and go inside a stage; they keep their names."""
    stages: dict[str, nn.Module] = {}
    run: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in children.items():
        run[name] = child
        if name in taps:
            stages[f"stage{len(stages) + 1}"] = nn.Sequential(run)
            run = OrderedDict()
    return stages


def _width(stage: nn.Module) -> int:
    """Channels that a stage returns: what its last convolution or linear layer makes."""
    widths = [
        module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        for module in stage.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    return widths[-1]


def _of_timm(name: str) -> Maps:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InputError(
            f"backbone '{TIMM}{name}' needs the package {error.name}; install it with: pip install 'jdkd[timm]'"
        ) from None
    try:
        body = timm.create_model(name, features_only=True, pretrained=False)
    except Exception as error:  # whatever timm raises of a name that it does not know, or that has no maps
        raise InputError(
            f"timm makes no features_only model {name!r} ({said(error)}); give one of timm.list_models() that has them."
        ) from error
    strides = list(body.feature_info.reduction())
    if not set(STRIDES) <= set(strides):
        raise InputError(
            f"backbone '{TIMM}{name}' has maps of strides {', '.join(map(str, strides))}, and a pyramid takes "
            f"{', '.join(map(str, STRIDES))}; give one that has these."
        )
    taken = tuple(strides.index(stride) for stride in STRIDES)
    channels = tuple(body.feature_info.channels()[place] for place in taken)
    return Maps(body, taken, channels, "NHWC" in str(getattr(body, "output_fmt", "")))


class Backbone(nn.Module):
    """What a detector's heads read: the maps of a body, finest first, keyed "0", "1" and so on.

    Attributes:
        strides: pixels of the image per cell of each level, by its key.
        out_channels: of each level, as torchvision's heads ask for them.
    """

    out_channels: int | list[int]

    def __init__(self, maps: Maps, strides: Mapping[str, int]) -> None:
        super().__init__()
        self.body = maps.body
        self.taken, self.channels_last, self.strides = maps.taken, maps.channels_last, dict(strides)

    def maps(self, x: Tensor) -> OrderedDict[str, Tensor]:  # [N, 3, H, W] -> [N, C, H / stride, W / stride] each
        found = self.body(x)
        levels = OrderedDict((str(level), found[place]) for level, place in enumerate(self.taken))
        if self.channels_last:
            return OrderedDict((name, level.permute(0, 3, 1, 2).contiguous()) for name, level in levels.items())
        return levels


class Pyramid(Backbone):
    """A body and an FPN over its maps (Lin et al., CVPR 2017): P2-P6, or P3-P7 as RetinaNet and FCOS have it.

    Args:
        maps: of :func:`maps_of`.
        pyramid: ``"P2-P6"``, whose last level is a pooled one, or ``"P3-P7"``, whose last two are convolved.
        channels: of every level.
        norm: of the FPN's convolutions; none by default.
        from_c5: whether P6 of ``"P3-P7"`` is made of C5, instead of P5.
    """

    def __init__(
        self,
        maps: Maps,
        pyramid: str,
        channels: int,
        norm: Callable[..., nn.Module] | None = None,
        *,
        from_c5: bool = False,
    ) -> None:
        strides = PYRAMIDS[pyramid]
        maps = maps.finest(strides[0])
        last = ["pool"] if pyramid == "P2-P6" else ["p6", "p7"]
        names = [*map(str, range(len(maps.taken))), *last]
        super().__init__(maps, dict(zip(names, strides, strict=True)))
        source = maps.channels[-1] if from_c5 else channels
        more = LastLevelMaxPool() if pyramid == "P2-P6" else CoarsestLevels(source, channels)
        self.fpn = FeaturePyramidNetwork([*maps.channels], channels, more, norm)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.maps(x))


class CoarsestLevels(LastLevelP6P7):
    """P6 and P7, in the precision of their weights on a CPU, where autocast costs nothing to leave.

    The bfloat16 gradient of a strided 3x3 filter over an image one position wide, as P6 is of 64 pixels, is not written
    everywhere by oneDNN (PyTorch 2.11): where padding alone is seen it is what lay in memory.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        if p[-1].device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(p, c, names)
        dtype, own = p[-1].dtype, self.p6.weight.dtype
        with torch.autocast("cpu", enabled=False):
            levels, names = super().forward([p[-1].to(own)], [c[-1].to(own)], names)
        return [*p, *(level.to(dtype) for level in levels[1:])], names


@contextmanager
def steady_coarsest(model: nn.Module) -> Iterator[None]:
    """Lets torchvision's own P6 and P7, where a model has them, do what :class:`CoarsestLevels` do for a while."""
    own = [module for module in model.modules() if type(module) is LastLevelP6P7]
    try:
        for module in own:
            module.__class__ = CoarsestLevels
        yield
    finally:
        for module in own:
            module.__class__ = LastLevelP6P7


class Extended(Backbone):
    """A body's last maps and further, ever coarser ones, as SSD has them (Liu et al., ECCV 2016): six in all.

    Args:
        maps: of :func:`maps_of`.
        channels: of the further maps, but for the first, which has twice as many, and the last, which has half.
        lite: whether they begin at stride 16 and are made by depthwise convolutions (Sandler et al., CVPR 2018).
    """

    def __init__(self, maps: Maps, channels: int, *, lite: bool) -> None:
        maps = maps.finest(16 if lite else 8)
        widths = (2 * channels, channels, channels, channels // 2)[: 6 - len(maps.channels)]
        super().__init__(maps, {str(level): (16 if lite else 8) << level for level in range(6)})
        sources = (maps.channels[-1], *widths)
        self.extra = nn.ModuleList(_coarser(*pair, lite) for pair in zip(sources, widths, strict=False))
        self.out_channels = [*maps.channels, *widths]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = self.maps(x)
        x = next(reversed(levels.values()))
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self._extended(levels, x)
        with torch.autocast("cpu", enabled=False):  # as CoarsestLevels, whose fault these strided filters share
            found = self._extended(levels, x.to(next(self.extra.parameters()).dtype))
        return OrderedDict((name, level.to(x.dtype)) for name, level in found.items())

    def _extended(self, levels: OrderedDict[str, Tensor], x: Tensor) -> OrderedDict[str, Tensor]:
        for block in self.extra:
            x = block(x)
            levels[str(len(levels))] = x
        return levels


def _coarser(width: int, out: int, lite: bool) -> nn.Sequential:
    """A map of half the size: 1x1, then 3x3 with stride 2, depthwise and followed by another 1x1 where it is lite."""
    inner = out // 2
    if not lite:
        return nn.Sequential(Conv2dNormActivation(width, inner, 1), Conv2dNormActivation(inner, out, 3, 2))
    how = {"activation_layer": nn.ReLU6}
    return nn.Sequential(
        Conv2dNormActivation(width, inner, 1, **how),
        Conv2dNormActivation(inner, inner, 3, 2, groups=inner, **how),
        Conv2dNormActivation(inner, out, 1, **how),
    )
