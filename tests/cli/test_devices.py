"""What the commands do on a GPU; where there is none, as far as an emulated one shows: where every tensor is."""

import json
from contextlib import nullcontext

import pytest

from tests.conftest import HAS_GPU
from tests.emulated_device import emulated_gpu

a_gpu = nullcontext if HAS_GPU else emulated_gpu
SIZE = "--min-size 64 --max-size 64"
SMALL = f"--backbone resnet18 --norm batch --width 0.25 --fpn 32 {SIZE}"


@pytest.fixture
def on_gpu(jdkd, squares):
    """Runs a command of training there."""

    def run(*words):
        with a_gpu():
            words = [part for word in words for part in str(word).split()]
            answer = jdkd(*words, "--data", squares, "--batch-size", 2, "--device", "cuda")
        assert answer.code == 0, answer.err
        return answer

    return run


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("fasterrcnn", "--box-head 32 --amp bf16 --accumulate 2 --train-sizes 48 64 --gamma-l1 1e-4"),
        ("fcos", "--amp fp16 --ema 0.9 --checkpoint-every 1"),
        ("gfl", "--optimizer sgd"),
        ("reppoints", ""),
        ("ssdlite", ""),
    ],
)
def test_detectors_train_and_are_scored(on_gpu, family, how, tmp_path):
    small = f"--backbone mobilenet_v3_large {SIZE}" if family == "ssdlite" else SMALL
    on_gpu("train --model", family, small, how, "--steps 2 --out", tmp_path / "base")
    assert json.loads((tmp_path / "base" / "train.json").read_text())["map"] >= 0


def test_a_student_is_taught_and_draws(on_gpu, jdkd, squares, tmp_path):
    teacher, student, taught = tmp_path / "teacher", tmp_path / "student", tmp_path / "taught"
    on_gpu("train --model retinanet", SMALL, "--steps 1 --out", teacher)
    on_gpu("train --model fcos", SMALL, "--steps 1 --out", student)
    how = "--loss cwd --align permute --inherit --steps 2 --detach-after 1 --amp fp16 --checkpoint-every 1"
    on_gpu("distill --teacher", teacher, "--student", student, how, "--out", taught)
    with a_gpu():
        drawn = jdkd("predict", taught, squares / "val2017", "--out", tmp_path / "drawn", "--device", "cuda")
    assert drawn.code == 0 and "on 4 image(s)" in drawn.out
