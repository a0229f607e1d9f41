"""Which groups of a detector's channels an action cuts together."""

from __future__ import annotations

from collections import defaultdict
from itertools import takewhile

from jdkd.graph import ChannelGroup, Topology

STREAMS = "streams"  # what residual blocks add to


def slimmed(topology: Topology) -> tuple[ChannelGroup, ...]:
    """The inner groups whose norms say by |gamma| what each of their channels is worth."""
    return tuple(group for group in topology.inner if topology.norms(group))


def parts(topology: Topology) -> dict[str, list[str]]:
    """What can be cut but is not slimmed, in parts that are cut by one share: names of groups, by the part's name.

    Residual streams are a part of their own, ``"streams"``, with the layer before them that reads the image: all blocks
    read them, so nothing costs more to cut. All else belongs to the module that its first layer is in, named by its
    path, two names deep at most and before any number: ``"backbone.fpn"``, ``"roi_heads.box_head"``,
    ``"head.regression_head"``.

    Args:
        topology: of the detector.
    """
    inner = {group.name for group in slimmed(topology)}
    streams = {group.name for group in topology.groups if topology.is_stream(group)}
    if streams:
        reading = topology.reading
        streams |= {group.name for group in topology.groups if not reading.intersection(group.makers)}
    found: dict[str, list[str]] = defaultdict(list)
    for group in topology.groups:
        if group.name not in inner:
            found[STREAMS if group.name in streams else _home(group)].append(group.name)
    return dict(found)


def _home(group: ChannelGroup) -> str:
    """The module that a group's first layer is in, or the layer where the model itself holds it."""
    layer = group.name.partition("#")[0]
    modules = takewhile(lambda name: not name.isdigit(), layer.split(".")[:-1][:2])
    return ".".join(modules) or layer.partition(".")[0]
