"""Which channels of a teacher stand opposite those of a student that was pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from jdkd.errors import InputError

Indices = Tensor | Sequence[int]
Channels = Indices | Sequence[Indices | None] | Mapping[str, Indices] | None


class TeacherChannels:
    """The teacher's channel opposite each of the student's, one list for all levels or one a level.

    Args:
        channels: ``[C_student]``; or, where levels have channels of their own, such a list for each of the student's
            levels: a mapping by their names, or a sequence in the order in which its neck returns them, as
            :attr:`jdkd.graph.Topology.followed` has them, with None or nothing for a level that has all. None: all
            levels have all.

    Raises:
        InputError: these are no indices, or one stands in a list twice.
    """

    def __init__(self, channels: Channels) -> None:
        self._whole = self._by_name = self._in_order = None
        if isinstance(channels, Mapping) and channels and all(map(_is_list, channels.values())):
            self._by_name = {str(name): _index(indices) for name, indices in channels.items()}
        elif isinstance(channels, list | tuple) and any(_is_list(indices) and len(indices) for indices in channels):
            has_all = lambda indices: indices is None or (_is_list(indices) and len(indices) == 0)  # noqa: E731
            self._in_order = [None if has_all(indices) else _index(indices) for indices in channels]
        elif channels is not None:
            self._whole = _index(channels)

    def select(self, teacher: Tensor, channels: int, stride: int, name: str, names: Sequence[str]) -> Tensor:
        """The teacher's channels (of ``[N, C_t, H, W]``) opposite the student's: ``[N, C_s, H, W]``.

        Args:
            teacher: its level.
            channels: of the student's.
            stride: of both.
            name: of the student's level.
            names: of all levels that the student's neck returned.

        Raises:
            InputError: a channel is not there, there is no list for the level, or the counts differ all the same.
        """
        index = self._of(name, names)
        where = f"the teacher's level of stride {stride} has {teacher.shape[1]}"
        picked = teacher.shape[1]
        if index is not None:
            picked, most = len(index), index.most
            if most >= teacher.shape[1]:
                raise InputError(f"channels names channel {most} and {where}; give indices of channels that it has")
        if picked != channels:
            what = "" if index is None else f", of which channels picks {picked}"
            raise InputError(
                f"the student's pyramid has {channels} channels and the teacher's {teacher.shape[1]}{what} (level of "
                f"stride {stride}); give channels, the teacher's index for each of the student's, or adapter=True."
            )
        return teacher if index is None else teacher.index_select(1, index.on(teacher.device))

    def _of(self, name: str, names: Sequence[str]) -> _Index | None:
        if self._by_name is not None:
            if unknown := self._by_name.keys() - set(names):
                raise InputError(
                    f"channels names the level {min(unknown)}, and the student has {', '.join(names)}; name those"
                )
            return self._by_name.get(name)
        if self._in_order is not None:
            if len(self._in_order) != len(names):
                raise InputError(
                    f"channels has {len(self._in_order)} lists and the student {len(names)} levels "
                    f"({', '.join(names)}); give one list a level, None where all channels stay"
                )
            return self._in_order[list(names).index(name)]
        return self._whole


class _Index:
    """Indices ``[C_s]``, and the largest of them; moved to a device once."""

    def __init__(self, index: Tensor) -> None:
        self.index, self.most = index, int(index.max())

    def __len__(self) -> int:
        return len(self.index)

    def on(self, device: torch.device) -> Tensor:
        self.index = self.index.to(device)
        return self.index


def _index(channels: Any) -> _Index:
    try:
        ordered = not isinstance(channels, Mapping | Set | str)
        index = torch.as_tensor(channels if isinstance(channels, Tensor) else list(channels) if ordered else [])
    except (TypeError, ValueError, RuntimeError):
        index = torch.zeros(0)
    whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    if index.dim() != 1 or len(index) == 0 or not whole or index.min() < 0:
        raise InputError(
            f"channels is or holds {channels!r:.60}; give the index, from 0, of the teacher's channel for each of "
            "the student's, a list of integers, or such a list for each level"
        )
    values, counts = index.unique(return_counts=True)
    if counts.max() > 1:
        raise InputError(f"channels names channel {values[counts.argmax()].item()} more than once; give each once")
    return _Index(index.to(torch.int64))


def _is_list(value: Any) -> bool:
    return (isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0) and not isinstance(value, str)
