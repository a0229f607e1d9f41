"""Writes the tables of the README and of ``docs/``, and the pictures, from the committed result files:
``python -m benchmarks.readme``.

A table stands between ``<!-- results of OP -->`` and ``<!-- end of results -->``; a test holds that pages and result
files agree. Where an operator has goals, the table is theirs, and the other rows are left to the files; of
:data:`WHOLE` all rows are shown. :data:`MADE` says what is read off the code and the tests instead.
"""

import re
from pathlib import Path

from benchmarks import (
    ablations,
    accelerate,
    backends,
    criteria,
    data_loading,
    distillation_cost,
    distillation_page,
    front_figure,
    gains,
    goals,
    headlines,
    host,
    itself,
    latency_page,
    longer,
    parity,
    presets,
    record,
    searches,
    support,
)

WHOLE = ("pearson",)
ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
EXPERIMENTS = ROOT / "docs" / "experiments"
FRONT = ROOT / "docs" / "mAP-over-latency.svg"
OWN = {  # operators whose tables are not those of kernels
    ablations.OP: ablations.page,
    accelerate.OP: accelerate.table,
    criteria.OP: criteria.table,
    data_loading.OP: data_loading.table,
    "distillation": distillation_page.page,
    "distillation_swap": distillation_page.swaps,
    distillation_cost.OP: distillation_cost.page,
    gains.OP: gains.table,
    host.OP: host.table,
    itself.OP: itself.table,
    longer.OP: longer.table,
    parity.OP: parity.table,
    presets.OP: presets.table,
    "latency": latency_page.page,
}
MADE = {
    "support": support.table,
    "backends": backends.table,
    "learning": lambda: searches.learning({name: kept(name) for name in searches.NAMES}),
    "spending": lambda: searches.spending({name: kept(name) for name in searches.NAMES}),
}
_TABLE = re.compile(r"(<!-- results of (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def rendered(text: str) -> str:
    """A page's text with every table as the result files have it."""
    return _TABLE.sub(lambda found: f"{found[1]}{_table(found[2])}\n{found[3]}", text)


def _table(op: str) -> str:
    if op in MADE:
        return MADE[op]()
    rows = kept(op)
    if op == headlines.OP:
        return headlines.sentences(kept("pearson"), kept("elastic_conv"), kept(accelerate.OP))
    if op in goals.GOALS and op not in WHOLE:
        return goals.table(op, record.latest(rows))
    if not rows:
        return "Not measured."
    if op in OWN:
        return OWN[op](rows)
    return searches.table(rows) if op in searches.NAMES else record.table(record.latest(rows))


def kept(op: str) -> list[record.Row]:
    """All rows of an operator."""
    return record.load(sorted(record.RESULTS.glob(f"*/{op}.jsonl")))


def drawings() -> dict[Path, str]:
    """The pictures as the result files have them, by their files."""
    charts = distillation_page.charts(kept("distillation")) | latency_page.charts(kept("latency"))
    drawn = {EXPERIMENTS / name: svg for name, svg in charts.items()}
    drawn[FRONT] = front_figure.figure({name: kept(name) for name in front_figure.SHOWN})
    return {file: svg for file, svg in drawn.items() if svg}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    for file, drawn in drawings().items():
        file.write_text(drawn)
