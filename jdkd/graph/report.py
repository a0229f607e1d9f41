"""A topology as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jdkd.graph.topology import Topology

if TYPE_CHECKING:
    from rich.console import Group

MOST = 3  # names in one place


def report(topology: Topology) -> Group:
    """What can be cut, what cannot and which operator is the reason, and which blocks can be dropped; for rich.

    Args:
        topology: of any model.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, *headings: str) -> Table:
        made = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
        for heading in headings:
            made.add_column(heading, justify="right" if heading in ("channels", "units", "blocks") else "left")
        return made

    groups = table("Channel groups", "group", "channels", "units", "read by")
    for group in topology.groups:
        readers = list(dict.fromkeys(slot.tensor.rpartition(".")[0] for slot in group.slots if slot.role == "in"))
        groups.add_row(group.name, str(group.size), str(group.units), _listed(readers))
    frozen = table("Frozen", "tensors", "because")
    for each in topology.frozen:
        names = list(dict.fromkeys(tensor.rpartition(".")[0] or tensor for tensor, _ in each.tensors))
        frozen.add_row(Text(_listed(names)), Text(each.reason))
    lists = table("Lists of residual blocks", "list", "blocks", "from", "to")
    for blocks in topology.block_lists:
        lists.add_row(blocks.name, str(len(blocks.blocks)), blocks.blocks[0], blocks.blocks[-1])
    unknown = ", ".join(f"{name} (in {', '.join(where[:2])})" for name, where in topology.unknown.items())
    total = sum(topology.sizes.values())
    summary = [
        f"{topology.prunable_share():.1%} of {total / 1e6:.2f} M parameters stand in a group that can be cut",
        f"operators without a rule: {unknown or 'none'}",
        f"parameters that the example did not reach: {', '.join(topology.unreached[:5]) or 'none'}",
    ]
    parts = [made for made in (groups, frozen, lists) if made.row_count]
    return Group(*parts, *(Text(line) for line in summary))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
