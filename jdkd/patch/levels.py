"""Heads that run once over all levels of a pyramid, laid out side by side on one canvas: see :class:`OverLevels`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.latency.folding import is_affine, is_hooked
from jdkd.patch.overrides import Override

POINTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Identity, nn.Dropout)
LAYOUTS = 8  # of sizes of images, that a head keeps

_open = threading.local()


class Layout:
    """Where the levels lie on a canvas: the first above, the others below it, one beside the other.

    Args:
        sizes: heights and widths of the levels.
        gap: cells between them, so many as a convolution reaches.
        device: of the mask.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], gap: int, device: torch.device) -> None:
        (height, width), *others = sizes
        self.corners, across = [(0, 0)], 0
        for _, each in others:
            self.corners.append((height + gap, across))
            across += each + gap
        self.sizes = list(sizes)
        tallest = max((each for each, _ in others), default=-gap)
        self.size = height + gap + tallest, max(width, across - gap)
        self.between = torch.ones(self.size, dtype=torch.bool, device=device)
        for place in self.places():
            self.between[place] = False

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each level."""
        for (top, left), (height, width) in zip(self.corners, self.sizes, strict=True):
            yield slice(top, top + height), slice(left, left + width)


class Canvas:
    """All levels in one tensor, and what layers have made of it.

    Args:
        values: ``[N, C, H, W]``.
        layout: where levels lie on it.
    """

    def __init__(self, values: Tensor, layout: Layout) -> None:
        self.values, self.layout = values, layout
        self.parts = [values[:, :, rows, columns] for rows, columns in layout.places()]
        self.made: dict[int, Canvas] = {}

    @classmethod
    def of(cls, levels: Sequence[Tensor], layout: Layout) -> Canvas:
        """Lays levels out, in the memory format of the first."""
        first = levels[0]
        wanted = (*first.shape[:2], *layout.size)
        channels_last = first.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if channels_last else torch.contiguous_format
        canvas = cls(torch.zeros(wanted, dtype=first.dtype, device=first.device).contiguous(memory_format=form), layout)
        for part, level in zip(canvas.parts, levels, strict=True):
            part.copy_(level)
        return canvas


class OverLevels(Override):
    """A head that is called with all levels of a pyramid, and asks its layers for one after the other.

    Its own code runs as it is. Its levels are parts of one canvas; the first time that a layer is called with a part,
    it runs over the whole canvas, and its later calls find their parts of the result.

    Args:
        head: takes a list of levels ``[N, C, H, W]`` first.
        gap: cells between levels, as :func:`reach` tells.
    """

    def __init__(self, head: nn.Module, gap: int) -> None:
        super().__init__(head)
        self._gap = gap
        self._layouts: OrderedDict[Any, Layout] = OrderedDict()

    def run(self, levels: Any, *args: Any, **named: Any) -> Any:
        if not are_levels(levels) or getattr(_open, "parts", None) is not None:
            return self.inner(levels, *args, **named)
        canvas = Canvas.of(levels, self._layout(levels))
        _open.parts = dict(zip(map(id, canvas.parts), [(canvas, n) for n in range(len(levels))], strict=True))
        try:
            return self.inner(list(canvas.parts), *args, **named)
        finally:
            _open.parts = None

    def _layout(self, levels: Sequence[Tensor]) -> Layout:
        key = tuple(tuple(level.shape[2:]) for level in levels), levels[0].device
        if key not in self._layouts:
            self._layouts[key] = Layout(key[0], self._gap, key[1])
        self._layouts.move_to_end(key)
        while len(self._layouts) > LAYOUTS:
            self._layouts.popitem(last=False)
        return self._layouts[key]


class OverCanvas(Override):
    """A layer of such a head.

    Args:
        layer: keeps the size of what it is called with, and looks no further than the gap.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._inside = list(layer.modules())[1:]

    def run(self, x: Tensor) -> Tensor:
        parts = getattr(_open, "parts", None)
        if parts is None or id(x) not in parts or any(map(is_hooked, self._inside)):
            return self.inner(x)
        canvas, number = parts[id(x)]
        if id(self) not in canvas.made:
            if reach(self.module):
                canvas.values.masked_fill_(canvas.layout.between, 0)
            made = canvas.made[id(self)] = Canvas(self.inner(canvas.values), canvas.layout)
            parts.update((id(part), (made, n)) for n, part in enumerate(made.parts))
        return canvas.made[id(self)].parts[number]


def are_levels(value: Any) -> bool:
    """Whether something is a list of two or more levels ``[N, C, H, W]`` that differ in size alone."""
    if not isinstance(value, list | tuple) or len(value) < 2:
        return False
    if not all(isinstance(level, Tensor) and level.dim() == 4 and level.numel() for level in value):
        return False
    return len({(level.shape[:2], level.dtype, level.device) for level in value}) == 1


def layers_over(head: nn.Module) -> list[str]:
    """The outermost parts of a head that may run over a canvas, by name; none where no convolution is among them."""
    found: list[str] = []

    def look(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if reach(child) is not None:
                found.append(f"{prefix}{name}")
            else:
                look(child, f"{prefix}{name}.")

    look(head, "")
    return found if any(type(m) is nn.Conv2d for name in found for m in head.get_submodule(name).modules()) else []


def reach(layer: nn.Module) -> int | None:
    """How many cells away a layer looks, of a size that it keeps; None of one that may not run over a canvas."""
    if type(layer) is nn.Conv2d:
        return _reach(layer)
    if type(layer) in POINTWISE or is_affine(layer):
        return 0
    if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward and len(layer):
        first, *others = map(reach, layer)
        return first if all(other == 0 for other in others) else None
    return None


def _reach(conv: nn.Conv2d) -> int | None:
    if conv.stride != (1, 1) or conv.padding_mode != "zeros" or any(taps % 2 == 0 for taps in conv.kernel_size):
        return None
    far = [dilation * (taps - 1) // 2 for dilation, taps in zip(conv.dilation, conv.kernel_size, strict=True)]
    return max(far) if conv.padding == "same" or list(conv.padding) == far else None
