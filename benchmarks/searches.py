"""What searches found, by seeds: keeps the results of finished ones and prints them as a table.

python -m benchmarks.searches demo runs/demo/search runs/demo-1/search    keep the results of `make demo`
python -m benchmarks.searches blood_cells                                 print the table of those that are kept
"""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import markdown, record
from jdkd.errors import InputError
from jdkd.search import Archive
from jdkd.search.archive import ARCHIVE

NAMES = (  # what searches are of, in the order of the pages; benchmarks.proof.RECIPES says what most are
    "demo",  # `make demo`
    "digit_scenes",  # an FCOS on 700 digit scenes of 224 px, from a base of 1,000 steps
    "digit_scenes_128",
    "digit_scenes_deep",
    "digit_scenes_deep_long",
    "digit_scenes_deep_sizes",
    "digit_scenes_deep_front",
    "digit_scenes_r50",
    "blood_cells_deep",
    "blood_cells_deep_short",
    "blood_cells_deep_short_onnxruntime",
    "blood_cells_deep_short_onnxruntime_anew",  # the same where files are opened anew, on a Xeon
    "blood_cells_deep_many",  # of 95 candidates, by --candidates 48 --proposals 48
    "blood_cells_deep_front",
    "blood_cells_deep_two_stage",
    "blood_cells_deep_two_stage_front",
    "blood_cells",
)
HEADINGS = ("target", "seed", "base mAP", "control", "student", "student p50 / base p50 (95 %)", "params", "steps")


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """The results of finished searches, with the names of files and folders in place of where they lie.

    Raises:
        InputError: a folder holds none.
    """
    found = []
    for folder in folders:
        file = folder / "result.json"
        if not file.is_file():
            raise InputError(f"{folder} holds no result.json; give the folder of a finished search.")
        result = json.loads(file.read_text())
        for part in ("selection", "report"):
            result[part] |= {name: Path(result[part][name]).name for name in ("image_folder", "annotations")}
        result["command"] = " ".join(Path(word).name for word in shlex.split(result["command"]))
        with closing(Archive(folder / ARCHIVE)) as archive:
            found.append(result | {"candidates": len(archive) - 1, "lineages": lineages(archive, result)})
    return found


def lineages(archive: Archive, result: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """How the student of each target came up: steps of its lineage and mAP on the images that select, base first."""
    known = {one.id: one for one in archive.scored}
    found = {}
    for student in result["students"]:
        path, one = [], known.get(student["id"])
        while one is not None:
            path.append((one.lineage_steps, one.map))
            one = known.get(one.parent)
        found[f"{student['target']:g}"] = path[::-1]
    return found


def learning(kept: Mapping[str, list[dict[str, Any]]]) -> str:
    """A Markdown table of what students had at each stop of their lineages, where that was kept.

    Args:
        kept: contents of `result.json` by what the searches are of; of a seed that occurs twice, the later one counts.
    """
    heads, lines = ("searches", "target", "seed", "base", "student, by the steps of its lineage"), []
    for name, results in kept.items():
        for seed, result in sorted({result["seed"]: result for result in results}.items()):
            for target, ((_, base), *path) in result.get("lineages", {}).items():
                stops = ", ".join(f"{steps}: {value:.3f}" for steps, value in path)
                lines.append([name, target, seed, f"{base:.3f}", stops])
    return markdown.table(heads, "lrrrl", lines)


def spending(kept: Mapping[str, list[dict[str, Any]]]) -> str:
    """A Markdown table of what searches spent their time on, without their controls, where candidates were counted.

    Args:
        kept: as of :func:`learning`; searches of one worker, whose candidates' seconds are seconds of the whole.
    """
    heads = ("searches", "seed", "candidates", "steps", "seconds", "training", "scoring", "timing", "all else")
    lines = []
    for name, results in kept.items():
        for seed, result in sorted({result["seed"]: result for result in results if "candidates" in result}.items()):
            cost, count = result["cost"], result["candidates"]
            own, theirs = cost["seconds"], cost["candidate_seconds"]
            whole = sum(own.values()) - own.get("control", 0.0)
            spent = [
                own.get("pool", 0.0) + theirs.get("training", 0.0),
                own.get("scoring", 0.0) + theirs.get("scoring", 0.0),
                own.get("timing", 0.0),
            ]
            rest = whole - sum(spent)
            shares = [f"{share / whole:.1%}" for share in (*spent, rest)]
            steps = cost["pool_steps"] + cost["candidate_steps"]
            lines.append([name, seed, count, steps, f"{whole:.0f}", *shares, f"{rest / count:.1f} s"])
    return markdown.table((*heads, "a candidate"), "lr", lines)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each target and seed, and the means of each target.

    Args:
        results: contents of `result.json`; of a seed that occurs twice, the later one counts. Where the base took more
            or less than itself, by its 95 % interval, that stands beside the student's ratio.
    """
    results = sorted({result["seed"]: result for result in results}.values(), key=lambda result: result["seed"])
    lines = []
    targets = sorted({student["target"] for result in results for student in result["students"]}, reverse=True)
    for target in targets:
        pairs = [(result, one) for result in results for one in result["students"] if one["target"] == target]
        for result, student in pairs:
            low, high = student["latency_ratio_interval"]
            scores = [_map(result["base"]), _map(result.get("control", {})), _map(student)]
            ratio = f"{student['latency_ratio']:.3f} ({low:.3f}–{high:.3f}){_doubt(result)}"
            cells = [f"{target:g}", str(result["seed"]), *scores, ratio, f"{_size(result, student):.2f}×"]
            lines.append([*cells, student["train_steps"]])
        if len(pairs) > 1:
            means = [_mean(rows) for rows in ([r["base"] for r, _ in pairs], [r.get("control", {}) for r, _ in pairs])]
            ratio = statistics.mean(student["latency_ratio"] for _, student in pairs)
            size = statistics.mean(_size(result, student) for result, student in pairs)
            means.append(_mean([student for _, student in pairs]))
            lines.append([f"{target:g}", "mean ± sd", *means, f"{ratio:.3f}", f"{size:.2f}×", ""])
    return markdown.table(HEADINGS, "r", lines)


def _doubt(result: dict[str, Any]) -> str:
    """What a ratio cannot be told from, where the base timed against itself is not as fast as itself."""
    low, high = result.get("aa", {}).get("interval", (1.0, 1.0))
    return "" if low <= 1 <= high else f"; base itself {low:.3f}–{high:.3f}"


def _map(row: dict[str, Any]) -> str:
    return f"{row['map']:.3f}" if "map" in row else "–"


def _mean(rows: list[dict[str, Any]]) -> str:
    values = [row["map"] for row in rows if "map" in row]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else "–"


def _size(result: dict[str, Any], student: dict[str, Any]) -> float:
    return student["params"] / result["base"]["params"]


def main(arguments: list[str]) -> None:
    name, *folders = arguments or [NAMES[0]]
    if name not in NAMES:
        raise InputError(f"{name!r} is none of {', '.join(NAMES)}; begin with what the searches are of.")
    for result in collect([Path(folder) for folder in folders]):
        kind, threads = result["device"]["device"].partition(":")[0], result["device"]["threads"]
        record.append(record.result_file(kind, name, threads), [result])
    print(table(record.load(sorted(record.RESULTS.glob(f"*/{name}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
