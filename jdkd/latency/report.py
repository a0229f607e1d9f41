"""What a measurement returns and how it is stored."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jdkd.errors import InputError
from jdkd.latency.statistics import LEVEL, Latency, Ratio, bootstrap_ratio, ratio_over_processes
from jdkd.latency.watching import slowed, unreadable

MODES = "end_to_end", "model_only"
CONTROL_LEVEL = 0.99  # so that one report in a hundred, and not one in twenty, is called wrong where all is well
_bootstrap = lru_cache(256)(bootstrap_ratio)  # a report asks for the same ratio again and again
FASTER, SLOWER, NOT_RESOLVED = "faster", "slower", "not resolved"


@dataclass(frozen=True)
class ModelLatency:
    """Latencies of one model, per call.

    Args:
        end_to_end: images on the host to boxes on the host; None where it was not asked for, as the other.
        model_only: prepared batch to boxes after NMS.
        facts: parameters, dtypes, channels_last, batch_norms (left unfolded), the id of its architecture, and what else
            was found out about what was timed.
    """

    end_to_end: Latency | None = None
    model_only: Latency | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def modes(self) -> dict[str, Latency]:
        """The modes that were measured."""
        named = {name: getattr(self, name) for name in MODES}
        return {name: latency for name, latency in named.items() if latency is not None}


@dataclass(frozen=True)
class LatencyReport:
    """A measurement: every model's samples, the machine and the protocol.

    Args:
        models: by name, the base first.
        environment: device, versions, threads, TF32: what must be the same where two reports are compared.
        protocol: runtime, dtype, order, batch size, images, schedule, and how every process went, in ``runs``.
        control: the base once more, timed in turn with all others as if it were another model.
        processes: rounds of each process whose samples follow each other here, where there were several.
    """

    models: dict[str, ModelLatency]
    environment: dict[str, Any]
    protocol: dict[str, Any]
    control: ModelLatency | None = None
    processes: tuple[int, ...] = ()

    @property
    def base(self) -> str:
        """Name of the model that ratios refer to."""
        return next(iter(self.models))

    def ratio(self, name: str, *, mode: str = "end_to_end") -> Ratio:
        """Median latency of a model over that of the base, with a 95 % interval.

        Args:
            name: of the model.
            mode: `end_to_end` or `model_only`.

        Returns:
            See :func:`jdkd.latency.statistics.bootstrap_ratio`; of several processes
            :func:`jdkd.latency.statistics.ratio_over_processes`.
        """
        return self._ratio(self.models[name], mode, LEVEL)

    def control_ratio(self, *, mode: str = "end_to_end") -> Ratio | None:
        """A/A: the base over itself, with a 99 % interval that must hold 1; None where no control was timed."""
        return self._ratio(self.control, mode, CONTROL_LEVEL) if self.control else None

    def control_holds(self, *, mode: str = "end_to_end") -> bool:
        """Whether the harness finds the base as fast as itself; True where that was not tried."""
        found = self.control_ratio(mode=mode)
        return found is None or found.spans_one

    def verdict(self, name: str, *, mode: str = "end_to_end") -> str:
        """`faster` or `slower` than the base, or `not resolved`: the interval spans 1, or A/A's does not."""
        ratio = self.ratio(name, mode=mode)
        if ratio.spans_one or not self.control_holds(mode=mode):
            return NOT_RESOLVED
        return FASTER if ratio.value < 1 else SLOWER

    def warnings(self) -> list[str]:
        """What a reader must know before believing it: a failed control, a cold or a slowed-down machine."""
        found = []
        for mode in self.models[self.base].modes():
            if not self.control_holds(mode=mode):
                found.append(
                    f"A/A fails in {mode}: the base against itself is {self.control_ratio(mode=mode)}, which does not "
                    "contain 1, so nothing in that mode is resolved; measure longer, on a quieter machine"
                )
        runs = self.protocol.get("runs", [])
        for number, run in enumerate(runs, 1):
            where = f"process {number}: " if len(runs) > 1 else ""
            if not run["stable"]:
                found.append(f"{where}NOT stable after {run['warmup_seconds']:.1f} s of warm-up")
            found += [f"{where}{what}: compare ratios, not times" for what in slowed(run["readings"])]
        return found

    def not_read(self) -> list[str]:
        """What this machine does not show of its clocks and of what slows them down."""
        runs = self.protocol.get("runs", [])
        return unreadable(runs[0]["readings"]) if runs else []

    def to_json(self) -> dict[str, Any]:
        """JSON-able form with raw samples, percentiles (ms), the ratios to the base and the verdicts."""
        models = {}
        for name, model in self.models.items():
            modes = {}
            for mode, latency in model.modes().items():
                verdict = {} if name == self.base else {"verdict": self.verdict(name, mode=mode)}
                modes[mode] = {**latency.to_json(), **self._ratios(model, mode, LEVEL), **verdict}
            models[name] = {**modes, "facts": model.facts}
        control = None
        if self.control:
            control = {
                mode: {
                    **latency.to_json(),
                    **self._ratios(self.control, mode, CONTROL_LEVEL),
                    "holds": self.control_holds(mode=mode),
                }
                for mode, latency in self.control.modes().items()
            }
        return {
            "base": self.base,
            "models": models,
            "control": control,
            "environment": self.environment,
            "protocol": self.protocol,
            "processes": list(self.processes),
            "warnings": self.warnings(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyReport:
        """Inverse of :meth:`to_json`; summaries are computed anew from the samples."""
        names = sorted(data["models"], key=lambda name: name != data["base"])  # base first, the others in order
        models = {name: _model_from(data["models"][name]) for name in names}
        control = _model_from(data["control"]) if data.get("control") else None
        return cls(models, data["environment"], data["protocol"], control, tuple(data.get("processes", ())))

    def _ratio(self, model: ModelLatency, mode: str, level: float) -> Ratio:
        own, base = (each.modes()[mode].samples for each in (model, self.models[self.base]))
        if len(self.processes) < 2:
            return _bootstrap(own, base, level=level)
        return ratio_over_processes(self._of_processes(own, base), level=level)

    def _ratios(self, model: ModelLatency, mode: str, level: float) -> dict[str, Any]:
        """The ratio to the base as it is stored; of several processes with that of each."""
        ratio, own = self._ratio(model, mode, level), model.modes()[mode].samples
        found = {"ratio": ratio.value, "ratio_interval": list(ratio.interval), "ratio_level": level}
        if len(self.processes) > 1:
            base = self.models[self.base].modes()[mode].samples
            within = _bootstrap(own, base, level=level)
            found |= {"ratio_of_process": self._of_processes(own, base), "ratio_interval_within": list(within.interval)}
        return found

    def _of_processes(self, own: Sequence[float], base: Sequence[float]) -> list[float]:
        """The ratio of medians of each process."""
        ends = [2 * sum(self.processes[:count]) for count in range(len(self.processes) + 1)]
        pairs = [(own[start:end], base[start:end]) for start, end in itertools.pairwise(ends)]
        return [Latency(tuple(mine)).p50 / Latency(tuple(theirs)).p50 for mine, theirs in pairs]


def pooled(reports: Sequence[LatencyReport]) -> LatencyReport:
    """One report of the same measurement in several processes.

    Args:
        reports: one of each process, of the same models.

    Raises:
        InputError: the machine changed between them.
    """
    first = reports[0]
    for number, report in enumerate(reports[1:], 2):
        require_same_environment(first.environment, report.environment, "process 1", f"process {number}")
    models = {name: _joined([report.models[name] for report in reports]) for name in first.models}
    control = _joined([report.control for report in reports]) if first.control else None
    runs = [run for report in reports for run in report.protocol["runs"]]
    rounds = tuple(run["rounds"] for run in runs)
    return LatencyReport(models, first.environment, first.protocol | {"runs": runs}, control, rounds)


def require_same_environment(
    first: Mapping[str, Any], second: Mapping[str, Any], first_name: str, second_name: str
) -> None:
    """Refuses to compare what was measured under different conditions.

    Args:
        first, second: of two reports.
        first_name, second_name: for the message.

    Raises:
        InputError: they differ; the message names in what.
    """
    changed = [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]
    if changed:
        said = "; ".join(f"{name} was {first.get(name)} and is {second.get(name)}" for name in changed)
        raise InputError(
            f"{first_name} and {second_name} were measured in different environments, and cannot be compared: {said}; "
            "measure both on one machine, set up the same."
        )


def _joined(parts: Sequence[ModelLatency | None]) -> ModelLatency:
    """The samples of one model of several processes, one after the other; facts of the first."""
    found = [part for part in parts if part is not None]
    samples = {
        mode: Latency(tuple(ms for part in found for ms in part.modes()[mode].samples)) for mode in found[0].modes()
    }
    return ModelLatency(**samples, facts=found[0].facts)


def _model_from(entry: Mapping[str, Any]) -> ModelLatency:
    modes = {mode: Latency.from_json(value) for mode, value in entry.items() if mode in MODES}
    return ModelLatency(**modes, facts=entry.get("facts", {}))
