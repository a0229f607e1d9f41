"""What the tests of the elastic convolution of levels share: a pyramid, its three evaluations and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jdkd.functional import elastic_conv2d_levels
from tests.ops.elastic_conv_cases import Problem, assert_close_as_eager

Sizes = tuple[tuple[int, int, int], ...]  # N, H, W of every level


@dataclass(frozen=True)
class Pyramid:
    """One elastic convolution of several levels; ``problem`` says all but their sizes."""

    problem: Problem = field(default_factory=lambda: Problem(window={"padding": 1}))
    sizes: Sizes = ((2, 4, 4), (2, 1, 3))
    relu: bool = False

    def of(self, **changes) -> Pyramid:
        """The same with other fields of its problem."""
        return replace(self, problem=replace(self.problem, **changes))

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor | None]:
        """Draws weight, bias and one image ``[N, Cin, H, W]`` a level."""
        _, weight, bias = self.problem.tensors(dtype, device)
        levels = [replace(self.problem, image=size, seed=i + 1) for i, size in enumerate(self.sizes)]
        return [weight, bias, *(level.tensors(dtype, device)[0] for level in levels)]

    def ours(self, weight: Tensor, bias: Tensor | None, *xs: Tensor) -> list[Tensor]:
        problem = self.problem
        active = {"in_channels": problem.inputs, "out_channels": problem.outputs, "kernel_size": problem.kernel}
        activation = "relu" if self.relu else "none"
        return elastic_conv2d_levels(xs, weight, bias, **active, **problem.window, activation=activation)

    def reference(self, weight: Tensor, bias: Tensor | None, *xs: Tensor) -> list[Tensor]:
        return self._activated([self.problem.reference(x, weight, bias) for x in xs])

    def sliced(self, weight: Tensor, bias: Tensor | None, *xs: Tensor) -> list[Tensor]:
        return self._activated([self.problem.sliced(x, weight, bias) for x in xs])

    def _activated(self, ys: list[Tensor]) -> list[Tensor]:
        return [y.relu() for y in ys] if self.relu else ys


def results(
    function: Callable, tensors: list[Tensor | None], douts: list[Tensor] | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name, and the upstream gradients they were taken under (drawn if not given)."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    ys = function(*leaves)
    if douts is None:
        generator = torch.Generator().manual_seed(1)
        douts = [torch.randn(y.shape, generator=generator).to(y) for y in ys]
    torch.autograd.backward(ys, [dout.to(y) for dout, y in zip(douts, ys, strict=True)])
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    names = ["dweight", "dbias", *(f"dx{i}" for i in range(len(ys)))]
    return found | {n: leaf.grad for n, leaf in zip(names, leaves, strict=True) if leaf is not None}, douts


def assert_matches_float64(pyramid: Pyramid, dtype: torch.dtype, device: str) -> None:
    """Holds outputs and gradients to the 2x rule: twice the error of fp32 eager, and a floor."""
    tensors = pyramid.tensors(dtype, device)
    found, douts = results(pyramid.ours, tensors)
    wider = [[None if t is None else t.to(wide) for t in tensors] for wide in (torch.float32, torch.float64)]
    eager, exact = (results(pyramid.reference, inputs, douts)[0] for inputs in wider)
    if device == "cpu" and dtype.itemsize == 2:
        # Processors without instructions for half precision sum gradients in it (ATen, slim weights or not).
        own, _ = results(pyramid.sliced, tensors, douts)
        for name, value in own.items():
            error, other = ((t.double() - exact[name]).abs().max() for t in (value, eager[name]))
            eager[name] = value if error > other else eager[name]
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == dtype, name
        assert_close_as_eager(value, eager[name], exact[name], name)
