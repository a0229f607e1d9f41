"""What is coupled to what in any module: channel groups and block lists, read off one eager forward."""

from jdkd.graph.declaration import Declaration
from jdkd.graph.report import report
from jdkd.graph.topology import BlockList, ChannelGroup, Frozen, Slot, Topology
from jdkd.graph.trace import trace

__all__ = ["BlockList", "ChannelGroup", "Declaration", "Frozen", "Slot", "Topology", "report", "trace"]
