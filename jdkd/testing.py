"""How exact an operator must be, for its tests and for whoever wants to check a build.

**The 2x rule.** An operator may err at most twice as much against float64 as the eager formula does in float32 on the
same inputs, its gradients then rounded once to their dtype; plus a floor, since eager is sometimes exact by luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In units of what is compared: a few roundings of float32, or one of the half-precision result.
FLOORS: dict[torch.dtype, float] = {
    torch.float64: 1e-14,
    torch.float32: 2.0**-21,
    torch.bfloat16: 2.0**-10,
    torch.float16: 2.0**-13,
}


def assert_within_twice(
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    what: str,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> None:
    """Holds a result to the 2x rule.

    Args:
        ours: result under test, any shape and dtype.
        eager: the eager formula's, from the same inputs in float32, rounded once to the dtype of ours.
        exact: the eager formula's from the same inputs in float64.
        what: name of the result, for the message.
        dtype: row of :data:`FLOORS`; that of ``ours`` if left out.
        scale: unit of the errors, broadcastable to the result; the largest exact value if left out.

    Raises:
        AssertionError: if ours is not finite where exact is, or errs too much.
    """
    exact = exact.double()
    unit = exact.abs().max() if scale is None else scale.double()
    unit = torch.as_tensor(unit).to(exact.device).clamp(min=1e-30)
    if ours.shape != exact.shape:
        raise AssertionError(f"{what} has shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    error = ((ours.double() - exact).abs() / unit).max().item()
    allowed = 2 * ((eager.double() - exact).abs() / unit).max().item() + FLOORS[dtype or ours.dtype]
    if not error <= allowed:
        raise AssertionError(f"{what} errs by {error:.2e} against float64; {allowed:.2e} is allowed")
