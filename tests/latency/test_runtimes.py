import contextlib
import functools
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.latency import fuse_for_inference, measure
from jdkd.latency.exported import OfFile, OnnxEngine, runtimes_with
from jdkd.latency.facts import facts_of
from jdkd.latency.precision import in_precision
from jdkd.latency.protocol import _calls
from jdkd.latency.replaying import captured
from jdkd.latency.runtimes import Artefact, Compiled, CudaGraph, Eager, require_runnable
from tests.latency.exporting import write_constant_detector

CPU = torch.device("cpu")
QUICK = {"rounds": 1, "min_seconds": 0, "warmup_limit": 0}
needs_onnxruntime = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))), reason="needs onnx and onnxruntime"
)


def onnxruntime(export=write_constant_detector):
    return OfFile("onnxruntime", "onnxruntime", OnnxEngine, {"cpu": ["CPUExecutionProvider"]}, export)


def found_by(artefact, images):
    with torch.inference_mode():
        return artefact.detector([image / 255 for image in images])


def test_a_compiled_backbone_finds_what_the_eager_one_does(model, images):
    batches, ran = [images[:1]], []

    def backend(graph, examples):
        def run(*given):
            ran.append(1)
            return graph(*given)

        return run

    with torch.inference_mode():
        eager = Eager().prepare(model, batches, CPU, "float32")
        compiled = Compiled(backend).prepare(model, batches, CPU, "float32")
        ran.clear()
        (bare,) = compiled.model_only(0)
    (own,), (other,) = (found_by(each, images[:1]) for each in (eager, compiled))
    torch.testing.assert_close(own, dict(other))
    assert len(ran) == 2 and len(bare["boxes"]) and "compiled" in compiled.inside["end_to_end"]
    assert type(model.backbone).__name__ == "Backbone"  # the caller's model is as it was


def test_what_a_compiler_cannot_run_is_refused_before_anything_is_timed(model, images):
    def broken(graph, examples):
        raise RuntimeError("no such hardware")

    with pytest.raises(InputError, match=r"torch\.compile cannot run this detector's backbone .*leave compile out"):
        Compiled(broken).prepare(model, [images[:1]], CPU, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_of_the_dtype_and_detections_stay_in_fp32(model, images, dtype):
    artefact = Eager().prepare(fuse_for_inference(model), [images[:1]], CPU, dtype)
    (found,) = found_by(artefact, images[:1])
    weights = {p.dtype for name, p in artefact.detector.named_parameters() if p.ndim == 4}
    assert weights == {getattr(torch, dtype)} and found["boxes"].dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu") and next(model.parameters()).dtype == torch.float32
    (own,) = found_by(Eager().prepare(model, [images[:1]], CPU, "float32"), images[:1])
    assert not torch.equal(own["scores"][:5], found["scores"][:5])
    torch.testing.assert_close(own["scores"][:1], found["scores"][:1].float(), rtol=0.1, atol=0.05)


def test_autocast_ends_where_a_forward_fails(model):
    with pytest.raises(ValueError):
        in_precision(model, "bfloat16")([torch.zeros(1, 2, 3, 4)])
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("names", "dtypes", "said"),
    [
        (
            ["cudagraph"],
            ["float32"],
            "cudagraph in float32 cannot run here: it captures work of an NVIDIA GPU, and the",
        ),
        (["tensorrt"], ["float32"], "tensorrt in float32 cannot run here: it is for cuda here, and the device is cpu"),
        (["openvino"], ["float32"], "the package openvino is not installed; pip install openvino"),
        (["onnxruntime"], ["bfloat16"], "onnxruntime in bfloat16 cannot run here: it runs float32 and float16"),
        (["eager"], ["int8"], "eager in int8 cannot run here: the dtype is none of float32, float16, bfloat16"),
        (
            ["tflite"],
            ["float32"],
            "the runtime is tflite; known are eager, compile, cudagraph, onnxruntime, openvino, t",
        ),
        ([], ["float32"], "the runtime is none; known are eager"),
        (["eager"], [], "--dtypes is empty"),
    ],
)
def test_what_cannot_run_here_is_refused_by_name(monkeypatch, names, dtypes, said):
    there = lambda package: package != "openvino"  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there(name) or None)
    with pytest.raises(InputError) as refused:
        require_runnable(names, runtimes_with(write_constant_detector), CPU, dtypes)
    assert said in str(refused.value) and str(refused.value).count(". ") == 0


def test_a_provider_that_onnxruntime_was_not_built_with_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: ["CPU"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    tensorrt = runtimes_with(write_constant_detector)["tensorrt"]
    said = tensorrt.why_not(torch.device("cuda"), "float16")
    assert said == "this onnxruntime has no TensorrtExecutionProvider, but CPU"


def test_files_run_on_the_gpu_that_is_asked_for(model, images):
    opened = []

    class Opened(Exception):
        pass

    def engine(file, providers, threads):
        opened.append(providers)
        raise Opened

    found = runtimes_with(lambda model, file, half, counting: file.write_bytes(b""))
    runtime = found["tensorrt"]
    runtime._engine = engine
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match="Opened"):
            runtime.prepare(model, [images[:1]], torch.device(name), "float32")
    gpu, cpu = ("TensorrtExecutionProvider", "CUDAExecutionProvider"), "CPUExecutionProvider"
    assert opened == [[*gpu, cpu], [*((provider, {"device_id": "1"}) for provider in gpu), cpu]]


def test_what_runs_files_on_a_gpu_is_given_images_of_the_host_and_its_memory_is_not_torchs(model, images):
    class Asked(nn.Module):
        def forward(self, given):
            asked.append(given[0].device.type)
            return [{"boxes": torch.zeros(1, 4), "labels": torch.ones(1).long(), "scores": torch.ones(1)}]

    asked, batches = [], [images[:1]]
    for from_host in (True, False):
        artefact = Artefact(Asked(), None, {}, from_host=from_host)
        _calls({"base": artefact}, batches, torch.device("meta"), ("end_to_end",))["end_to_end"]["base"](0)
    assert asked == ["cpu", "meta"]
    found = facts_of(model, Artefact(Asked(), None, {}, from_host=True), batches, torch.device("cuda"))
    assert found["peak_memory_bytes"] is None and found["detections_per_image"] == 1


def test_a_file_has_run_on_every_batch_before_the_clock_starts(model, images):
    class Engine:
        inputs, outputs, facts = {"images": (4, np.float32)}, ["boxes", "labels", "scores"], {}

        def __init__(self, *given):
            pass

        def run(self, feeds):
            if len(ran) == 2:
                raise RuntimeError("no memory")
            ran.append(feeds["images"].shape)

    ran, export = [], lambda model, file, *how: file.write_bytes(b"")
    runtime = OfFile("tensorrt", "onnxruntime", Engine, {"cpu": []}, export)
    runtime.prepare(model, [images[:1], images[1:2]], CPU, "float32")
    assert ran == [(1, 3, 64, 64), (1, 3, 64, 96)]
    with pytest.raises(InputError, match=r"^tensorrt cannot run the exported detector \(RuntimeError: no memory\)"):
        runtime.prepare(model, [images[:1]], CPU, "float32")


def test_a_file_is_opened_anew_without_another_export_and_on_a_gpu_not_at_all(model, images):
    class Engine:
        inputs, outputs, facts = {"images": (4, np.float32)}, ["boxes", "labels", "scores"], {}

        def __init__(self, file, *given):
            opened.append(file.read_bytes())

        def run(self, feeds):
            ran.append(feeds)

    opened, exported, ran = [], [], []

    def export(model, file, *how):
        exported.append(file)
        file.write_bytes(b"a detector")

    runtime = OfFile("onnxruntime", "onnxruntime", Engine, {"cpu": [], "cuda": []}, export)
    first = runtime.prepare(model, [images[:1]], CPU, "float32")
    second = first.reopen()
    assert opened == [b"a detector"] * 2 and len(exported) == 1 and len(ran) == 2
    assert second.detector is not first.detector and second.facts == first.facts and second.reopen
    assert runtime.prepare(model, [images[:1]], torch.device("cuda"), "float32").reopen is None


def test_a_model_that_is_elsewhere_is_exported_from_the_host_and_stays_there(images):
    class Far(nn.Linear):
        def to(self, device):
            return self.to_empty(device=device)

    exported, far = [], Far(1, 1, device="meta")
    runtime = onnxruntime(lambda model, *how: exported.append(model.weight.device.type))
    with pytest.raises(FileNotFoundError):  # nothing was written
        runtime.prepare(far, [images[:1]], CPU, "float32")
    assert exported == ["cpu"] and far.weight.device.type == "meta"


def test_a_graph_is_captured_on_the_device_of_its_images(monkeypatch):
    made = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            assert other.device == self.device

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    graph = lambda graph, stream: made.append(stream.device) or contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(torch.cuda, "graph", graph)
    images = torch.zeros(1, device="meta")
    assert captured(lambda given: given, images)[1:] == (images, images)
    assert made == [images.device]


@needs_onnxruntime
@pytest.mark.parametrize("half", [False, True])
def test_onnxruntime_is_fed_resized_batches_and_boxes_come_back_at_the_images_size(model, images, half):
    dtype = "float16" if half else "float32"
    artefact = onnxruntime().prepare(model, [images[:2]], CPU, dtype)
    assert artefact.model_only(0)[0].shape == (2, 3, 4) and len(artefact.facts["sha256_of_file"]) == 64
    assert artefact.from_host
    large = torch.zeros(3, 128, 192)  # twice the detector's input
    small, other = found_by(artefact, [images[0], large])
    assert small["boxes"].tolist() == [[8, 8, 24, 40], [0, 0, 16, 16]]  # rows without a score are no detections
    assert other["boxes"].tolist() == [[16, 16, 48, 80], [0, 0, 32, 32]]
    assert small["labels"].tolist() == [1, 3] and small["scores"].tolist() == pytest.approx([0.9, 0.5])


@needs_onnxruntime
def test_files_count_where_the_nms_of_all_runtimes_is_steady(model, images):
    asked = []

    def export(model, file, half, counting):
        asked.append(counting)
        write_constant_detector(model, file, half)

    runtime = onnxruntime(export)
    with runtime.steady_nms([5]):
        runtime.prepare(model, [images[:1]], CPU, "float32")
    runtime.prepare(model, [images[:1]], CPU, "float32")
    assert asked == [True, False]
    with Eager().steady_nms([5]):
        (found,) = found_by(Eager().prepare(model, [images[:1]], CPU, "float32"), images[:1])
    assert len(found["boxes"]) == 5


@needs_onnxruntime
def test_a_file_that_is_no_detector_is_refused(model, images):
    export = functools.partial(write_constant_detector, scores="certainties")
    with pytest.raises(InputError, match="returns boxes, certainties, labels and no scores"):
        onnxruntime(export).prepare(model, [images[:1]], CPU, "float32")
    with pytest.raises(InputError, match="onnxruntime cannot open the exported detector"):
        onnxruntime(lambda model, file, *how: file.write_text("no graph")).prepare(model, [images[:1]], CPU, "float32")


@needs_onnxruntime
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # by onnxruntime
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_device_on_which_onnxruntime_cannot_begin_is_refused_and_no_other_is_timed(model, images, monkeypatch, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # none, where onnxruntime is made for GPUs
    runtime = runtimes_with(write_constant_detector)["onnxruntime"]
    words = "^onnxruntime cannot begin with CUDAExecutionProvider, and CPUExecutionProvider would be timed in its place"
    with pytest.raises(InputError, match=words):
        runtime.prepare(model, [images[:1]], torch.device(name), "float32")


@needs_onnxruntime
def test_models_are_compared_in_the_runtime_that_is_asked_for(model, make_detector, images):
    models = {"base": fuse_for_inference(model), "student": fuse_for_inference(make_detector(8))}
    report = measure(models, images, runtime=onnxruntime(), score=lambda detector: len(images), **QUICK)
    assert report.protocol["runtime"] == "onnxruntime" and report.environment["runtime_version"][0].isdigit()
    assert set(report.models["student"].modes()) == {"end_to_end", "model_only"}
    facts = report.models["student"].facts
    assert facts["detections_per_image"] == 2 and facts["map"] == 3 and facts["providers"] == ["CPUExecutionProvider"]
    with pytest.raises(InputError, match="runtime cudagraph in float32 cannot run here"):
        measure(models, images, runtime=CudaGraph(), **QUICK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_replayed_backbone_finds_what_the_eager_one_does(model, images):
    device, batches = torch.device("cuda"), [[image] for image in images]
    model = fuse_for_inference(model).to(device)
    with torch.inference_mode():
        eager, replayed = (runtime.prepare(model, batches, device, "float32") for runtime in (Eager(), CudaGraph()))
        for image in images:
            own, other = (each.detector([image.to(device) / 255])[0] for each in (eager, replayed))
            torch.testing.assert_close(dict(own), dict(other))
