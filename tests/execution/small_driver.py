"""A search in miniature: two generations of three short trainings of a real detector, each from the best before."""

import json
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from jdkd.data import CocoDetectionDataset, Split
from jdkd.detect import load, save
from jdkd.execution import Journal, executor
from jdkd.files import content_hash, write_json
from jdkd.run_folder import RunFolder
from jdkd.train import TrainConfig, fit

STEPS = 6


@dataclass(frozen=True)
class ShortTrainings:
    """Trains its parent for some steps."""

    out: Path
    data: Path
    inputs: Mapping[str, Path]

    def open(self, device, progress):
        dataset = CocoDetectionDataset(Split(self.data, self.data / "annotations.json"))

        def evaluate(job):
            (name,) = self.writes(job)
            model = load(self.out / job["parent"] if job["parent"] else self.inputs["base"], device)
            config = TrainConfig(STEPS, batch_size=2, lr=1e-3, seed=job["number"], checkpoint_every=1, log_every=1)
            fit(
                model, dataset, config, device=device, folder=self.out / name / "training", resume=True,
                progress=lambda *state: progress(f"candidate {job['number']}:", *state),
            )  # fmt: skip
            save(self.out / name, model)
            return {"weights": content_hash(self.out / name / "weights.safetensors")}

        return evaluate

    def elsewhere(self, out, inputs):
        return replace(self, out=out, inputs=inputs)

    def reads(self, job):
        return [job["parent"]] if job["parent"] else []

    def writes(self, job):
        return [f"candidates/{job['number']:03d}"]


def drive(out: Path, data: Path, base: Path, progress, **where) -> list[dict]:
    """Runs it, or carries it on; returns its archive."""
    RunFolder(out).begin("search", {}, resume=True)
    file = out / "archive.json"
    rows = archived(out)
    with closing(Journal(executor(ShortTrainings(out, data, {"base": base}), "cpu", progress=progress, **where),
                         out / "outcomes")) as journal:  # fmt: skip
        for generation in (0, 1):
            numbers = range(3 * generation + 1, 3 * generation + 4)
            if len(rows) >= numbers[-1]:
                continue
            parent = min(rows, key=lambda row: row["weights"])["number"] if rows else None
            name = parent and f"candidates/{parent:03d}"
            jobs = [{"number": number, "parent": name} for number in numbers]
            done = {job["number"]: outcome for job, outcome in journal.run(jobs)}
            rows += [{"number": number, **done[number]} for number in numbers]
            write_json(file, rows)
            journal.clear()
    RunFolder(out).finish()
    return rows


def archived(out: Path) -> list[dict]:
    file = out / "archive.json"
    return json.loads(file.read_text()) if file.exists() else []


def outcomes_of(out: Path) -> set[int]:
    """The numbers of what is finished for good."""
    kept = [json.loads(file.read_text())["job"]["number"] for file in (out / "outcomes").glob("[!.]*.json")]
    return {*kept, *(row["number"] for row in archived(out))}


if __name__ == "__main__":
    drive(*map(Path, sys.argv[1:4]), lambda *state: print(*state[:3], flush=True), workers=2)
