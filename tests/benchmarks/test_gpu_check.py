"""The steps of the GPU check, with a stand-in for python that only notes what it was asked."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.sh"
LIMIT = int(re.search(r"^LIMIT=(\d+)", SCRIPT.read_text(), re.MULTILINE)[1])
COLLECTING = 60  # seconds at most, which are no step
BENCHMARKS = [
    "elastic_conv", "elastic_levels", "supernet_step", "subnet_change", "pack", "elastic_pointwise", "pearson",
    "latency",
]  # fmt: skip
STAND_IN = """#!/usr/bin/env bash
[[ $1 == - ]] && echo 9.0a && exit
echo "$*" >>"$ASKED"
[[ $* == *--collect-only* ]] || exit 0
echo '_______ ERROR collecting tests/ops/test_pack_gpu.py _______'
echo "E   ModuleNotFoundError: No module named 'absent.part'"
echo '_______ ERROR collecting tests/ops/test_elastic_conv_gpu.py _______'
echo "E   ModuleNotFoundError: No module named 'jdkd.absent'"
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script: its exit code, what it says, its steps, and what python was asked."""

    def run(*words, sanitizer=False):
        rooms = tmp_path / "bin"
        rooms.mkdir()
        stand_ins = {"python": STAND_IN, "compute-sanitizer": '#!/usr/bin/env bash\nexec "${@:5}" --checked\n'}
        for name in ["python", *["compute-sanitizer"] * sanitizer]:
            (rooms / name).write_text(stand_ins[name])
            (rooms / name).chmod(0o755)
        asked, out = tmp_path / "asked", tmp_path / "out"
        own = {"PYTHON": str(rooms / "python"), "ASKED": str(asked), "CUDA_HOME": str(tmp_path)}
        env = {**os.environ, **own, "PATH": f"{rooms}:/usr/bin:/bin"}
        done = subprocess.run([SCRIPT, out, *words], env=env, capture_output=True, text=True, timeout=60)
        lines = (out / "steps.jsonl").read_text().splitlines() if out.is_dir() else []
        return done, [json.loads(line) for line in lines], asked.read_text() if asked.exists() else ""

    return run


@pytest.mark.parametrize("part", ["tests", "benchmarks"])
def test_the_steps_of_a_part_fit_its_limit(part, check):
    done, steps, _ = check(part, sanitizer=True)
    expected = {"tests": ["build", "env", "tests", "sanitizer"], "benchmarks": ["build", *BENCHMARKS]}[part]
    assert done.returncode == 0 and [step["step"] for step in steps] == expected
    assert sum(step["limit"] for step in steps) + COLLECTING * (part == "tests") <= LIMIT <= 540


def test_both_parts_build_once_and_every_operator_is_timed(check):
    _, steps, asked = check()
    names = [step["step"] for step in steps]
    assert names == ["build", "env", "tests", *BENCHMARKS]
    cases = {path.stem for path in (SCRIPT.parent / "cases").glob("[a-z]*.py")}
    assert {name for name in names if f"benchmarks.run {name} " in asked} == cases


def test_tests_are_collected_in_one_call_and_those_without_their_package_left_out(check):
    done, _, asked = check("tests")
    assert asked.count("--collect-only") == 1
    assert "left out: tests/ops/test_pack_gpu.py, there is no module absent.part" in done.stdout
    assert "compute-sanitizer" in done.stdout
    (ran,) = (line for line in asked.splitlines() if "junit.xml" in line)
    assert "test_elastic_conv_gpu.py" in ran and "test_pack_gpu.py" not in ran


def test_kernels_run_under_the_sanitizer_where_there_is_one(check):
    _, _, asked = check("tests", sanitizer=True)
    (ran,) = (line for line in asked.splitlines() if line.endswith("--checked"))
    files = re.findall(r"tests/\S+\.py", ran)
    assert len(files) == 4 and all((SCRIPT.parents[1] / file).is_file() for file in files)
    assert "junit_sanitizer.xml" in ran


def test_another_part_is_refused(check):
    done, steps, asked = check("everything")
    assert (done.returncode, steps, asked) == (2, [], "")
    assert "there is no part everything; choose tests, benchmarks or all" in done.stderr
