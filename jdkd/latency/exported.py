"""Runtimes that run an exported file: onnxruntime, OpenVINO, and TensorRT through onnxruntime.

They take what an exporter writes: a graph with one input of images ``[N, 3, H, W]``, resized and padded, in 0..1, with
``[N, 2]`` heights and widths beside it where it asks for sizes, and outputs ``boxes``, ``scores`` and ``labels``, each
with the image first; rows whose score is not above 0 are no detections.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from jdkd.detect.contract import FOUND
from jdkd.detect.input_size import input_transform
from jdkd.errors import InputError, said
from jdkd.latency.calls import on_device
from jdkd.latency.runtimes import Artefact, Batches, Compiled, CudaGraph, Eager, Runtime

Exporter = Callable[[nn.Module, Path, bool, bool], object]
"""Writes a detector to an ONNX file: in fp16 or else in fp32, and with an NMS that only counts or else with its own."""
Provider = str | tuple[str, dict[str, str]]
"""Of onnxruntime: its name, or name and options."""
CPU, CUDA = torch.device("cpu"), "cuda"
NUMPY = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "double": np.float64}


class Engine(Protocol):
    """A file that a runtime has opened.

    Args:
        inputs: rank and type, as numpy has it, of every input.
        outputs: names of the outputs.
        facts: what a record says of it.
    """

    inputs: Mapping[str, tuple[int, Any]]
    outputs: Sequence[str]
    facts: Mapping[str, Any]

    def run(self, feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """The outputs, in their order."""


class OnnxEngine:
    """A session of onnxruntime.

    Args:
        file: ONNX.
        providers: of onnxruntime, the first that can takes a node; with options, where they have some.
        threads: of an operator.

    Raises:
        InputError: the first of the providers cannot begin, and another would have taken its place.
    """

    def __init__(self, file: Path, providers: Sequence[Provider], threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # into the time of the next model
        self._session = onnxruntime.InferenceSession(str(file), options, providers=list(providers))
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if wanted not in (there := self._session.get_providers()):
            raise InputError(
                f"onnxruntime cannot begin with {wanted}, and {there[0]} would be timed in its place; give --device "
                "cpu, or other --runtimes."
            )
        self.inputs = {
            each.name: (len(each.shape), NUMPY[each.type.removeprefix("tensor(").removesuffix(")")])
            for each in self._session.get_inputs()
        }
        self.outputs = [each.name for each in self._session.get_outputs()]
        self.facts = {"providers": there, "threads": threads, "spinning": False}

    def run(self, feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        return self._session.run(self.outputs, dict(feeds))


class OpenVinoEngine:
    """A model that OpenVINO has compiled for the CPU.

    Args:
        file: ONNX.
        providers: none.
        threads: of inference.
    """

    def __init__(self, file: Path, providers: Sequence[Provider], threads: int) -> None:
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # as it would take bf16 by itself where there is such hardware
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._compiled = openvino.Core().compile_model(str(file), "CPU", hints | exact)
        self.inputs = {
            each.any_name: (each.partial_shape.rank.get_length(), each.element_type.to_dtype().type)
            for each in self._compiled.inputs
        }
        self.outputs = [each.any_name for each in self._compiled.outputs]
        self.facts = {**hints, **exact}

    def run(self, feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        found = self._compiled(dict(feeds))
        return [found[place] for place in range(len(self.outputs))]


class OfFile:
    """A runtime of exported files.

    Args:
        name: of the runtime.
        package: that it takes; its version is recorded.
        engine: opens a file.
        providers: of onnxruntime that it needs, by kind of device; none for the others.
        dtypes: that it runs.
        export: see :data:`Exporter`.
    """

    def __init__(
        self,
        name: str,
        package: str,
        engine: Callable[[Path, Sequence[Provider], int], Engine],
        providers: Mapping[str, Sequence[str]],
        export: Exporter,
        dtypes: Sequence[str] = ("float32", "float16"),
    ) -> None:
        self.name, self._package, self._engine, self._providers = name, package, engine, providers
        self._export, self._dtypes, self._counting = export, dtypes, False

    @property
    def version(self) -> str:
        found = metadata.packages_distributions().get(self._package, [self._package])
        return metadata.version(found[0])

    def why_not(self, device: torch.device, dtype: str) -> str | None:
        if device.type not in self._providers:
            return f"it is for {' and '.join(self._providers)} here, and the device is {device}"
        for package in (self._package, "onnx"):  # what runs a file, and what writes it
            if importlib.util.find_spec(package) is None:
                return f"the package {package} is not installed; pip install {package}"
        if dtype not in self._dtypes:
            return f"it runs {' and '.join(self._dtypes)}"
        return self._missing_provider(self._providers[device.type])

    def prepare(self, model: nn.Module, batches: Batches, device: torch.device, dtype: str) -> Artefact:
        with tempfile.TemporaryDirectory(prefix="jdkd-") as folder:
            file = Path(folder) / "detector.onnx"
            self._export(_on_host(model), file, dtype == "float16", self._counting)
            content = file.read_bytes()
        return self._opened(content, model, batches, device)

    def _opened(self, content: bytes, model: nn.Module, batches: Batches, device: torch.device) -> Artefact:
        with tempfile.TemporaryDirectory(prefix="jdkd-") as folder:
            file = Path(folder) / "detector.onnx"
            file.write_bytes(content)
            with _explained(self.name, "open"):
                engine = self._engine(file, _on(device, self._providers[device.type]), torch.get_num_threads())
        detector = ExportedDetector(model, engine, self.name)
        prepared = [detector.fed(on_device(batch, CPU)) for batch in batches]
        with _explained(self.name, "run"):
            for feeds, _ in prepared:  # TensorRT builds an engine for sizes that it has not seen
                engine.run(feeds)
        inside = {
            "end_to_end": f"{self.name}: resize by torch on the host; its copies, normalise, network and NMS",
            "model_only": f"{self.name}: normalise, network and NMS, on a resized batch on the host, its copies within",
        }
        facts = {"sha256_of_file": hashlib.sha256(content).hexdigest(), **engine.facts}
        reopen = partial(self._opened, content, model, batches, device) if device == CPU else None
        return Artefact(detector, lambda index: engine.run(prepared[index][0]), inside, facts, True, reopen)

    @contextmanager
    def steady_nms(self, counts: Sequence[int]) -> Iterator[None]:
        self._counting = True  # a file keeps a fixed number of the best of every class
        try:
            yield
        finally:
            self._counting = False

    def _missing_provider(self, providers: Sequence[str]) -> str | None:
        if not providers:
            return None
        import onnxruntime

        there = onnxruntime.get_available_providers()
        return None if providers[0] in there else f"this onnxruntime has no {providers[0]}, but {', '.join(there)}"


class ExportedDetector(nn.Module):
    """An opened file that is called as torchvision's detectors are; resizes and scales back with torch, on the host.

    Args:
        model: what was exported; its transform says how images are resized, and its classes what labels mean.
        engine: the opened file.
        name: of the runtime.

    Raises:
        InputError: the file takes or returns something else than an exported detector does.
    """

    def __init__(self, model: nn.Module, engine: Engine, name: str) -> None:
        super().__init__()
        transform = input_transform(model)
        images = [key for key, (rank, _) in engine.inputs.items() if rank == 4]
        sizes = [key for key, (rank, _) in engine.inputs.items() if rank == 2]
        if transform is None or len(images) != 1 or len(images) + len(sizes) != len(engine.inputs):
            raise InputError(
                f"{name} cannot feed this detector: the exported file takes {', '.join(engine.inputs)}, and one input "
                "[N, 3, H, W], with [N, 2] sizes at most, of a detector with torchvision's transform is understood."
            )
        if missing := set(FOUND) - set(engine.outputs):
            raise InputError(
                f"{name} cannot read this detector: the exported file returns {', '.join(engine.outputs)} and no "
                f"{', '.join(sorted(missing))}."
            )
        self.transform = copy.deepcopy(transform).eval()
        self.transform.image_mean, self.transform.image_std = [0.0] * 3, [1.0] * 3  # the file normalises
        self._engine, self._images, self._sizes = engine, images[0], sizes
        if (architecture := getattr(model, "architecture", None)) is not None:
            self.architecture = architecture

    def fed(self, images: Sequence[Tensor]) -> tuple[dict[str, np.ndarray], list[tuple[int, int]]]:
        """Images ``[3, H, W]`` in 0..1 as the file takes them, and height and width of each as it was resized."""
        batch, _ = self.transform([image.cpu() for image in images])
        kind = self._engine.inputs[self._images][1]
        feeds = {self._images: np.ascontiguousarray(batch.tensors.numpy().astype(kind, copy=False))}
        for name in self._sizes:
            feeds[name] = np.array(batch.image_sizes, dtype=self._engine.inputs[name][1])
        return feeds, batch.image_sizes

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        feeds, sizes = self.fed(images)
        outputs = dict(zip(self._engine.outputs, self._engine.run(feeds), strict=True))
        found = []
        names = [name for name in (*FOUND, "masks") if name in outputs]
        for place in range(len(images)):
            each = {name: torch.from_numpy(np.ascontiguousarray(outputs[name][place])) for name in names}
            kept = {name: value[each["scores"] > 0] for name, value in each.items()}
            kept = {name: value.long() if name == "labels" else value.float() for name, value in kept.items()}
            found.append(kept | ({"masks": kept["masks"][:, None]} if "masks" in kept else {}))  # [M, 1, R, R]
        return self.transform.postprocess(found, sizes, [tuple(image.shape[-2:]) for image in images])


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a runtime raises that cannot read or run the file
        raise InputError(
            f"{name} cannot {what} the exported detector ({said(error)}); leave it out of --runtimes."
        ) from error


def _on_host(model: nn.Module) -> nn.Module:
    """A model on the CPU; a copy of one that is elsewhere, and stays there."""
    there = all(tensor.device == CPU for tensor in (*model.parameters(), *model.buffers()))
    return model if there else copy.deepcopy(model).to(CPU)


def _on(device: torch.device, providers: Sequence[str]) -> list[Provider]:
    """Providers of onnxruntime, those of a GPU on the one that was asked for; by themselves they take the first."""
    if device.index is None:
        return list(providers)
    of_cpu, options = "CPUExecutionProvider", {"device_id": str(device.index)}
    return [name if name == of_cpu else (name, options) for name in providers]


def runtimes_with(export: Exporter) -> dict[str, Runtime]:
    """All runtimes by name, those of files with what writes them."""
    on_cuda = ("CUDAExecutionProvider", "CPUExecutionProvider")
    tensorrt = ("TensorrtExecutionProvider", *on_cuda)
    found = [
        Eager(),
        Compiled(),
        CudaGraph(),
        OfFile("onnxruntime", "onnxruntime", OnnxEngine, {"cpu": ["CPUExecutionProvider"], CUDA: on_cuda}, export),
        OfFile("openvino", "openvino", OpenVinoEngine, {"cpu": []}, export, ("float32",)),
        OfFile("tensorrt", "onnxruntime", OnnxEngine, {CUDA: tensorrt}, export),
    ]
    return {each.name: each for each in found}
