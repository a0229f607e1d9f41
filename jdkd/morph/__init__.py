"""Student morphism: actions on a detector, and how much each of its parts matters."""

from jdkd.morph.actions import (
    Morph,
    add_block,
    can_shorten,
    change_regions,
    change_resolution,
    grow,
    rearrange,
    remove_block,
    shorten,
)
from jdkd.morph.cutting import cut_to
from jdkd.morph.importance import channel_importance
from jdkd.morph.repairing import repair

__all__ = [
    "Morph",
    "add_block",
    "can_shorten",
    "change_regions",
    "change_resolution",
    "channel_importance",
    "cut_to",
    "grow",
    "rearrange",
    "remove_block",
    "repair",
    "shorten",
]
