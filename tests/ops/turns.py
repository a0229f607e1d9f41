"""Whose turn it is in Triton's interpreter, which is slow; on a GPU, and on other backends, everything runs."""

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def take_turns(backend: str, device: str, place: int, dtype: torch.dtype, channels_last: bool) -> None:
    """Skips all but one dtype of a case in either layout, another one of the next case.

    Layouts have kernels of their own, dtypes differ where values are loaded and stored: so every case runs in both
    layouts, and every layout in every dtype.
    """
    turn = DTYPES[(place + channels_last) % len(DTYPES)]
    if backend == "triton" and device == "cpu" and dtype != turn:
        pytest.skip("in the interpreter the dtypes take turns")
