"""What is coupled to what in any module: channel groups and block lists, read off one eager forward."""

from jdkd.graph.topology import BlockList, ChannelGroup, Frozen, Slot, Topology
from jdkd.graph.trace import trace

__all__ = ["BlockList", "ChannelGroup", "Frozen", "Slot", "Topology", "trace"]
