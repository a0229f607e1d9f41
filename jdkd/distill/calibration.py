"""A calibration batch: what brings the channels of two detectors together, and how far."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jdkd.distill.adapter import Adapters, check_fitted
from jdkd.distill.correlation import mean_by_stride
from jdkd.distill.levels import LevelPair
from jdkd.distill.regression import Regression
from jdkd.errors import InputError, require_batches
from jdkd.notices import say_once

ADAPTER = "adapter"
ALIGNMENTS = ("none", "permute", "linear")
LITTLE = 0.05  # a mean r below this explains less than a quarter of a percent
ENOUGH = 100  # of positions, below which a mean r says little itself


class Agreement(NamedTuple):
    """Mean of Pearson's r over the channels of a level.

    Args:
        before: of every channel of the teacher with the student's of the same place; None where widths differ.
        after: of every channel with what stands opposite it now, on images that this was not fitted to.
    """

    before: float | None
    after: float


class Agreements(dict[int, Agreement]):
    """Stride -> :class:`Agreement`; printed, a line a level.

    Args:
        levels: the agreements.
        how: ``"none"``, ``"permute"``, ``"linear"`` or ``"adapter"``.
    """

    def __init__(self, levels: dict[int, Agreement], how: str) -> None:
        super().__init__(levels)
        self.how = how

    def __str__(self) -> str:
        width = max(map(len, map(str, self)), default=0)
        lines = (f"stride {stride:>{width}}: {change}" for stride, change in self._changes())
        return "\n".join((self._about(), *lines))

    def sentence(self) -> str:
        """The same in one line."""
        changes = "; ".join(f"stride {stride}: {change}" for stride, change in self._changes())
        return f"{self._about()}: {changes}"

    def _about(self) -> str:
        return f"mean r of student and teacher, before and after {self.how}"

    def _changes(self) -> Iterator[tuple[int, str]]:
        for stride, (before, after) in self.items():
            yield stride, f"{'differing widths' if before is None else f'{before:.3f}'} -> {after:.3f}"


class Permutations(nn.Module):
    """The teacher's channel opposite each of the student's, for every pair of levels: a gather, nothing is trained.

    Args:
        indices: ``[C_s]`` for every pair.
        widths: channels of student and teacher, of every pair.
    """

    def __init__(self, indices: Sequence[Tensor], widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._widths = list(widths)
        for place, index in enumerate(indices):
            self.register_buffer(str(place), index)

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
        """The student's levels ``[N, C_s, H, W]`` as they are, and the teacher's in their order.

        Raises:
            InputError: these are not the levels that they were fitted to.
        """
        check_fitted(students, teachers, self._widths)
        return students, [
            level.index_select(1, index.to(level.device)) for level, index in zip(teachers, self.buffers(), strict=True)
        ]


class _Halves:
    """A pair of levels over two halves of the images, so that what is fitted to one is judged by the other."""

    def __init__(self, pair: LevelPair) -> None:
        self.widths = pair.student.shape[1], pair.teacher.shape[1]
        prior = pair.student.new_zeros(self.widths[::-1])
        self.alike = self.widths[0] == self.widths[1]
        if self.alike:
            prior.fill_diagonal_(1)
        self.halves = Regression(prior), Regression(prior)
        self.images = 0

    def add(self, pair: LevelPair) -> None:
        for which, half in enumerate(self.halves):
            every_other = slice((which - self.images) % 2, None, 2)
            if len(ours := pair.student[every_other]):
                half.add(ours, pair.teacher[every_other])
        self.images += len(pair.student)

    @property
    def whole(self) -> Regression:
        return self.halves[0].joined(self.halves[1])

    def before(self) -> float | None:
        return float(self.whole.correlation().diagonal().mean()) if self.alike else None

    def after(self, fit: Callable[[Regression], Any], judge: Callable[[Regression, Any], Tensor]) -> float:
        """Mean r over channels and both halves; of a single image, of what was fitted to it."""
        known = [half for half in self.halves if half.count]
        pairs = zip(known, reversed(known), strict=True)
        return sum(float(judge(other, fit(half)).mean()) for half, other in pairs) / len(known)


class _Permute:
    @staticmethod
    def fit(regression: Regression) -> Tensor:  # -> [C_s], of the teacher's channels
        """The assignment of the largest sum of r (the Hungarian method; Kuhn, 1955)."""
        try:
            from scipy.optimize import linear_sum_assignment
        except ModuleNotFoundError as error:
            raise InputError(
                "align='permute' needs scipy, which is not installed; install jdkd[detect], or take align='linear'"
            ) from error

        r = regression.correlation().T  # [C_s, C_t]
        _, index = linear_sum_assignment(r.cpu().numpy(), maximize=True)
        return torch.as_tensor(index, dtype=torch.int64, device=r.device)

    @staticmethod
    def judge(regression: Regression, index: Tensor) -> Tensor:
        return regression.correlation()[index, torch.arange(len(index), device=index.device)]

    @staticmethod
    def same(regression: Regression) -> Tensor:
        return torch.arange(len(regression.prior), device=regression.prior.device)


class _Linear:
    @staticmethod
    def fit(regression: Regression) -> tuple[Tensor, Tensor]:
        return regression.solved()

    @staticmethod
    def judge(regression: Regression, solution: tuple[Tensor, Tensor]) -> Tensor:
        return regression.explained_by(solution[0])

    @staticmethod
    def same(regression: Regression) -> tuple[Tensor, Tensor]:
        return regression.prior, regression.prior.new_zeros(len(regression.prior))


def as_alignment(align: Any, *, adapter: bool) -> str:
    """How the channels of two detectors are brought together: an entry of :data:`ALIGNMENTS`, or ``"adapter"``.

    Raises:
        InputError: it is none of these, or an adapter is asked for beside it.
    """
    if align not in ALIGNMENTS:
        raise InputError(f"align is {align!r:.60}; choose one of {', '.join(ALIGNMENTS)}")
    if adapter and align != "none":
        raise InputError(
            f"adapter and align={align!r} are both given; an adapter begins as the linear map and is trained on, so "
            "leave one of them out"
        )
    return ADAPTER if adapter else align


@torch.no_grad()
def calibrated(
    compared: Generator[list[LevelPair]], how: str, *, bias: bool, who: tuple[str, str]
) -> tuple[Adapters | Permutations | None, Agreements]:
    """What is put between the levels of two detectors, and how far it brings them together.

    A level that an alignment takes farther apart on images that it was not fitted to, as too few positions may, stays
    as it is. A teacher whose r stays near 0 is said to have nothing to say.

    Args:
        compared: pairs of levels, by batch; closed afterwards.
        how: ``"none"``, ``"permute"``, ``"linear"`` or ``"adapter"``.
        bias: whether convolutions add one.
        who: what the notice calls student and teacher.

    Raises:
        InputError: there is no batch; or channels are to be matched, and the student has more than the teacher.
    """
    with closing(compared):
        found = _gathered(compared, how, who)
    require_batches(found, "calibrate")
    before = {key: halves.before() for key, halves in found.items()}
    if how == "none":
        return None, _agreements(before, before, how)
    kind, solutions, after = (_Permute if how == "permute" else _Linear), [], {}
    for key, halves in found.items():
        after[key] = halves.after(kind.fit, kind.judge)
        as_it_is = how != ADAPTER and before[key] is not None and after[key] < before[key]
        after[key] = before[key] if as_it_is else after[key]
        solutions.append((kind.same if as_it_is else kind.fit)(halves.whole))
    agreements = _agreements(before, after, how)
    _say_what_says_nothing(agreements, {stride for (stride, _), h in found.items() if h.whole.count >= ENOUGH}, who)
    if how == "permute":
        return Permutations(solutions, [halves.widths for halves in found.values()]), agreements
    return Adapters(solutions, bias=bias, trained=how == ADAPTER), agreements


def _gathered(
    compared: Generator[list[LevelPair]], how: str, who: tuple[str, str]
) -> dict[tuple[int, int], _Halves]:  # by stride and place among the pairs
    found: dict[tuple[int, int], _Halves] = {}
    for pairs in compared:
        for place, pair in enumerate(pairs):
            if (key := (pair.stride, place)) not in found:
                check_widths(pair, how)
                found[key] = _Halves(pair)
            found[key].add(pair)
            if not found[key].whole.is_finite():
                raise InputError(
                    f"{' or '.join(who)} makes values of the calibration images that are not finite (level of stride "
                    f"{pair.stride}); check both on these images"
                )
    return found


def check_widths(pair: LevelPair, how: str) -> None:
    """Refuses a student that has more channels than a teacher has to be matched with.

    Raises:
        InputError: it does.
    """
    ours, theirs = pair.student.shape[1], pair.teacher.shape[1]
    if how == "permute" and ours > theirs:
        raise InputError(
            f"align='permute' gives each of the student's {ours} channels one of the teacher's, which has {theirs} "
            f"(level of stride {pair.stride}); take align='linear' or adapter=True"
        )


def _agreements(
    before: dict[tuple[int, int], float | None], after: dict[tuple[int, int], float | None], how: str
) -> Agreements:
    afterwards = mean_by_stride(after)
    unknown = {stride for (stride, _), r in before.items() if r is None}
    known = mean_by_stride({key: r for key, r in before.items() if key[0] not in unknown})
    return Agreements({stride: Agreement(known.get(stride), r) for stride, r in afterwards.items()}, how)


def _say_what_says_nothing(agreements: Agreements, seen: set[int], who: tuple[str, str]) -> None:
    silent = {stride: after for stride, (_, after) in agreements.items() if stride in seen and after < LITTLE}
    if silent:
        values = ", ".join(f"{r:.3f}" for r in silent.values())
        say_once(
            f"the teacher ({who[1]}) has nothing to say to the student ({who[0]}) in its levels of stride "
            f"{[*silent]}: after {agreements.how} the mean r of their channels is {values}; check that it is trained "
            "and sees images as it was trained on, or leave these levels out"
        )
