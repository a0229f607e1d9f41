"""What `make demo` and `examples/blood_cells.sh` found, by seeds: keeps the results and prints them as a table.

python -m benchmarks.demo demo runs/demo/search runs/demo-1/search    keep the results of finished searches
python -m benchmarks.demo blood_cells                                 print the table of those that are kept
"""

import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from jdkd.errors import InputError

KEPT = ("demo", "blood_cells")
NETWORKS = ("base", "control", "control_single", "student")
HEADINGS = ("seed", "base mAP", "control", "control, one cycle", "student", "student p50 / base p50 (95 %)", "params")


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
        found.append(result)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: a row per seed, and the means.

    Args:
        results: contents of `result.json`; of a seed that occurs twice, the later one counts.
    """
    results = list({result["seed"]: result for result in results}.values())
    lines = [f"| {' | '.join(HEADINGS)} |", "| " + " | ".join(["---:"] * len(HEADINGS)) + " |"]
    for result in sorted(results, key=lambda result: result["seed"]):
        student, (low, high) = result["student"], result["student"]["latency_ratio_interval"]
        cells = [str(result["seed"]), *(f"{result[name]['map']:.3f}" for name in NETWORKS)]
        cells += [f"{student['latency_ratio']:.3f} ({low:.3f}–{high:.3f})"]
        lines.append(f"| {' | '.join([*cells, f'{_size(result):.2f}×'])} |")
    means = [f"{statistics.mean(result[name]['map'] for result in results):.3f}" for name in NETWORKS]
    ratio = statistics.mean(result["student"]["latency_ratio"] for result in results)
    size = statistics.mean(_size(result) for result in results)
    return "\n".join([*lines, f"| {' | '.join(['mean', *means, f'{ratio:.3f}', f'{size:.2f}×'])} |"])


def _size(result: dict[str, Any]) -> float:
    return result["student"]["params"] / result["base"]["params"]


def main(arguments: list[str]) -> None:
    name, *folders = arguments or [KEPT[0]]
    if name not in KEPT:
        raise InputError(f"{name!r} is none of {', '.join(KEPT)}; begin with what the searches are of.")
    for result in collect([Path(folder) for folder in folders]):
        record.append(record.result_file(result["device"]["device"].partition(":")[0], name), [result])
    print(table(record.load(sorted(record.RESULTS.glob(f"*/{name}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
