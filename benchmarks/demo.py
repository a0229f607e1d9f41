"""What `make demo` found, over several seeds: collects the results and renders the README's table.

python -m benchmarks.demo runs/demo/search runs/demo-1/search    append their results to the committed file
python -m benchmarks.demo                                        print the table of what has been committed
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from jdkd.errors import InputError

RESULTS = Path(__file__).parent / "results" / "cpu" / "demo.jsonl"
NETWORKS = ("base", "control", "control_single", "student")


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """The results of finished searches.

    Raises:
        InputError: a folder holds none.
    """
    found = []
    for folder in folders:
        file = folder / "result.json"
        if not file.is_file():
            raise InputError(f"{folder} holds no result.json; give the folder of a finished search.")
        found.append(json.loads(file.read_text()))
    return found


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: a row per seed, and the means.

    Args:
        results: contents of `result.json`, one per seed.
    """
    lines = [
        "| seed | base mAP | control | control, one cycle | student | student p50 / base p50 (95 %) | params |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda result: result["seed"]):
        scores = [f"{result[name]['map']:.3f}" for name in NETWORKS]
        student, (low, high) = result["student"], result["student"]["latency_ratio_interval"]
        ratio = f"{student['latency_ratio']:.3f} ({low:.3f}–{high:.3f})"
        params = f"{student['params'] / result['base']['params']:.2f} x"
        lines.append(f"| {result['seed']} | {' | '.join(scores)} | {ratio} | {params} |")
    means = [f"{statistics.mean(result[name]['map'] for result in results):.3f}" for name in NETWORKS]
    ratio = statistics.mean(result["student"]["latency_ratio"] for result in results)
    size = statistics.mean(result["student"]["params"] / result["base"]["params"] for result in results)
    return "\n".join([*lines, f"| mean | {' | '.join(means)} | {ratio:.3f} | {size:.2f} x |"])


def main(arguments: list[str]) -> None:
    if arguments:
        rows = collect([Path(argument) for argument in arguments])
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if not RESULTS.is_file():
        raise SystemExit("nothing has been committed yet; give the folders of finished searches")
    print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))


if __name__ == "__main__":
    main(sys.argv[1:])
