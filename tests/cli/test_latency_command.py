"""`jdkd latency`, with a clock that says the same every time where nothing is measured."""

import hashlib
import json
import re

import pytest

from jdkd.cli.latency import Latency
from jdkd.detect import load
from jdkd.errors import InputError
from jdkd.latency import grid, profile_cost, protocol
from jdkd.latency.runtimes import Eager

QUICK = ("--rounds", 2, "--seconds", 0)


class Even:
    """Runs a call and says that it took 10 ms, give or take."""

    name = "even"

    def __init__(self):
        self.calls = 0

    def time(self, call):
        call()
        self.calls += 1
        return 10.0 + 0.1 * (self.calls * 7 % 11)


@pytest.fixture(autouse=True)
def even(monkeypatch):
    """An even clock."""
    monkeypatch.setattr(protocol, "clock_for", lambda device: Even())


@pytest.fixture
def image(squares):
    return "--images", squares / "val2017" / "101.png"


def test_latency_compares_detectors_on_the_data_that_the_base_was_trained_for(jdkd, trained, squares, tmp_path):
    file = tmp_path / "latency.json"
    answer = jdkd("latency", trained, trained, *QUICK, "--out", file, "--map", "--profile")
    assert answer.code == 0, answer.err
    assert f"4 images of {squares / 'val2017'}" in answer.out
    content = json.loads(file.read_text())
    (stored,) = content["measurements"]
    assert list(stored["models"]) == [str(trained), f"{trained} (2)"]
    student = stored["models"][f"{trained} (2)"]
    low, high = student["end_to_end"]["ratio_interval"]
    assert low <= 1 <= high and student["end_to_end"]["verdict"] == "not resolved"
    assert len(student["end_to_end"]["samples"]) == student["end_to_end"]["n"] == 4
    assert stored["control"]["end_to_end"]["holds"] and stored["control"]["model_only"]["n"] == 4
    facts = student["facts"]
    weights = hashlib.sha256((trained / "weights.safetensors").read_bytes()).hexdigest()
    assert facts["weights_sha256"] == weights and len(facts["architecture"]) == 64
    assert facts["map"] == json.loads((trained / "train.json").read_text())["map"]
    assert "NMS" in facts["inside"]["end_to_end"] and "detections_per_image" in facts and "peak_memory_bytes" in facts
    assert stored["protocol"]["sources"].keys() == {"version", "commit", "dirty"}
    profile = content["profile"][str(trained)]
    assert set(profile["stages"]) == set(profile["least"]) == {"backbone", "neck", "head", "postprocess", "fixed"}
    assert profile["least"]["backbone"] > 0 and profile["ceilings"]["flops"] > 1e6
    shown = (
        "end to end",
        "model only",
        "A/A: it again",
        "not resolved",
        "mAP",
        "Where the time goes",
        "roofline: every operator by itself at",
        "clocks and thro",
    )
    assert all(words in answer.out for words in shown), answer.out
    height, width = profile_cost(load(trained)).size
    assert f"GMACs: of the largest image that a detector resizes to, {height}x{width}\n" in answer.out
    assert answer.out.splitlines()[-1] == str(file) and "…" not in answer.out


def test_latency_without_data_takes_photographs_and_says_so(jdkd, trained, tmp_path):
    copy = tmp_path / "moved"
    copy.mkdir()
    for name in ("architecture.json", "weights.safetensors"):
        (copy / name).write_bytes((trained / name).read_bytes())
    answer = jdkd("latency", copy, *QUICK, "--modes", "end_to_end")
    assert answer.code == 0 and "2 sample photographs" in answer.out and "give --data" in answer.out
    assert "model only" not in answer.out


def test_a_map_needs_annotations(trained):
    with pytest.raises(InputError, match="--map scores on annotated images, and there are none; give --data"):
        Latency(trained, (), map=True)._work({}, [], "cpu", None)


def test_what_cannot_be_scored_or_divided_is_refused_before_anything_is_timed(
    jdkd, trained, squares, tmp_path, monkeypatch
):
    def measured(*_):
        raise AssertionError("it was measured before")

    monkeypatch.setattr("jdkd.latency.measure_grid", measured)
    annotations = json.loads((squares / "annotations" / "instances_val2017.json").read_text())
    annotations["categories"].append({"id": 99, "name": "green"})
    (tmp_path / "three.json").write_text(json.dumps(annotations))
    data = ("--val-images", squares / "val2017", "--val-annotations", tmp_path / "three.json")
    answer = jdkd("latency", trained, *data, "--map")
    assert answer.code == 2 and "the detector knows 2 classes and the dataset has 3" in answer.err, answer.err
    monkeypatch.setattr("jdkd.detect.stages.trunk_of", lambda model: [])
    answer = jdkd("latency", trained, "--profile")
    assert answer.code == 2 and "the stages of this FasterRCNN are not known" in answer.err, answer.err


class Elsewhere(Eager):
    """In the place of a runtime of exported files."""

    name = "onnxruntime"


def test_runtimes_stand_side_by_side_each_against_the_base_in_it(jdkd, trained, image, tmp_path, monkeypatch):
    monkeypatch.setattr("jdkd.export.runtimes.known_runtimes", lambda: {"eager": Eager(), "onnxruntime": Elsewhere()})
    monkeypatch.setattr("jdkd.latency.LatencyReport.verdict", lambda report, name, mode: "not resolved")
    file = tmp_path / "latency.json"
    how = ("--runtimes", "eager", "onnxruntime", "--batch-sizes", 1, 2, "--modes", "end_to_end", "--out", file)
    answer = jdkd("latency", trained, trained, *image, *QUICK, *how)
    assert answer.code == 0, answer.err
    measured = json.loads(file.read_text())["measurements"]
    cells = [tuple(each["protocol"][key] for key in ("runtime", "dtype", "batch_size")) for each in measured]
    assert cells == [(name, "float32", size) for name in ("eager", "onnxruntime") for size in (1, 2)]
    assert all(each["base"] == str(trained) and len(each["models"]) == 2 for each in measured)
    side_by_side = answer.out.partition("Latency over the base's in the same runtime")[2]
    assert "onnxruntime, float32, batch 2" in answer.out and side_by_side.count("not resolved") == len(cells)


class InTurn:
    """In the place of fresh processes: this one."""

    def __init__(self, *_, **__):
        self.max_tasks_per_child = __["max_tasks_per_child"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, call, *given):
        from concurrent.futures import Future

        future = Future()
        future.set_result(call(*given))
        return future


def test_processes_are_pooled(jdkd, trained, image, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "ProcessPoolExecutor", InTurn)
    file = tmp_path / "latency.json"
    how = ("latency", trained, trained, *image, *QUICK, "--processes", 2, "--modes", "end_to_end", "--out", file)
    answer = jdkd(*how)
    assert answer.code == 0 and "4 rounds" in answer.out and "in 2 processes, n 8 each" in answer.out
    (stored,) = json.loads(file.read_text())["measurements"]
    assert stored["processes"] == [2, 2] and len(stored["protocol"]["runs"]) == 2
    student = stored["models"][f"{trained} (2)"]["end_to_end"]
    assert len(student["ratio_of_process"]) == 2 and student["ratio_interval_within"]


def test_an_earlier_measurement_is_compared_where_it_can_be(jdkd, trained, image, tmp_path, monkeypatch):
    file = tmp_path / "earlier.json"
    how = ("latency", trained, trained, *image, *QUICK, "--modes", "end_to_end")
    assert jdkd(*how, "--out", file).code == 0
    again = jdkd(*how, "--against", file)
    earlier = json.loads(file.read_text())["measurements"][0]["models"][f"{trained} (2)"]["end_to_end"]["ratio"]
    told = rf"{re.escape(str(trained))} \(2\), end_to_end: \d\.\d+ \[.*\], was {earlier:.3f} \[.*\]: they agree"
    assert again.code == 0 and re.search(told, again.out)

    def measured(*_):
        raise AssertionError("it was measured before")

    monkeypatch.setattr("jdkd.latency.measure_grid", measured)
    refused = jdkd(*how, "--batch-sizes", 3, "--against", file)
    assert refused.code == 2 and "has no measurement of runtime eager, dtype float32, batch_size 3" in refused.err
    content = json.loads(file.read_text())
    content["measurements"][0]["environment"]["device_name"] = "another machine"
    file.write_text(json.dumps(content))
    refused = jdkd(*how, "--against", file)
    assert refused.code == 2 and "device_name was another machine and is" in refused.err
    file.write_text("[]")
    refused = jdkd(*how, "--against", file)
    assert refused.code == 2 and "holds something else than it should" in refused.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--runtimes", "cudagraph"), "runtime cudagraph in float32 cannot run here"),
        (("--runtimes", "warp"), "the runtime is warp; known are eager, compile, cudagraph, onnxruntime, openvino"),
        (("--dtypes", "int4"), "the dtype is none of float32, float16, bfloat16"),
        (("--batch-sizes", 0), "--batch-sizes is 0"),
        (("--batch-sizes", 1, -4), "--batch-sizes is 1 -4"),
        (("--processes", 0), "--processes is 0"),
        (("--modes", "wall"), "--modes is wall"),
        (("--rounds", 0), "rounds must be a number of at least 1"),
        (("--against", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_detector_is_loaded(jdkd, trained, monkeypatch, flags, said):
    def loaded(folder):
        raise AssertionError("it was loaded before")

    monkeypatch.setattr("jdkd.detect.load", loaded)
    answer = jdkd("latency", trained, *flags)
    assert answer.code == 2 and said in " ".join(answer.err.split()) and "Traceback" not in answer.err


def test_an_exported_file_is_no_folder_of_a_detector(jdkd, trained, image, tmp_path):
    (tmp_path / "student.onnx").touch()
    answer = jdkd("latency", trained, tmp_path / "student.onnx", *image)
    assert answer.code == 2 and "student.onnx is no detector: it has no architecture.json; give a folder" in answer.err


def test_who_asks_for_minutes_gets_them(trained):
    schedule = Latency(trained, (), seconds=300.0)._grid().schedule
    assert (schedule.min_seconds, schedule.max_seconds, schedule.warmup_limit) == (300, 600, 300)


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
def test_processes_are_fresh(jdkd, trained, image, tmp_path):
    file = tmp_path / "latency.json"
    how = ("--processes", 2, "--modes", "end_to_end", "--out", file)
    answer = jdkd("latency", trained, trained, *image, *QUICK, *how)
    assert answer.code == 0, answer.err
    (stored,) = json.loads(file.read_text())["measurements"]
    assert stored["environment"]["clock"] == "perf_counter"  # no stand-in went along
    assert len(stored["models"][str(trained)]["end_to_end"]["ratio_of_process"]) == 2
