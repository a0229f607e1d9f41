"""The lengths and shapes of training that detection has names for."""

from __future__ import annotations

import math
from typing import Any

from jdkd.errors import InputError

EPOCHS = {"1x": 12, "2x": 24, "3x": 36}
DECAYS = ("step", "cosine")
MILESTONES = (8 / 12, 11 / 12)  # of "step": after epochs 8 and 11 of 1x, 16 and 22 of 2x, 24 and 33 of 3x
WARMUP_STEPS, MOST_WARMUP = 500, 0.1  # steps, and a share of a training that is short


def named_schedule(name: str, images: int, batch_size: int, decay: str = "step") -> dict[str, Any]:
    """The settings of :class:`jdkd.train.TrainConfig` that a schedule decides.

    Args:
        name: ``"1x"``, ``"2x"`` or ``"3x"``: 12, 24 or 36 epochs, as Detectron and OpenMMLab count them.
        images: of the training data.
        batch_size: images per step, of all processes together.
        decay: ``"step"``, to a tenth after two thirds and again after eleven twelfths, or ``"cosine"``.

    Returns:
        ``steps``; ``warmup``, of 500 steps but at most a tenth of all; and ``milestones``, None of a cosine.

    Raises:
        InputError: there is no such schedule or decay.
    """
    if name not in EPOCHS or decay not in DECAYS:
        raise InputError(
            f"schedule {name!r} with decay {decay!r} is none of {', '.join(EPOCHS)} with {' or '.join(DECAYS)}."
        )
    steps = max(1, steps_of(EPOCHS[name], images, batch_size))
    return {"steps": steps, "warmup": min(WARMUP_STEPS / steps, MOST_WARMUP), "milestones": milestones_of(decay)}


def steps_of(epochs: int, images: int, batch_size: int) -> int:
    """How many steps of so many images it takes to see them all so often."""
    return math.ceil(epochs * images / batch_size)


def milestones_of(decay: str) -> tuple[float, ...] | None:
    """Where in a training of that decay the rate falls."""
    return MILESTONES if decay == "step" else None
