"""Student morphism: actions on a detector, and how much each of its parts matters."""

from jdkd.morph.actions import (
    GROWING,
    Morph,
    add_block,
    change_resolution,
    draw,
    prune_channels,
    rearrange,
    remove_block,
    shortened,
)
from jdkd.morph.cutting import cut_to
from jdkd.morph.importance import channel_importance
from jdkd.morph.parts import parts
from jdkd.morph.repairing import repair

__all__ = [
    "GROWING",
    "Morph",
    "add_block",
    "change_resolution",
    "channel_importance",
    "cut_to",
    "draw",
    "parts",
    "prune_channels",
    "rearrange",
    "remove_block",
    "repair",
    "shortened",
]
