"""When a subnet was set, so that the recomputation of a checkpointed forward can tell whether it was set later.

A recomputation has to run the subnet of its forward. Autograd gives every node of a graph a sequence number, counted up
in each thread on its own, and both forms of checkpointing create the node that is recomputed during the forward. So:
a subnet that was active before that node had its number is the subnet of the forward; one that came later is not.

- Setting a subnet makes an epoch (:meth:`SubnetEpoch.current`), with the sequence number of the setting thread.
- A forward in another thread notes the number of its own thread, once an epoch (:meth:`SubnetEpoch.observe`).
- A backward pass is taken to belong to forwards of the thread that called it. Autograd runs it in threads of its own,
  so the caller is known by a name in torch's thread-local state, which torch hands on to those threads.
- If that thread ran forwards under an earlier epoch only, nobody can say whose forward it was, and it is refused.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
from collections.abc import Iterable
from typing import NamedTuple

import torch

_KEY = "jdkd_thread"
_ticks = itertools.count(1)
_OTHERS = 0  # the name of all threads that are no longer told apart
_MOST = 64  # threads that are


class _Thread(threading.local):
    """The thread that looks: its name is the tick at which it ran its first elastic layer."""

    def __init__(self):
        self.name = next(_ticks)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.name))  # torch takes one, and gives it back with the thread
        torch._C._stash_obj_in_tls(_KEY, self.name)


_thread = _Thread()


class SubnetEpoch(NamedTuple):
    """When a subnet was set.

    Args:
        numbers: by thread whose forwards observed it: a sequence number there before which it was surely set.
        tick: in the order of all epochs and threads; 0: before all threads.
        thread: in which it was set; None: in a recomputation.
        sequence: autograd's next sequence number in that thread.
        recomputation: that it was set in, if any: graph task and node.
        earlier: threads whose forwards observed what was set before.
    """

    numbers: dict[int, int]
    tick: int = 0
    thread: int | None = None
    sequence: int = 0
    recomputation: tuple[int, int] | None = None
    earlier: frozenset[int] = frozenset()

    @classmethod
    def current(cls, replaced: Iterable[SubnetEpoch] = ()) -> SubnetEpoch:
        """Returns: the epoch that begins in this thread with this call; ``replaced`` holds those that it ends."""
        here = recomputation()
        thread = _thread.name if here is None else None
        earlier = frozenset().union(*({*epoch.earlier, *epoch.numbers} for epoch in replaced))
        if len(earlier) > _MOST:
            earlier = frozenset({_OTHERS})
        return cls({}, next(_ticks), thread, torch._C._autograd._get_sequence_nr(), here, earlier)

    def observe(self) -> None:
        """Notes a forward of this thread, outside of a backward pass."""
        thread = _thread.name
        if thread not in self.numbers:
            self.numbers[thread] = self._number(thread)
            if len(self.numbers) > _MOST:  # as with a thread for every request
                self.numbers[_OTHERS] = max(self.numbers.values())
                for name in [name for name in self.numbers if name not in (_OTHERS, thread)]:
                    self.numbers.pop(name, None)

    def _number(self, thread: int) -> int:
        if thread == self.thread:
            return self.sequence
        return 0 if self.tick < thread else torch._C._autograd._get_sequence_nr()

    def is_of_forward(self) -> bool:
        """Whether it was before the forward that is recomputed, or in this recomputation; False where that is open."""
        here = recomputation()
        if self.recomputation == here:
            return True
        caller = _caller()
        number = self.numbers.get(caller)
        if number is None:
            if not self.earlier.isdisjoint((caller, _OTHERS)):
                return False
            number = max(self.numbers.values(), default=math.inf)
        return number <= here[1]

    def is_of_one_thread(self) -> bool:
        """Whether it was set by the thread that called the backward pass, and observed by no other one."""
        return {self.thread, *self.numbers} == {_caller()}


def recomputation() -> tuple[int, int] | None:
    """Returns: graph task and node of the backward pass that this thread is in; None outside of one."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else (task, torch._C._current_autograd_node()._sequence_nr())


def _caller() -> int | None:
    """The name of the thread that called the backward pass; None if it has run no elastic layer."""
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None
