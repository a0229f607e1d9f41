"""See :func:`in_precision`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from jdkd.detect.stages import HEAD, stages_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def unknown_dtype(dtype: str) -> str | None:
    """Why a dtype cannot be timed in; None where it can."""
    return None if dtype in DTYPES else f"the dtype is none of {', '.join(DTYPES)}"


def in_precision(model: nn.Module, dtype: str) -> nn.Module:
    """A detector whose convolutions and matrix products are of a dtype; boxes, scores and NMS stay in fp32.

    Weights are converted once, and the forward runs under ``torch.autocast``, which converts what goes into them. What
    heads return is converted back, as boxes that are decoded in bf16 are off by pixels.

    Args:
        model: in fp32; left as it was.
        dtype: `float32`, which returns the model itself, `float16` or `bfloat16`.

    Raises:
        InputError: there is no telling where its heads are.
    """
    if dtype == "float32":
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            module.to(DTYPES[dtype])
    entered: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        device = next(module.parameters()).device.type
        entered.append(torch.autocast(device, DTYPES[dtype]))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    for head, _, stage in stages_of(model):
        if stage == HEAD:
            head.register_forward_hook(lambda module, inputs, out: _in_fp32(out))
    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)  # after an error, too
    return model


def _in_fp32(out: Any) -> Any:
    """Features and predictions in fp32, whatever holds them."""
    return tree_map_only(torch.Tensor, lambda value: value.float() if value.is_floating_point() else value, out)
