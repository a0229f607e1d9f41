"""See :class:`LatencyTable`: what each part of a detector costs on a device, measured, and what a rewrite would."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from jdkd.detect.input_size import input_size, size_attributes
from jdkd.detect.regions import AFTER_NMS, region_attributes, region_count
from jdkd.graph import Topology
from jdkd.latency.layers import part_of, place_of, shapes_after, shapes_of
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Rewrite

RIDGE = 0.3  # what keeps the costs of parts that were hardly told apart from wandering, see LatencyTable
CERTAIN = 10.0  # how much more than others the base's own row weighs, whose ratio is 1
DOUBT = 3  # how many measurements that agree with the table it would take to believe it, see LatencyTable.corrected
OUTPUTS = "outputs"  # the feature that counts all outputs of all layers
LAYERS = "layers"  # the feature that counts the layers themselves
REGIONS = "regions"  # the feature that counts what a two-stage detector proposes
OF_ALL = OUTPUTS, LAYERS, REGIONS  # features of the whole detector, which are not held back by the ridge

Features = dict[str, float]
"""Multiply-accumulates of every part of a detector, by its name, and what it has of :data:`OF_ALL`."""


@dataclass(frozen=True)
class LatencyTable:
    """Predicts the latency of a base's descendants, over that of the base, from measured versions of the base.

    The latency is taken as a fixed cost, plus a cost for each multiply-accumulate that differs between the parts of the
    detector, plus one for each number that a layer writes, one for each layer, and one for each region that a two-stage
    detector proposes. Multiply-accumulates are products of what a layer reads and writes, so cuts on both sides of it
    are not counted twice. The costs, none of them negative, are those that explain the measured ratios best, by
    relative error, with a ridge. The form is our choice.

    Args:
        containers: paths of the modules that hold blocks.
        sizes: short sides of the input at which ``positions`` were counted, ascending; 0 where the base has none.
        positions: for every weight, at how many places it is applied at each of the sizes.
        rows: features of each measured version and its latency ratio to the base; the base's own comes first.
        factor: of all predictions, see :meth:`corrected`.
        nms: what the base's NMS takes beyond one that only counts, see :func:`jdkd.detect.proposals.steady_nms`, over
            the rest of the base's time.
        kept: how many boxes each NMS of the base keeps, call by call; so many are kept where no NMS is timed.
        regions: that the base proposes of an image, at most; 0 of a one-stage detector.
        of_regions: weights that are applied to each of them.
    """

    containers: tuple[str, ...]
    sizes: tuple[int, ...]
    positions: Mapping[str, tuple[float, ...]]
    rows: tuple[tuple[Features, float], ...]
    factor: float = 1.0
    nms: float = 0.0
    kept: tuple[int, ...] = ()
    regions: int = 0
    of_regions: tuple[str, ...] = ()

    def with_nms(self, ratio: float, regions: float = 0) -> float:
        """The latency ratio of a detector that keeps as many boxes as the base, from one measured without NMS.

        With fewer ``regions`` than the base proposes, NMS takes as much less. The base may be allowed more of them than
        its first NMS has to keep, as small images have few anchors.
        """
        most = min((self.regions, *self.kept[:1]))
        share = min(regions / most, 1.0) if regions and most else 1.0
        return (ratio + share * self.nms) / (1 + self.nms)

    def features(self, model: nn.Module, topology: Topology | None = None, rewrite: Rewrite | None = None) -> Features:
        """What the latency of a model, or of what a rewrite makes of it, is predicted from.

        Args:
            model: the base or a descendant.
            topology: of it; needed for a rewrite.
            rewrite: what would be done to it.
        """
        shapes = shapes_of(model)
        if rewrite is not None and topology is not None:
            shapes = shapes_after(unwrapped(model), topology, rewrite)
        found: dict[str, float] = defaultdict(float)
        regions = regions_of(model, rewrite)
        if self.regions:
            found[REGIONS] = regions
        for name, places in self.places(shapes, size_of(model, rewrite), regions).items():
            found[part_of(name.rpartition(".")[0], self.containers)] += places * math.prod(shapes[name])
            found[OUTPUTS] += places * shapes[name][0]
            found[LAYERS] += 1
        return dict(found)

    def places(self, names: Iterable[str], size: int, regions: int = 0) -> dict[str, float]:
        """At how many places each of a descendant's weights is applied; those that the base did not use are left out.

        Args:
            names: of the weights.
            size: short side of the input, in pixels; 0 for a detector without one.
            regions: proposed of an image; 0 for a one-stage detector.
        """
        squares, found = [each**2 for each in self.sizes], {}
        for name in names:
            known = place_of(name, self.containers, self.positions)
            if known is not None:
                counts = self.positions[known]
                found[name] = float(np.interp(size**2, squares, counts))
                if squares and size**2 > squares[-1]:
                    found[name] *= 1 + (size**2 / squares[-1] - 1) * (counts[-1] != counts[0])
                if known in self.of_regions:
                    found[name] *= regions / self.regions
        return found

    def ratio(self, features: Features) -> float:
        """Predicted latency over the base's."""
        return self.fixed + sum(self.costs[name] * value for name, value in features.items() if name in self.costs)

    def predict(self, model: nn.Module, topology: Topology | None = None, rewrite: Rewrite | None = None) -> float:
        """Predicted latency ratio to the base of a descendant, or of what a rewrite would make of it."""
        return self.ratio(self.features(model, topology, rewrite))

    def corrected(self, measured: Sequence[tuple[Features, float]]) -> LatencyTable:
        """The table with the factor by which descendants that were trained and measured are slower or faster.

        What they detect, and so the cost of NMS, need not be what the base does. (One factor instead of costs that are
        solved anew with the measured ones among the rows: our choice.)

        Args:
            measured: all of them, features and latency ratio to the base; of none it is the table as it was measured.
        """
        plain = replace(self, factor=1.0)
        logs = [math.log(ratio / plain.ratio(features)) for features, ratio in measured]
        return replace(self, factor=math.exp(sum(logs) / (len(logs) + DOUBT)))

    @property
    def fixed(self) -> float:
        """The share of the base's latency that no cut saves."""
        return self._solved[0]

    def left(self, target: float) -> float:
        """The share of what cuts can save that a descendant at a target has left, 0..1."""
        return max(0.0, target - self.fixed) / (1 - self.fixed) if self.fixed < 1 else 0.0

    @property
    def least(self) -> float:
        """The ratio of the fastest version of the base that was measured: short, narrow, but of its own input size."""
        return min(ratio for _, ratio in self.rows)

    @property
    def costs(self) -> dict[str, float]:
        """By feature, what one more of it adds to the ratio."""
        return self._solved[1]

    @cached_property
    def _solved(self) -> tuple[float, dict[str, float]]:
        base = self.rows[0][0]
        names = [name for name in base if base[name] > 0]
        shares = np.array([[1.0, *(row.get(name, 0.0) / base[name] for name in names)] for row, _ in self.rows])
        ratios = np.array([ratio for _, ratio in self.rows])
        ridge = np.array([0.0, *(0.0 if name in OF_ALL else RIDGE for name in names)])
        trust = np.where(np.arange(len(ratios)) == 0, CERTAIN, 1.0) / ratios
        solved = _non_negative(shares * trust[:, None], ratios * trust, ridge + 1e-9)
        solved *= self.factor
        return float(solved[0]), {n: float(s / base[n]) for n, s in zip(names, solved[1:], strict=True)}

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: it is of an earlier version, holds no measurement, or one that is no number.
        """
        if missing := [field.name for field in fields(cls) if field.name not in data]:
            raise ValueError(f"no {', '.join(missing)}, as in a table of an earlier version")
        measured = [ratio for _, ratio in data["rows"]]
        counted = [value for features, _ in data["rows"] for value in features.values()]
        if not measured or not min(measured) > 0 or not np.isfinite([*measured, *counted]).all():
            raise ValueError("rows are no measured latencies")
        return cls(
            containers=tuple(data["containers"]),
            sizes=tuple(data["sizes"]),
            positions={name: tuple(counts) for name, counts in data["positions"].items()},
            rows=tuple((dict(features), float(ratio)) for features, ratio in data["rows"]),
            factor=float(data["factor"]),
            nms=float(data["nms"]),
            kept=tuple(int(count) for count in data["kept"]),
            regions=int(data["regions"]),
            of_regions=tuple(data["of_regions"]),
        )


def regions_of(model: nn.Module, rewrite: Rewrite | None = None) -> int:
    """Regions that a detector proposes in evaluation after a rewrite, at most; 0 for one without any."""
    now = region_count(model)
    if now is None:
        return 0
    attributes = rewrite.attributes if rewrite is not None else {}
    path = next(name for name in region_attributes(model, now) if name.endswith(AFTER_NMS))
    return int(attributes[path]["testing"]) if path in attributes else now


def size_of(model: nn.Module, rewrite: Rewrite | None = None) -> int:
    """Short side of a detector's input after a rewrite, in pixels; 0 for one without an input size of its own."""
    now = input_size(model)
    if now is None:
        return 0
    attributes = rewrite.attributes if rewrite is not None else {}
    for name in size_attributes(model, now[0]) if attributes else ():
        if name in attributes and isinstance(attributes[name], tuple | list):
            return int(attributes[name][-1])
    return now[0]


def _non_negative(a: np.ndarray, b: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """What minimises |a x - b|^2 + ridge . x^2 over x >= 0."""
    from scipy.optimize import nnls

    return nnls(np.vstack([a, np.diag(np.sqrt(ridge))]), np.concatenate([b, np.zeros(len(ridge))]))[0]
