"""What the tests of the elastic 1x1 convolution share: a problem, its three evaluations and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from jdkd.ops.elastic_pointwise import elastic_pointwise_conv2d, elastic_pointwise_conv2d_stats
from jdkd.reference import elastic_pointwise as reference
from jdkd.testing import assert_within_twice

EPILOGUES = ("plain", "bias", "affine", "bottleneck", "add", "relu_then_add", "stats")
FP32 = ("mean", "variance", "dscale", "dshift")


@dataclass(frozen=True)
class Problem:
    """One elastic 1x1 convolution over leading channels."""

    weight: tuple[int, int] = (24, 16)  # Cout_max, Cin_max
    active: tuple[int, int] = (24, 16)  # Cout, Cin
    image: tuple[int, int, int] = (2, 5, 7)  # N, H, W
    stride: int = 1
    epilogue: str = "plain"
    offset: float = 0.0  # mean of x
    seed: int = 0

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Draws x ``[N, Cin, H, W]`` channels-last, the shared weight, and what the epilogue takes."""
        generator = torch.Generator().manual_seed(self.seed)
        (n, height, width), (rows, columns) = self.image, self.active
        out = [(size - 1) // self.stride + 1 for size in (height, width)]
        shapes = {"x": (n, columns, height, width), "weight": self.weight}
        if self.epilogue in ("affine", "bottleneck", "relu_then_add"):
            shapes |= {"scale": (rows,), "shift": (rows,)}
        if self.epilogue == "bias":
            shapes["shift"] = (rows,)
        if self.epilogue in ("bottleneck", "add", "relu_then_add"):
            shapes["residual"] = (n, rows, *out)
        drawn = {}
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator) + (self.offset if name == "x" else 0)
            tensor = tensor.to(device, torch.float32 if name in ("scale", "shift") else dtype)
            drawn[name] = tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        return drawn

    @property
    def activation(self) -> str:
        return {"bottleneck": "relu", "relu_then_add": "relu_then_add"}.get(self.epilogue, "none")

    def ours(self, x: Tensor, weight: Tensor, **epilogue: Tensor) -> tuple[Tensor, ...]:
        window = {"out_channels": self.active[0], "stride": self.stride}
        if self.epilogue == "stats":
            return elastic_pointwise_conv2d_stats(x, weight, **window)
        return (elastic_pointwise_conv2d(x, weight, **window, **epilogue, activation=self.activation),)

    def specified(
        self, x: Tensor, weight: Tensor, *, rounding: torch.dtype | None = None, **epilogue: Tensor
    ) -> tuple[Tensor, ...]:
        """The specification; its gradients are products of what has been rounded to ``rounding``, if given."""
        total = reference.elastic_pointwise(x, weight, out_channels=self.active[0], stride=self.stride)
        if rounding is not None:
            total.register_hook(lambda dtotal: dtotal.to(rounding).to(dtotal))
        if self.epilogue == "stats":
            return total, *reference.moments(total)
        operands = [epilogue.get(name) for name in ("scale", "shift", "residual")]
        return (reference.epilogue(total, *operands, self.activation),)


def results(function: Callable, tensors: dict[str, Tensor], douts: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs and gradients, and under ``douts`` the upstream gradients (drawn if not given)."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves)
    if douts is None:
        generator = torch.Generator().manual_seed(1)
        douts = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    torch.autograd.backward(outputs, [dout.to(y) for y, dout in zip(outputs, douts, strict=True)])
    found = dict(zip(("y", "mean", "variance"), (y.detach() for y in outputs), strict=False))
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items()} | {"douts": douts}


def assert_matches_float64(problem: Problem, dtype: torch.dtype, device: str, *, slack: float = 1.0) -> None:
    """Holds outputs and gradients to the 2x rule, in units of the largest exact value.

    Args:
        problem: what to compute.
        dtype: of x, weight and residual, and the row of floors.
        device: where.
        slack: factor of the unit, for a route that rounds more than once.
    """
    tensors = problem.tensors(dtype, device)
    found = results(problem.ours, tensors)
    douts = found.pop("douts")
    eager, exact = (
        results(function, {name: tensor.to(wide) for name, tensor in tensors.items()}, douts)
        for function, wide in (
            (partial(problem.specified, rounding=dtype), torch.float32),
            (problem.specified, torch.float64),
        )
    )
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name in FP32 else dtype), name
        unit = slack * exact[name].abs().max()
        assert_within_twice(value, eager[name].to(value.dtype), exact[name], what=name, dtype=dtype, scale=unit)
