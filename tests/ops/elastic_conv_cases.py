"""What the tests of the elastic convolution share: a problem, its three evaluations and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd.functional import elastic_conv2d
from jdkd.ops.active_channels import ChannelsLike
from jdkd.ops.kernel_size import pair
from jdkd.reference import elastic_conv as reference


@dataclass(frozen=True)
class Problem:
    """One elastic convolution; ``inputs`` and ``outputs`` as a user gives them."""

    inputs: ChannelsLike = None
    outputs: ChannelsLike = None
    weight: tuple[int, int, int, int] = (7, 5, 3, 3)  # Cout_max, Cin_max / groups, kh, kw
    image: tuple[int, int, int] = (2, 6, 7)  # N, H, W
    window: dict = field(default_factory=dict)  # stride, padding, dilation
    kernel: int | tuple[int, int] | None = None
    bias: bool = True
    channels_last: bool = False
    seed: int = 0
    groups: int = 1

    @property
    def kept(self) -> list[int]:
        """Active groups, in order, by whichever side says so."""
        side, size = (
            (self.outputs, self.weight[0] // self.groups) if self.inputs is None else (self.inputs, self.weight[1])
        )
        return list(dict.fromkeys(index // size for index in listed(side, size * self.groups)))

    @property
    def rows(self) -> list[int]:
        return (
            listed(self.outputs, self.weight[0]) if self.groups == 1 else self._of_kept(self.weight[0] // self.groups)
        )

    @property
    def columns(self) -> list[int]:
        return listed(self.inputs, self.weight[1]) if self.groups == 1 else self._of_kept(self.weight[1])

    def _of_kept(self, size: int) -> list[int]:
        return [group * size + k for group in self.kept for k in range(size)]

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor | None]:
        """Draws x ``[N, Cin, H, W]``, weight ``[Cout_max, Cin_max, kh, kw]`` and bias ``[Cout_max]``."""
        generator = torch.Generator().manual_seed(self.seed)
        n, height, width = self.image
        shapes = [(n, len(self.columns), height, width), self.weight, self.weight[:1]]
        drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        if self.channels_last:
            drawn[:2] = [tensor.contiguous(memory_format=torch.channels_last) for tensor in drawn[:2]]
        return drawn if self.bias else [*drawn[:2], None]

    @property
    def crop(self) -> list[int]:
        """Inactive taps on each side, vertically and horizontally."""
        full = self.weight[2:]
        return [(n - k) // 2 for n, k in zip(full, pair(self.kernel or full), strict=True)]

    @property
    def centre(self) -> Tensor:
        """``[kh, kw]``, true where the kernel is active."""
        (height, width), (above, left) = self.weight[2:], self.crop
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[above : height - above, left : width - left] = True
        return inside

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The whole kernel under the whole padding, zero where it is inactive."""
        weight = torch.where(self.centre.to(weight.device), weight, 0)
        if self.groups > 1:
            weight = self._ungrouped(weight)
        return reference.elastic_conv2d(
            x, weight, bias, in_channels=self.columns, out_channels=self.rows, **self.window
        )

    def _ungrouped(self, weight: Tensor) -> Tensor:
        """``[Cout_max, Cin_max, kh, kw]``, zero between a group and another."""
        per = weight.shape[1]
        blocks = weight.chunk(self.groups)
        return torch.cat(
            [F.pad(block, (0, 0, 0, 0, per * k, per * (self.groups - 1 - k))) for k, block in enumerate(blocks)]
        )

    def sliced(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """ATen's convolution of what is active."""
        (height, width), (above, left) = self.weight[2:], self.crop
        columns = self.columns if self.groups == 1 else slice(None)
        part = weight[self.rows][:, columns, above : height - above, left : width - left]
        padding, dilation = pair(self.window.get("padding", 0)), pair(self.window.get("dilation", 1))
        less = [p - d * c for p, d, c in zip(padding, dilation, self.crop, strict=True)]
        bias = None if bias is None else bias[self.rows]
        groups = 1 if self.groups == 1 else len(self.kept)
        if part.shape[2:] == (1, 1) and less == [0, 0]:  # oneDNN errs where this is strided, see convolve
            rows, columns = pair(self.window.get("stride", 1))
            return F.conv2d(x[..., ::rows, ::columns], part, bias, groups=groups)
        return F.conv2d(x, part, bias, **{**self.window, "padding": less}, groups=groups)

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        active = {
            "in_channels": self.inputs,
            "out_channels": self.outputs,
            "kernel_size": self.kernel,
            "groups": self.groups,
        }
        return elastic_conv2d(x, weight, bias, **active, **self.window)


FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close_as_eager(value: Tensor, eager: Tensor, exact: Tensor, name: str) -> None:
    """The 2x rule, relative to the largest exact value."""
    scale = exact.abs().max()
    error, allowed = ((t.double() - exact).abs().max() for t in (value, eager.to(value.dtype)))
    assert error <= 2 * allowed + FLOOR[value.dtype] * scale, f"{name}: {error:.2e}, eager {allowed:.2e}"


def listed(value: ChannelsLike, maximum: int) -> list[int]:
    if value is None:
        return list(range(maximum))
    return list(range(value)) if isinstance(value, int) else [int(index) for index in value]


def results(function, tensors: Sequence[Tensor | None], dout: Tensor | None = None) -> dict[str, Tensor]:
    """The output, all gradients, and the upstream gradient they were taken under (drawn if not given)."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    if dout is None:
        dout = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    dout = dout.to(y)
    y.backward(dout)
    gradients = {
        name: leaf.grad for name, leaf in zip(("dx", "dweight", "dbias"), leaves, strict=True) if leaf is not None
    }
    return {"y": y.detach(), "dout": dout, **gradients}


def assert_within_twice(problem: Problem, dtype: torch.dtype, device: str, function=None) -> None:
    """Holds output and gradients to the 2x rule: twice the error of fp32 eager, and a floor."""
    tensors = problem.tensors(dtype, device)
    found = results(function or problem.ours, tensors)
    dout = found.pop("dout")
    wider = [[None if t is None else t.to(wide) for t in tensors] for wide in (torch.float32, torch.float64)]
    eager, exact = (results(problem.reference, inputs, dout) for inputs in wider)
    if device == "cpu" and dtype.itemsize == 2:
        # Processors without instructions for half precision sum gradients in it (ATen, slim weights or not).
        own = results(problem.sliced, tensors, dout)
        eager = {name: _worse(own[name], eager[name], exact[name]) for name in found}
    for name, value in found.items():
        assert value.dtype == dtype
        assert_close_as_eager(value, eager[name], exact[name], name)


def _worse(a: Tensor, b: Tensor, exact: Tensor) -> Tensor:
    """Of two results the one that errs more."""
    return max((a, b), key=lambda result: (result.double() - exact).abs().max().item())
