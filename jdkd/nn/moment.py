"""When a subnet was set, so that the recomputation of a checkpointed forward knows whether it came later.

Autograd numbers its nodes in the order of their creation, in every thread by itself. In a recomputation the node that
autograd is at was created with the forward, by either form of checkpointing: a subnet is the one of that forward if it
was there before the thread of the forward made this number. So a moment notes autograd's number where it was set, and
where forwards of other threads first meet it. A backward pass is taken to be of forwards of the thread that called it,
which it knows by a name in torch's thread-local state: that one goes along into autograd's own threads. If that thread
never met the subnet but an earlier one, there is no telling whose forward it was.
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
    """The thread that looks: its name is the tick at which it met its first elastic layer."""

    def __init__(self):
        self.name = next(_ticks)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.name))  # torch takes one, and gives it back with the thread
        torch._C._stash_obj_in_tls(_KEY, self.name)


_thread = _Thread()


class Moment(NamedTuple):
    """When something was set.

    Args:
        numbers: by thread whose forwards met it: autograd's number there at which it was surely set.
        tick: in the order of all moments and threads; 0: before all threads.
        thread: in which it was set; None: in a recomputation.
        sequence: autograd's next number in that thread.
        recomputation: that it was set in, if any: graph task and node.
        earlier: threads whose forwards met what was set before.
    """

    numbers: dict[int, int]
    tick: int = 0
    thread: int | None = None
    sequence: int = 0
    recomputation: tuple[int, int] | None = None
    earlier: frozenset[int] = frozenset()

    def meet(self) -> None:
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
        """Whether it was set by the thread that called the backward pass, and met by no other one."""
        return {self.thread, *self.numbers} == {_caller()}


def now(before: Iterable[Moment] = ()) -> Moment:
    """Returns: the present moment of this thread; ``before`` holds those that it replaces."""
    here = recomputation()
    thread = _thread.name if here is None else None
    earlier = frozenset().union(*({*moment.earlier, *moment.numbers} for moment in before))
    if len(earlier) > _MOST:
        earlier = frozenset({_OTHERS})
    return Moment({}, next(_ticks), thread, torch._C._autograd._get_sequence_nr(), here, earlier)


def recomputation() -> tuple[int, int] | None:
    """Returns: graph task and node of the backward pass that this thread is in; None outside of one."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else (task, torch._C._current_autograd_node()._sequence_nr())


def _caller() -> int | None:
    """The name of the thread that called the backward pass; None if it has met no elastic layer."""
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None
