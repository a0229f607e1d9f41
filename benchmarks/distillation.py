"""What a teacher is worth: students under PKD, MSE, CWD and nobody, at equal steps, over seeds.

Under `pkd_half` PKD teaches for the first half of the steps, and nobody does from there on. `pkd_permute` and
`pkd_linear` bring the channels of both together first (`--align`): teachers and students begin with weights of their
own, so that the channels of every pair mean other things. `none_inherit` and `pkd_inherit` begin with the teacher's
neck and heads (`--inherit`). These four only run if they are asked for by `--losses`.

python -m benchmarks.distillation FOLDER                         digit scenes: every pair, loss and seed
python -m benchmarks.distillation FOLDER --name digit_scenes_one_class
                                                                 the same where every digit is of the class "digit"
python -m benchmarks.distillation FOLDER --data DIR --name NAME  the same on photographs in the COCO layout
python -m benchmarks.distillation FOLDER --data DIR --name NAME --weights RESNET18 MOBILENET_V2
                                                                 begun with backbones that know ImageNet
python -m benchmarks.distillation FOLDER --sweep                 weights of PKD on one pair
python -m benchmarks.distillation FOLDER --steps 200             students of another length, under the same teachers
python -m benchmarks.distillation FOLDER --swap                  their backbones and necks under heads trained anew
python -m benchmarks.distillation                                print the page of the results that are kept

FOLDER gets the images, a teacher for each family and a folder for each student; what it holds is carried on. Teachers
are trained for 2,400 steps, three times as long as students are where `--steps` says nothing else. A student is scored
after each quarter of its steps on images that nobody trained on. Intervals are of the bootstrap over seeds and images.

The swap (PKD, section 3.1) asks what the features are worth without the head that they were trained with: backbone and
neck of a student, taught or not, stay as they are under the fresh head of another detector, which alone is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.distillation_page import ALIGNED, HALF, INHERIT, INHERIT_PKD, INHERITED, NONE, STEPS, page, swaps
from benchmarks.resampling import Judged, gain
from jdkd.data import CocoDetectionDataset, Split, resolve_splits, write_digit_scenes
from jdkd.detect import detector, load, load_weights, narrowed, save, swap_features
from jdkd.detect.inheriting import take_neck_and_heads
from jdkd.distill import DistillConfig, distill
from jdkd.files import read_json, write_json
from jdkd.latency import fuse_for_inference
from jdkd.nn.necks import backbone_of
from jdkd.train import TrainConfig, checkpoint, fit
from jdkd.train.evaluate import find
from jdkd.train.freezing import frozen

OP = "distillation"
PAIRS = (  # of a teacher and its student
    *(("fasterrcnn", "fcos"), ("fcos", "retinanet_v2"), ("retinanet_v2", "fasterrcnn"), ("fcos", "fcos")),
    *(("fasterrcnn", "fasterrcnn"), ("fasterrcnn", "retinanet_v2")),
)
# (the first RetinaNet's heads have no norms: narrow and new, it had learnt next to nothing after these steps)
LOSSES = ("none", "pkd", "mse", "cwd", HALF)
WEIGHTS = (1.0, 2.0, 6.0, 10.0, 20.0)  # of PKD, in the sweep
SEEDS = (0, 1, 2)
QUARTERS, LONGER = 4, 3
SIZE = 96, 128  # short and long side of what detectors see, in pixels
_SCENES = {"train": 400, "val": 400, "size": 96, "seed": 0}
# (of ten classes a student of one stage had learnt next to nothing after these steps, whoever taught it)
SCENES = {"digit_scenes": _SCENES, "digit_scenes_one_class": _SCENES | {"one_class": True}}
TRAINING = TrainConfig(STEPS, batch_size=4, lr=2e-3, amp="bf16")
SWAP_OP = "distillation_swap"
SWAP_STEPS = 200
OTHER_HEAD = {"fcos": "retinanet_v2", "retinanet_v2": "fcos", "fasterrcnn": "fasterrcnn"}  # by a student's family

Way = tuple[str, str, str, float | str]
"""A teacher's family, a student's, the loss and its weight."""


def model(
    family: str, classes: Sequence[str], seed: int, *, student: bool, known: Sequence[Path] = ()
) -> torch.nn.Module:
    """A detector over ResNet-18 with 64 channels in its pyramid, or a student of it.

    A student has half of the channels in its backbone, or it is over MobileNetV2 where both begin with what is known.

    Args:
        known: files of torchvision's weights of ResNet-18 and of MobileNetV2 for ImageNet.
    """
    torch.manual_seed(seed)
    narrow = student and not known
    own = {"box_head": 256 if narrow else 128} if family == "fasterrcnn" else {}
    how = {"channels": 128 if narrow else 64, "min_size": SIZE[0], "max_size": SIZE[1], "norm": "batch", **own}
    made = detector(family, "mobilenet_v2" if student and known else "resnet18", tuple(classes), **how)
    if known:
        load_weights(made, known[student])
    return narrowed(made, 0.5) if narrow else made


def method_of(loss: str, weight: float | str = "auto") -> DistillConfig:
    """How a teacher teaches under a loss of :data:`LOSSES`, :data:`ALIGNED` or :data:`INHERITED`."""
    ours = loss == HALF or loss in ALIGNED or loss in INHERITED
    return DistillConfig("pkd" if ours else loss, loss_weight=weight, align=ALIGNED.get(loss, "none"))


class Bench:
    """The data of one page, the folder of what is trained on it, and the steps of a student."""

    def __init__(
        self, folder: Path, name: str, train: Split, val: Split, known: Sequence[Path] = (), steps: int = STEPS
    ) -> None:
        self.folder, self.name, self.known, self.steps = folder / name, name, known, steps
        self.train, self.val = CocoDetectionDataset(train), CocoDetectionDataset(val)
        self.training = replace(TRAINING, flip=0.5 if self.train.mirror_symmetric else 0.0)

    def teacher(self, family: str) -> torch.nn.Module:
        """A finished teacher of a family."""
        out = self.folder / f"teacher-{family}"
        if not (out / "scores.json").exists():
            made = self._new(family, 1000, student=False)
            fit(made, self.train, replace(self.training, steps=LONGER * STEPS), folder=out, resume=True, device="cpu")
            save(out, made)
            write_json(out / "scores.json", {"map": self._judged(made)[1].map()})
        return load(out, "cpu")

    def student(self, teacher: str, family: str, loss: str, seed: int, weight: float | str = "auto") -> dict[str, Any]:
        """A finished student: its mAP after each quarter, and its detections in the end."""
        words = (teacher, family, loss, seed) if weight == "auto" else (teacher, family, loss, weight, seed)
        out = self.folder / "-".join(map(str, words if self.steps == STEPS else (*words, "of", self.steps)))
        if (out / "found.json").exists():
            return read_json(out / "found.json", "remove it: the student is trained again")
        own, curve, steps = self._new(family, seed), [], self.steps // QUARTERS
        if loss in INHERITED:
            take_neck_and_heads(own, self.teacher(teacher))
        for quarter in range(QUARTERS):
            part = replace(self.training, steps=steps, cycle_start=quarter * steps, cycle_steps=QUARTERS * steps)
            part = replace(part, seed=QUARTERS * seed + quarter)
            how = {"folder": out / f"quarter-{quarter}", "resume": True, "device": "cpu"}
            if quarter:
                how["inherit"] = out / f"quarter-{quarter - 1}"
            if INHERITED.get(loss, loss) == NONE or (loss == HALF and quarter >= QUARTERS // 2):
                fit(own, self.train, part, **how)
            else:
                distill(own, self.teacher(teacher), self.train, part, method_of(loss, weight), **how)
            found, judged = self._judged(own)
            curve.append({"step": (quarter + 1) * steps, "map": judged.map()})
        content = {"curve": curve, "found": found}
        write_json(out / "found.json", content)
        return content

    def swapped(self, teacher: str, family: str, loss: str, seed: int) -> list[dict[str, Any]]:
        """What the backbone and neck of a finished student find under another head that was trained on them."""
        self.student(teacher, family, loss, seed)
        words = "-".join(map(str, (teacher, family, loss, seed)))
        out, head = self.folder / f"swap-{words}", OTHER_HEAD[family]
        if not (out / "found.json").exists():
            own = self._new(family, seed)
            own.load_state_dict(checkpoint.read(self.folder / words / f"quarter-{QUARTERS - 1}")["model"])
            made = swap_features(own, self._new(head, 2000 + seed))
            how = {"folder": out, "resume": True, "device": "cpu"}
            with frozen(backbone_of(made)):
                fit(made, self.train, replace(self.training, steps=SWAP_STEPS, seed=seed), **how)
            write_json(out / "found.json", {"found": self._judged(made)[0]})
        return read_json(out / "found.json", "remove it: the head is trained again")["found"]

    def judged(self, found: list[dict[str, Any]]) -> Judged:
        return Judged(self.val, found)

    def _new(self, family: str, seed: int, student: bool = True) -> torch.nn.Module:
        return model(family, self.train.classes, seed, student=student, known=self.known)

    def _judged(self, own: torch.nn.Module) -> tuple[list[dict[str, Any]], Judged]:
        found = find(fuse_for_inference(own.eval()), self.val, device="cpu", batch_size=8).close()
        return found, Judged(self.val, found)


def rows(bench: Bench, ways: Iterable[Way], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each way: scores by seed, and what it gains over the same student without a teacher.

    One that inherits and is taught gains over the one that inherits.
    """
    for teacher, family, loss, weight in ways:
        students = [bench.student(teacher, family, loss, seed, weight) for seed in seeds]
        row = {"op": OP, "data": bench.name, "teacher": teacher, "student": family, "loss": loss, "weight": weight}
        row |= {"seeds": list(seeds), "steps": bench.steps, "maps": [each["curve"][-1]["map"] for each in students]}
        row["curves"] = [[point["map"] for point in each["curve"]] for each in students]
        if loss != NONE:
            less = (teacher, family, INHERIT) if loss == INHERIT_PKD else ("nobody", family, NONE)
            alone = [bench.judged(bench.student(*less, seed)["found"]) for seed in seeds]
            row |= gain([bench.judged(each["found"]) for each in students], alone)
            row["teacher_map"] = read_json(bench.folder / f"teacher-{teacher}" / "scores.json", "train it again")["map"]
        yield row | {"device": record.device_name("cpu"), "commit": record.commit()}


def swap_rows(bench: Bench, pairs: Iterable[tuple[str, str]], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Two rows for each pair: the features of untaught students under another head, and of those that PKD taught."""
    for teacher, family in pairs:
        found: dict[str, list[Judged]] = {}
        for loss, taught_by in (("none", "nobody"), ("pkd", teacher)):
            found[loss] = [bench.judged(bench.swapped(taught_by, family, loss, seed)) for seed in seeds]
            row = {"op": SWAP_OP, "data": bench.name, "teacher": taught_by, "student": family, "loss": loss}
            row |= {"head": OTHER_HEAD[family], "seeds": list(seeds), "steps": SWAP_STEPS}
            row["maps"] = [each.map() for each in found[loss]]
            row |= {} if loss == "none" else gain(found[loss], found["none"])
            yield row | {"device": record.device_name("cpu"), "commit": record.commit()}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--name", default="digit_scenes")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--pairs", nargs="+", type=int, default=list(range(len(PAIRS))))
    parser.add_argument("--losses", nargs="+", choices=(*LOSSES, *ALIGNED, *INHERITED), default=list(LOSSES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--weights", nargs=2, type=Path, default=(), metavar=("RESNET18", "MOBILENET_V2"))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--swap", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.folder is not None:
        torch.set_num_threads(1)
        if asked.data is None and asked.name not in SCENES:
            parser.error(f"{asked.name} wants --data, a folder of images; of {', '.join(SCENES)} they are drawn")
        data = asked.data or asked.folder / asked.name / "data"
        if asked.data is None:
            write_digit_scenes(data, **SCENES[asked.name], resume=True)
        if asked.steps < QUARTERS or asked.steps % QUARTERS:
            parser.error(
                f"--steps is {asked.steps}, and students are scored after each quarter: a multiple of {QUARTERS}"
            )
        bench = Bench(asked.folder, asked.name, *resolve_splits(data), asked.weights, asked.steps)
        pairs = [PAIRS[number] for number in asked.pairs]
        ways = [(*pair, "pkd", weight) for pair in pairs[:1] for weight in WEIGHTS]
        if not asked.sweep:
            alone = [("nobody", family, "none", "auto") for family in dict.fromkeys(student for _, student in pairs)]
            ways = [(*pair, loss, "auto") for pair in pairs for loss in asked.losses if loss != "none"]
            ways = alone * ("none" in asked.losses) + ways
        for row in swap_rows(bench, pairs, asked.seeds) if asked.swap else rows(bench, ways, asked.seeds):
            record.append(record.result_file("cpu", row["op"]), [row])
            print(json.dumps(row), flush=True)
    for op, written in ((OP, page), (SWAP_OP, swaps)):
        print(written(record.load(sorted(record.RESULTS.glob(f"*/{op}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
