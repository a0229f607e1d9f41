"""Elastic depth: residual blocks of any class that can be switched off."""

from __future__ import annotations

from typing import Any, NamedTuple, SupportsIndex

from torch import nn

from jdkd.nn.elastic import Elastic
from jdkd.nn.symbolic import Proxy, as_node


class _Depth(NamedTuple):
    """Whether a block is active."""

    runs: bool


class ElasticBlock(Elastic):
    """A residual block that returns its input while it is switched off; :func:`jdkd.nn.as_elastic_block` makes it.

    Whatever holds the blocks, a sequence, a list or a forward of its own, runs the others as before (elastic depth:
    Cai et al., Once-for-All, ICLR 2020, section 3.2).
    """

    plain: type[nn.Module]  # the block's own class

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.set_active()

    def set_active(self, runs: bool = True) -> None:
        """Switches the block on or off, for the next forwards."""
        self._put(self.part(runs))

    def part(self, runs: bool = True) -> _Depth:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        return _Depth(bool(runs))

    @property
    def is_active(self) -> bool:
        return self._record.active.runs

    def forward(self, *inputs: Any, **named: Any) -> Any:
        first = next(iter((*inputs, *named.values())))
        if isinstance(first, Proxy):
            return as_node(self, first, *inputs, **named)
        return super().forward(*inputs, **named) if self._now().runs else first

    def extra_repr(self) -> str:
        return ("" if self.is_active else "switched off, ") + super().extra_repr()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:  # the class is made anew where it is not known
        return _blank, (self.plain,), self.__getstate__()


_made: dict[type[nn.Module], type[ElasticBlock]] = {}


def elastic_block_class(plain: type[nn.Module]) -> type[ElasticBlock]:
    """The subclass of a block's class whose blocks can be switched off."""
    if plain not in _made:
        names = {"plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _made[plain] = type(f"Elastic{plain.__name__}", (ElasticBlock, plain), names)
    return _made[plain]


def _blank(plain: type[nn.Module]) -> nn.Module:
    made = elastic_block_class(plain)
    return made.__new__(made)
