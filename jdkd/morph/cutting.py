"""See :func:`cut_to`: channels and blocks of a detector, cut by what is lost for each millisecond saved."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.graph import BlockList, ChannelGroup, Topology
from jdkd.latency.layers import part_of, shapes_after
from jdkd.latency.table import LAYERS, OUTPUTS, REGIONS, LatencyTable, regions_of, size_of
from jdkd.morph.actions import Morph, shorten
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Rewrite
from jdkd.rewrite.blocks import removable
from jdkd.rewrite.channels import require_traced

FINEST = 32  # steps in which a group is cut at most
FLOOR = 0.25  # no group and no list of blocks loses more than the rest in one cut


def cut_to(
    model: nn.Module,
    topology: Topology,
    table: LatencyTable,
    aim: float,
    importance: Mapping[str, Tensor],
    *,
    shorter: Sequence[str] = (),
    min_size: int | None = None,
    regions: int | None = None,
    floor: float = FLOOR,
    temperature: float = 0.0,
    rng: random.Random | None = None,
) -> Morph:
    """Cuts channels of all groups, and whole blocks, until the predicted latency meets an aim.

    Greedy: again and again that group is cut by one step, :meth:`jdkd.graph.ChannelGroup.shrunk` gives its size, or
    that block leaves, which loses least for what it saves, as the detector is by then; what it saves beyond the aim
    counts for nothing, so that a few channels may pay for the last per cent in a block's place. A block loses its
    importance. A group of which the share s of its importance I is left has lost ``-I log s``: the first channels cost
    what they weigh, the last ones more and more, as what reads them has less to make up for them. (Our choice; what it
    is worth against the plain sum in a whole search was not measured.)

    Args:
        model: the detector to cut, the table's base or a descendant of it.
        topology: of it.
        table: of its base on this device.
        aim: predicted latency over the base's, at most.
        importance: of every unit of every group and of every block, see :func:`channel_importance`; what is without it
            stays.
        shorter: lists of blocks that lose their weakest block as well.
        min_size: the short side of the input as well, in pixels.
        regions: how many a two-stage detector proposes in evaluation, as well.
        floor: share of its units that each group keeps, and of its blocks each list; one may always leave.
        temperature: spread of the factors, ``exp(temperature * N(0, 1))`` for each group and list, by which importance
            is multiplied: at 0 always the same cut, above that a different one for each state of ``rng``.
        rng: the source of chance; needed above 0.

    Returns:
        The cut as data, which may be no cut at all where blocks and input alone reach the aim.

    Raises:
        InputError: the aim cannot be reached, or an argument is out of range.
    """
    model = unwrapped(model)
    require_traced(model, topology)
    if not (0 < floor <= 1 and aim > 0 and temperature >= 0) or (temperature and rng is None):
        raise InputError(
            f"aim {aim} must be above 0, floor {floor} in (0, 1], temperature {temperature} at least 0, above it with "
            "an rng."
        )
    _require_importance(topology, importance)
    around = shorten(model, topology, shorter, min_size, regions)
    costs = _Costs.of(model, topology, table, around.rewrite)
    groups = [group for group in topology.groups if group.name in importance]
    rows = [_Row(group, importance[group.name], floor, _factor(temperature, rng)) for group in groups]
    lists = [
        _Shortened(model, blocks, around.rewrite, importance, floor, _factor(temperature, rng))
        for blocks in topology.block_lists
    ]
    losing: tuple[_Row | _Shortened, ...] = (*rows, *lists)
    while (needed := costs.ratio() - aim) > 0:
        offers = [offer for each in losing for offer in each.offers(costs)]
        if not offers:
            raise InputError(
                f"no cut of {', '.join([around.action] if around.action else ['channels'])} reaches {aim:.3f} of the "
                f"base's latency: {costs.ratio():.3f} is the least with a floor of {floor:g} of each group; lower the "
                "floor, take blocks or input size away too, or cut again later."
            )
        min(offers, key=lambda offer: offer.lost / min(offer.saved, needed)).take()
    rows = [row for row in rows if row.left < row.group.units and costs.has(row.group.name)]
    left = {each.blocks.name: each.order() for each in lists if each.gone}
    action = "; ".join(filter(None, [around.action, *(each.said() for each in lists if each.gone), _said(rows, table)]))
    keep = {row.group.name: row.kept() for row in rows}
    return Morph(action or "cut nothing", replace(around.rewrite, keep=keep, blocks={**around.rewrite.blocks, **left}))


def _require_importance(topology: Topology, importance: Mapping[str, Tensor]) -> None:
    units = {group.name: group.units for group in topology.groups}
    units |= {path: 1 for blocks in topology.block_lists for path in blocks.blocks}
    for name, count in units.items():
        values = importance.get(name)
        if values is not None and (tuple(values.shape) != (count,) or not (values >= 0).all()):
            raise InputError(
                f"importance of {name} must be numbers of at least 0 for its {count} units (a block is one), got a "
                f"tensor {list(values.shape)} from {values.min():.3g} to {values.max():.3g}; give "
                "channel_importance() of this very model."
            )


def _factor(temperature: float, rng: random.Random | None) -> float:
    return math.exp(temperature * rng.gauss(0.0, 1.0)) if temperature and rng else 1.0


@dataclass(frozen=True)
class _Offer:
    """A step: what it loses of the importance, what it saves of the latency, and how it is taken."""

    lost: float
    saved: float
    take: Callable[[], None]


class _Row:
    """A group while it is cut: ``steps`` are the numbers of units at which it may stop, descending."""

    def __init__(self, group: ChannelGroup, values: Tensor, floor: float, factor: float) -> None:
        self.group = group
        self.order = values.argsort(descending=True, stable=True).numpy()  # units, the most important first
        sums = np.concatenate([[0.0], np.cumsum(values.double().numpy()[self.order])])
        least = group.shrunk(floor)
        wanted = [group.shrunk(share / FINEST) for share in range(FINEST, 0, -1)]
        self.steps = sorted({units for units in wanted if units >= least} | {group.units}, reverse=True)
        share = np.maximum(sums, 1e-9 * sums[-1]) / max(sums[-1], 1e-30)
        # [units + 1], importance lost where so many are left
        self.lost = -sums[-1] * np.log(np.maximum(share, 1e-9)) * factor

    def offers(self, costs: _Costs) -> Iterator[_Offer]:
        if len(self.steps) > 1 and (saved := costs.saved(self.group.name, self.steps[0] - self.steps[1])) > 0:
            lost = float(self.lost[self.steps[1]] - self.lost[self.steps[0]])
            yield _Offer(lost, saved, partial(self._cut, costs))

    def _cut(self, costs: _Costs) -> None:
        costs.cut(self.group.name, self.steps[0] - self.steps[1])
        self.steps.pop(0)

    @property
    def left(self) -> int:
        return self.steps[0]

    def kept(self) -> tuple[int, ...]:
        return tuple(sorted(self.order[: self.left].tolist()))


class _Shortened:
    """A list of blocks while blocks leave it."""

    def __init__(
        self,
        model: nn.Module,
        blocks: BlockList,
        around: Rewrite,
        importance: Mapping[str, Tensor],
        floor: float,
        factor: float,
    ) -> None:
        count = len(blocks.blocks)
        self.blocks, self.gone = blocks, set[int]()
        self._left = set(around.blocks.get(blocks.name, range(count)))
        known = {place: importance.get(path) for place, path in enumerate(blocks.blocks)}
        self._lost = {place: factor * value.item() for place, value in known.items() if value is not None}
        may = min(removable(model, blocks), max(1, int((1 - floor) * count)))
        self._may = may - (count - len(self._left))

    def offers(self, costs: _Costs) -> Iterator[_Offer]:
        if len(self.gone) < self._may:
            for place, lost in self._lost.items():
                if place not in self.gone and (saved := costs.saved_without(self.blocks.blocks[place])) > 0:
                    yield _Offer(lost, saved, partial(self._remove, costs, place))

    def _remove(self, costs: _Costs, place: int) -> None:
        costs.remove(self.blocks.blocks[place])
        self.gone.add(place)

    def order(self) -> tuple[int, ...]:
        return tuple(sorted(self._left - self.gone))

    def said(self) -> str:
        return f"remove {'a block' if len(self.gone) == 1 else f'{len(self.gone)} blocks'} of {self.blocks.name}"


class _Costs:
    """Predicted latency of a detector while its groups are cut."""

    def __init__(
        self,
        fixed: float,
        sizes: np.ndarray,
        rates: np.ndarray,
        touched: dict[str, tuple[np.ndarray, np.ndarray]],
        inside: dict[str, np.ndarray],
    ) -> None:
        self._fixed, self._sizes, self._rates = fixed, sizes, rates
        self._touched, self._inside = touched, inside
        self._each = self._of(sizes, rates)  # [weights]
        self._saved = defaultdict[str, dict[int, float]](dict)  # by group and units, by block and 0; as it is by now
        self._savers: list[set[str]] = [set() for _ in sizes]  # by weight, the groups and blocks that save some of it
        for name, lines in (*((group, lines) for group, (lines, _) in touched.items()), *inside.items()):
            for line in lines.tolist():
                self._savers[line].add(name)

    @classmethod
    def of(cls, model: nn.Module, topology: Topology, table: LatencyTable, around: Rewrite) -> _Costs:
        """Of the detector after what is done besides."""
        shapes, regions = shapes_after(model, topology, around), regions_of(model, around)
        places = table.places(shapes, size_of(model, around), regions)
        names = list(places)
        dims = max(len(shapes[name]) for name in names)
        sizes = np.array([[*shapes[name], *[1] * (dims - len(shapes[name]))] for name in names], dtype=float)
        by_part = [table.costs.get(part_of(name.rpartition(".")[0], table.containers), 0.0) for name in names]
        rates = np.array([[cost, table.costs.get(OUTPUTS, 0.0)] for cost in by_part])
        rates *= np.array([[places[name]] for name in names])
        rates = np.hstack([rates, np.full((len(names), 1), table.costs.get(LAYERS, 0.0))])
        number = {name: place for place, name in enumerate(names)}
        touched: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by group: its weights, and how often it stands in each
        for group in topology.groups:
            slots = [slot for slot in group.slots if slot.tensor in number]
            lines = sorted({number[slot.tensor] for slot in slots})
            repeats = np.zeros((len(lines), dims))
            for slot in slots:
                repeats[lines.index(number[slot.tensor]), slot.dim] += slot.repeat
            touched |= {group.name: (np.array(lines), repeats)} if lines else {}
        inside = {
            path: np.array([line for name, line in number.items() if name.startswith(f"{path}.")], dtype=int)
            for blocks in topology.block_lists
            for path in blocks.blocks
        }
        fixed = table.fixed + table.costs.get(REGIONS, 0.0) * regions
        return cls(fixed, sizes, rates, touched, inside)

    def ratio(self) -> float:
        return self._fixed + float(self._each.sum())

    def has(self, group: str) -> bool:
        """Whether anything that a group runs through is still there."""
        return group in self._touched and bool(self._rates[self._touched[group][0]].any())

    def saved(self, group: str, units: int) -> float:
        """What it saves to cut so many units of a group."""
        if group not in self._touched:
            return 0.0
        known = self._saved[group]
        if units not in known:
            lines, sizes = self._after(group, units)
            known[units] = float(self._each[lines].sum() - self._of(sizes, self._rates[lines]).sum())
        return known[units]

    def cut(self, group: str, units: int) -> None:
        lines, sizes = self._after(group, units)
        self._sizes[lines], self._each[lines] = sizes, self._of(sizes, self._rates[lines])
        self._changed(lines)

    def saved_without(self, block: str) -> float:
        """What it saves to remove a block."""
        known = self._saved[block]
        if 0 not in known:
            known[0] = float(self._each[self._inside[block]].sum())
        return known[0]

    def remove(self, block: str) -> None:
        self._rates[self._inside[block]] = self._each[self._inside[block]] = 0.0
        self._changed(self._inside[block])

    def _changed(self, lines: np.ndarray) -> None:
        """Forgets what was saved by whoever saves something of these weights."""
        for line in lines.tolist():
            for name in self._savers[line]:
                self._saved.pop(name, None)

    def _after(self, group: str, units: int) -> tuple[np.ndarray, np.ndarray]:
        lines, repeats = self._touched[group]
        return lines, self._sizes[lines] - units * repeats

    @staticmethod
    def _of(sizes: np.ndarray, rates: np.ndarray) -> np.ndarray:  # -> [weights]
        return rates[:, 0] * sizes.prod(1) + rates[:, 1] * sizes[:, 0] + rates[:, 2]


def _said(rows: Sequence[_Row], table: LatencyTable) -> str:
    """How many of the channels of each part are left, in words."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        found = counts[part_of(row.group.makers[0], table.containers)]
        found[0] += row.left * (row.group.size // row.group.units)
        found[1] += row.group.size
    shares = [f"{name} {left / whole:.0%}" for name, (left, whole) in counts.items() if left < whole]
    return f"keep {', '.join(shares)} of the channels" if shares else ""
