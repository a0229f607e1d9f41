"""See :class:`Shown`: what `jdkd latency` prints and writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from jdkd.latency import Cost, LatencyReport, ModelLatency, Ratio, StageProfile

MODES = {"end_to_end": "end to end", "model_only": "model only"}


@dataclass(frozen=True)
class Shown:
    """Measurements of the same detectors.

    Args:
        reports: one for every runtime, dtype and batch size.
        costs: of the detectors.
        profiles: where the time of each goes; empty where that was not asked for.
        origin: of the images.
    """

    reports: Sequence[LatencyReport]
    costs: Mapping[str, Cost]
    profiles: Mapping[str, StageProfile]
    origin: str

    def to_json(self) -> dict[str, Any]:
        """All samples, and what they were taken of, JSON-able."""
        return {
            "measurements": [report.to_json() for report in self.reports],
            "cost": {name: {"params": one.params, "gmacs": one.gmacs} for name, one in self.costs.items()},
            "profile": {name: one.to_json() for name, one in self.profiles.items()},
            "origin": self.origin,
        }

    def print(self, console: Console) -> None:
        """Prints tables, what they were measured under, and what is wrong with them."""
        first = self.reports[0]
        console.print(self._detectors(first))
        sizes = {name: "x".join(map(str, cost.size)) for name, cost in self.costs.items()}
        same = set(sizes.values()) if len(set(sizes.values())) == 1 else (f"{size} {n}" for n, size in sizes.items())
        line = f"GMACs: of the largest image that a detector resizes to, {', '.join(same)}"
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
        for report in self.reports:
            console.print(_latencies(report))
            for line in _conditions(report, self.origin):
                console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
            for line in report.warnings():
                console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
        if len(self.reports) > 1 and len(first.models) > 1:
            console.print(self._side_by_side())
        if self.profiles:
            console.print(self._stages())
            ceilings = next(iter(self.profiles.values())).ceilings
            rates = sorted(rate / 1e9 for _, rate in ceilings.copies)
            console.print(
                f"roofline: every operator by itself at {ceilings.flops / 1e9:.0f} GFLOP/s or, by the bytes it moves, "
                f"{rates[0]:.0f} to {rates[-1]:.0f} GB/s: the most of a matrix product or convolution, and of copies",
                style="dim", markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
            for name, profile in self.profiles.items():
                if not profile.sums_up:
                    console.print(
                        f"{name}: the stages add up to {sum(profile.stages.values()):.1f} ms, and without a stopwatch "
                        f"it takes {profile.whole:.1f} ms: do not believe their shares",
                        style="bold red", markup=False, highlight=False, soft_wrap=True,
                    )  # fmt: skip

    def _detectors(self, report: LatencyReport) -> Table:
        """Size of every detector, what it finds and takes in the first runtime, and which weights it has."""
        table = _table("Detectors", ("params", "GMACs", "found/image", "peak MB", "weights SHA-256"))
        for name, model in report.models.items():
            facts, cost = model.facts, self.costs[name]
            memory = facts.get("peak_memory_bytes")
            table.add_row(
                name,
                f"{cost.params / 1e6:.2f} M",
                f"{cost.gmacs:.2f}",
                f"{facts['detections_per_image']:.1f}",
                "not read" if memory is None else f"{memory / 1e6:.0f}",
                facts.get("weights_sha256", "")[:12],
            )
        return table

    def _side_by_side(self) -> Table:
        """The ratio of every student in every runtime, dtype and batch size."""
        table = _table("Latency over the base's in the same runtime (95 %)", map(_label, self.reports), left=2)
        for name in list(self.reports[0].models)[1:]:
            for mode in MODES:
                cells = [
                    _compared(report, name, model, mode) if mode in (model := report.models[name]).modes() else "–"
                    for report in self.reports
                ]
                if set(cells) != {"–"}:
                    table.add_row(name, MODES[mode], *cells)
        return table

    def _stages(self) -> Table:
        """Where the time goes, and how much of it each stage needs at least."""
        stages = list(next(iter(self.profiles.values())).stages)
        table = _table("Where the time goes, ms, eager", (*stages, "sum", "whole"))
        for name, profile in self.profiles.items():
            figures = [*profile.stages.values(), sum(profile.stages.values()), profile.whole]
            table.add_row(name, *(f"{figure:.1f}" for figure in figures))
            least = [*profile.least.values(), sum(profile.least.values())]
            shares = [
                f"{low:.1f} ({low / took:.0%})" if took else "–" for low, took in zip(least, figures, strict=False)
            ]
            table.add_row("  at the roofline", *shares, "")
        return table


def _table(title: str, headings: Any, left: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title)
    table.collapse_padding = True
    table.add_column("detector", overflow="fold")
    for place, heading in enumerate((["mode"] if left == 2 else []) + list(headings), 1):
        table.add_column(heading, justify="left" if place < left else "right", no_wrap=True)
    return table


def _latencies(report: LatencyReport) -> Table:
    """Percentiles of every detector and mode, and the ratio to the base; the base against itself below it."""
    headings = ("p50", "p90", "p99", "IQR", "ratio (95 %)")
    table = _table(f"Latency per call, ms: {_label(report)}", headings, left=2)
    for name, model, mode in _rows(report):
        latency = model.modes()[mode]
        figures = [f"{getattr(latency, which):.1f}" for which in ("p50", "p90", "p99", "iqr")]
        score = f"\nmAP {model.facts['map']:.3f}" if "map" in model.facts else ""
        table.add_row(name + score, MODES[mode], *figures, _compared(report, name, model, mode))
    return table


def _rows(report: LatencyReport) -> Iterator[tuple[str, ModelLatency, str]]:
    for name, model in report.models.items():
        yield from ((name, model, mode) for mode in model.modes())
        if name == report.base and report.control:
            yield from (("A/A: it again", report.control, mode) for mode in report.control.modes())


def _compared(report: LatencyReport, name: str, model: ModelLatency, mode: str) -> str:
    if model is report.control:
        return _ratio(report.control_ratio(mode=mode)) + ("" if report.control_holds(mode=mode) else "\nA/A FAILS")
    if name == report.base:
        return "1"
    verdict = report.verdict(name, mode=mode)
    return _ratio(report.ratio(name, mode=mode)) + (f"\n{verdict}" if verdict == "not resolved" else "")


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def _label(report: LatencyReport) -> str:
    protocol = report.protocol
    return f"{protocol['runtime']}, {protocol['dtype']}, batch {protocol['batch_size']}"


def _conditions(report: LatencyReport, origin: str) -> list[str]:
    """What the table was measured under."""
    machine, protocol = report.environment, report.protocol
    runs, facts = protocol["runs"], [model.facts for model in report.models.values()]
    rounds, seconds = sum(run["rounds"] for run in runs), sum(run["seconds"] for run in runs)
    over = f" in {len(runs)} processes" if len(runs) > 1 else ""
    samples = next(iter(report.models[report.base].modes().values())).n
    sources = protocol["sources"]
    at = f"commit {sources['commit'][:12]}{', changed since' if sources['dirty'] else ''}" if sources["commit"] else ""
    lines = [
        f"{machine['device_name']} ({machine['device']}), {machine['threads']} threads, torch {machine['torch']}, "
        f"{protocol['runtime']} {machine['runtime_version']}, {machine['clock']}; "
        f"jdkd {sources['version']} {at}".rstrip(),
        f"{origin}; {rounds} rounds in {seconds:.0f} s{over}, n {samples} each, interleaved (ABBA); A/A at 99 %",
        *(
            f"{MODES[mode]}: {inside}"
            for mode, inside in facts[0]["inside"].items()
            if mode in report.models[report.base].modes()
        ),
        f"clocks and throttling: {protocol['watch']}"
        + (f"; not shown by this machine: {', '.join(missing)}" if (missing := report.not_read()) else ""),
    ]
    if "tf32_convolution" in machine:
        lines.append(f"TF32: convolutions {machine['tf32_convolution']}, matrix products {machine['tf32_matmul']}")
    left = {name: model.facts["batch_norms"] for name, model in report.models.items() if model.facts["batch_norms"]}
    if left:
        lines.append(f"batch norms that could not be folded: {left}")
    return lines
