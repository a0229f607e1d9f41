"""See :func:`open_exported`."""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jdkd.errors import InputError, said
from jdkd.export.preparing import Found, batch_of, found_of

FACTS = "jdkd"
"""The key of an ONNX file's metadata, and the extra file of a pt2's, that hold what is known of it, as JSON."""
FORMAT = 1
"""Of these facts."""
MARK = '"weights_sha256"'
"""What stands in the file somewhere, as it is one of these facts."""
DETECTION = ("boxes", "labels", "scores", "masks")
Run = Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]
Opened = tuple[Run, Mapping[str, str]]
"""What runs a file, and its metadata."""


class Exported:
    """A file's detector, which takes images as they are.

    Args:
        run: of ``images`` [N, 3, H, W] and ``sizes`` [N, 2] to the outputs of the file.
        facts: what the file says of itself.
        runtime: what runs it.
    """

    def __init__(self, run: Run, facts: Mapping[str, Any], runtime: str = "") -> None:
        self.run, self.facts, self.runtime = run, facts, runtime

    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        """What is in images, ``[H, W, 3]`` uint8 each, RGB.

        Returns:
            For every image its ``boxes`` [M, 4] xyxy in pixels of it, ``labels`` [M] and ``scores`` [M], and ``masks``
            [M, H, W] in 0..1 where the detector has them.

        Raises:
            InputError: there is no image, one is no such array, or the runtime cannot run the file on them.
        """
        batch, sizes = batch_of(images, self.facts["resize"])
        outputs = dict(zip(self.facts["outputs"], self.run(batch, sizes), strict=True))
        outputs = {name: output for name, output in outputs.items() if name in DETECTION}  # without stages
        return found_of(outputs, sizes, [image.shape[:2] for image in images], self.facts)


def open_exported(file: Path, device: str = "cpu") -> Exported:
    """Opens what `jdkd export` wrote: an ONNX file in onnxruntime (without torch), a pt2 in torch.

    Args:
        file: it.
        device: ``"cpu"``, or ``"cuda"`` where the runtime has it.

    Raises:
        InputError: it is missing or damaged, or was not written by `jdkd export`.
    """
    path = Path(file)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give a file that `jdkd export` wrote.") from None
    if path.suffix not in OPENERS:
        raise InputError(f"{file} ends with none of {', '.join(OPENERS)}; give a file that `jdkd export` wrote.")
    try:
        return OPENERS[path.suffix](content, device)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def checking(form: str) -> dict[str, Callable[[bytes, str], Exported]]:
    """What opens a form in each runtime that it is checked in before it is written: those that are installed."""
    return {name: each for name, each in CHECKED_IN[form].items() if importlib.util.find_spec(name) is not None}


def onnx_run(content: bytes, device: str) -> Opened:
    """An ONNX file in onnxruntime."""
    import onnxruntime

    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    kind, _, number = device.partition(":")
    wanted = providers[kind]
    if wanted not in onnxruntime.get_available_providers():
        raise InputError(f"--device is {device}, and this onnxruntime has no {wanted}; give --device cpu.")
    how = [(wanted, {"device_id": number} if number else {})]
    session = onnxruntime.InferenceSession(content, providers=how)
    if wanted not in session.get_providers():  # it takes the CPU then, and says why on stderr
        raise InputError(f"--device is {device}, and onnxruntime cannot begin on it; give --device cpu.")
    names = [each.name for each in session.get_inputs()]
    return (
        lambda images, sizes: session.run(None, dict(zip(names, (images, sizes), strict=True))),
        session.get_modelmeta().custom_metadata_map,
    )


def openvino_run(content: bytes, device: str) -> Opened:
    """An ONNX file in OpenVINO, on the CPU."""
    import onnx
    import torch

    from jdkd.latency.exported import OpenVinoEngine

    with tempfile.TemporaryDirectory(prefix="jdkd-") as folder:
        file = Path(folder) / "detector.onnx"
        file.write_bytes(content)
        engine = OpenVinoEngine(file, (), torch.get_num_threads())
    names = list(engine.inputs)
    return (
        lambda images, sizes: engine.run(dict(zip(names, (images, sizes), strict=True))),
        {each.key: each.value for each in onnx.load_from_string(content).metadata_props},
    )


def pt2_run(content: bytes, device: str) -> Opened:
    """An exported program of torch's, whose extra files are its metadata."""
    import torch
    import torchvision.ops  # noqa: F401  (its operators are in the program)
    from torch.export.passes import move_to_device_pass

    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise InputError("the file is damaged, or no exported program of torch's; give one that `jdkd export` wrote.")
    extra = {FACTS: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not write to the file's bytes
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
    if device != "cpu":  # where it was made, which what it creates as it runs remembers
        program = move_to_device_pass(program, device)
    module = program.module(check_guards=False)

    def run(images: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = module(torch.from_numpy(images).to(device), torch.from_numpy(sizes).to(device))
        return [output.cpu().numpy() for output in found]

    return run, extra


def _opened(name: str, opened: Callable[[bytes, str], Opened], content: bytes, device: str) -> Exported:
    remedy = "export it anew, or in another format"
    try:
        run, said_of_it = opened(content, device)
        facts = json.loads(said_of_it.get(FACTS) or "{}")
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:  # whatever a runtime raises on a file that is damaged, or beyond it
        raise InputError(f"{name} cannot open the file ({_shortly(error)}); {remedy}.") from error
    if not facts:
        raise InputError("the file does not say how its images are resized; give one that `jdkd export` wrote.")
    if facts["format"] != FORMAT:
        raise InputError(f"the file is of format {facts['format']}, and {FORMAT} is known here; export it anew.")

    def told(images: np.ndarray, sizes: np.ndarray) -> Sequence[np.ndarray]:
        try:
            return run(images, sizes)
        except Exception as error:  # whatever a runtime raises
            batch = list(images.shape)
            raise InputError(f"{name} cannot run the file on a batch {batch} ({_shortly(error)}); {remedy}.") from error

    return Exported(told, facts, name)


def _shortly(error: Exception) -> str:
    return " ".join(said(error).split())[:200]


IN_ONNXRUNTIME, IN_OPENVINO, IN_TORCH = (
    partial(_opened, name, opened)
    for name, opened in (("onnxruntime", onnx_run), ("openvino", openvino_run), ("torch", pt2_run))
)
OPENERS: dict[str, Callable[[bytes, str], Exported]] = {".onnx": IN_ONNXRUNTIME, ".pt2": IN_TORCH}
CHECKED_IN = {"onnx": {"onnxruntime": IN_ONNXRUNTIME, "openvino": IN_OPENVINO}, "pt2": {"torch": IN_TORCH}}
"""Runtimes by the packages that bring them."""
