import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks.record import require_published, weights_sha256
from jdkd.errors import InputError
from jdkd.files import sha256_of
from jdkd.latency.records import compared, images_sha256, matching, sources
from jdkd.latency.report import LatencyReport, ModelLatency
from jdkd.latency.statistics import Latency


@pytest.fixture
def checkout(tmp_path):
    """A checkout of git with one commit."""
    (tmp_path / "jdkd").mkdir()
    (tmp_path / "jdkd/__init__.py").write_text("")
    (tmp_path / "benchmarks/results/cpu").mkdir(parents=True)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    sources.cache_clear()
    yield tmp_path
    sources.cache_clear()


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_a_clean_checkout_is_known_by_its_commit_and_may_publish(checkout):
    found = sources(checkout)
    assert found["commit"] == git(checkout, "rev-parse", "HEAD") and found["dirty"] is False
    require_published(checkout / "benchmarks/results/cpu/latency.jsonl", checkout)


@pytest.mark.parametrize("file", ["jdkd/__init__.py", "jdkd/new.py"])
def test_changed_sources_publish_nothing(checkout, file):
    (checkout / file).write_text("x = 1\n")
    out = checkout / "benchmarks/results/cpu/latency.jsonl"
    with pytest.raises(InputError, match=r"has changes since commit .*commit first, or give --out elsewhere"):
        require_published(out, checkout)
    require_published(checkout / "elsewhere.jsonl", checkout)


def test_results_that_were_added_are_no_change_of_the_sources(checkout):
    out = checkout / "benchmarks/results/cpu/latency.jsonl"
    out.write_text("{}\n")
    assert sources(checkout)["dirty"] is False


def test_a_package_that_lies_in_a_checkout_of_something_else_has_no_commit(checkout):
    inside = checkout / "venv"
    (inside / "jdkd").mkdir(parents=True)
    (inside / "jdkd/__init__.py").write_text("")
    found = sources(inside)
    assert found["commit"] is None and found["dirty"] is None
    with pytest.raises(InputError, match="is no checkout of git"):
        require_published(inside / "benchmarks/results/a.jsonl", inside)


def test_hashes_are_those_of_what_was_timed(tmp_path, make_detector):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert sha256_of(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180-2
    with pytest.raises(InputError, match="nowhere cannot be read"):
        sha256_of(tmp_path / "nowhere")
    one, other = make_detector(), make_detector(seed=1)
    assert weights_sha256(one) == weights_sha256(make_detector()) != weights_sha256(other)


PROTOCOL = {"runtime": "eager", "dtype": "float32", "batch_size": 1, "images_sha256": "1", "runs": []}


def report(student, **changes):
    models = {"base": ModelLatency(Latency((10.0, 10.1) * 3)), "student": ModelLatency(Latency((student, student) * 3))}
    return LatencyReport(models, {"threads": 1}, PROTOCOL | changes)


def test_an_earlier_ratio_agrees_or_differs():
    (line,) = compared(report(8.0), report(8.0), "before.json")
    assert line == "student, end_to_end: 0.796 [0.796, 0.796], was 0.796 [0.796, 0.796]: they agree"
    for now, before in ((9.0, 8.0), (8.0, 9.0)):
        assert compared(report(now), report(before), "before.json")[0].endswith("they differ")


@pytest.mark.parametrize("name", ["runtime", "dtype", "batch_size", "images_sha256"])
def test_what_was_measured_otherwise_is_not_compared(name):
    with pytest.raises(InputError, match=f"before.json has {name} 9, and this measurement"):
        compared(report(8.0), report(8.0, **{name: 9}), "before.json")


def test_what_was_measured_elsewhere_or_of_others_is_not_compared():
    now = report(8.0)
    with pytest.raises(InputError, match="threads was 2 and is 1"):
        compared(now, replace(now, environment={"threads": 2}), "before.json")
    with pytest.raises(InputError, match="compares base, and this measurement base, student"):
        compared(now, replace(now, models={"base": now.models["base"]}), "before.json")
    with pytest.raises(InputError, match=r"compares student, base, and .* give the same base"):
        compared(now, replace(now, models=dict(reversed(now.models.items()))), "before.json")


def test_images_of_other_shapes_or_types_are_other_images():
    images = [torch.zeros(3, 4, 6), torch.zeros(3, 6, 4), torch.zeros(3, 4, 6, dtype=torch.int32)]
    assert len({images_sha256([image]) for image in images}) == 3
    assert images_sha256(images) != images_sha256(images[:1]) == images_sha256([torch.zeros(3, 4, 6)])


def test_the_report_of_the_same_runtime_dtype_and_batch_size_is_found():
    stored = [report(8.0, batch_size=8), report(9.0)]
    assert matching(stored, PROTOCOL, "before.json").models["student"].end_to_end.p50 == 9
    assert matching(stored, PROTOCOL | {"images_sha256": "2"}, "before.json") is stored[1], "refused by name, if at all"
    with pytest.raises(InputError, match="no measurement of runtime eager, dtype float32, batch_size 16"):
        matching(stored, PROTOCOL | {"batch_size": 16}, "before.json")
