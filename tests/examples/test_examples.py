"""Every example runs, and what it shows is so."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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
