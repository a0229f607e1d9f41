"""The stages of a detector, read off its topology: which blocks and which channels of it a pool makes elastic."""

from collections.abc import Collection
from dataclasses import dataclass

from jdkd.graph import BlockList, ChannelGroup, Topology


@dataclass(frozen=True)
class Stage:
    """What one depth and one width of a subnet set.

    Args:
        blocks: of which the first ones run; None in a detector without block lists, where there is no choice.
        groups: the channel groups whose leading channels run.
    """

    blocks: BlockList | None
    groups: tuple[ChannelGroup, ...]

    @property
    def depth(self) -> int:
        """Blocks that there are; 1 where none can be switched off."""
        return len(self.blocks.blocks) if self.blocks is not None else 1


def pool_groups(topology: Topology) -> tuple[ChannelGroup, ...]:
    """The channel groups of a pool: the inner ones, without the pyramid's own channels, which all teachers share."""
    shared = {channel[0] for level in topology.followed for channel in level if channel is not None}
    return tuple(group for group in topology.inner if group.name not in shared)


def read_stages(topology: Topology, elastic: Collection[str]) -> tuple[Stage, ...]:
    """The stages of a detector: one for each block list, or a single one where it has none.

    Groups inside a list's blocks belong to its stage, the others, such as that of the block in front that changes the
    width of the stream, to the next list in the order of the layers, and what comes after the last list to that one.

    Args:
        topology: of the detector.
        elastic: names of the groups that are elastic.
    """
    groups = [group for group in topology.groups if group.name in elastic]
    lists = topology.block_lists
    if not lists:
        return (Stage(None, tuple(groups)),)
    homes = [_home(group, lists) for group in topology.groups]
    following: list[int | None] = []
    for home in reversed(homes):
        following.append(home if home is not None or not following else following[-1])
    following.reverse()
    members: list[list[ChannelGroup]] = [[] for _ in lists]
    last = len(lists) - 1
    for group, home in zip(topology.groups, following, strict=True):
        if group.name in elastic:
            members[last if home is None else home].append(group)
    return tuple(Stage(blocks, tuple(own)) for blocks, own in zip(lists, members, strict=True))


def _home(group: ChannelGroup, lists: tuple[BlockList, ...]) -> int | None:
    """The list in one of whose blocks a group lies."""
    for number, blocks in enumerate(lists):
        for block in blocks.blocks:
            if all(slot.tensor.startswith(f"{block}.") for slot in group.slots):
                return number
    return None
