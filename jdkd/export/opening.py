"""See :func:`open_exported`."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
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


class Exported:
    """A file's detector, which takes images as they are.

    Args:
        run: of ``images`` [N, 3, H, W] and ``sizes`` [N, 2] to the outputs of the file.
        facts: what the file says of itself.
    """

    def __init__(self, run: Run, facts: Mapping[str, Any]) -> None:
        self.run, self.facts = run, facts

    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        """What is in images, ``[H, W, 3]`` uint8 each."""
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
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give a file that `jdkd export` wrote.") from None
    try:
        return OPENERS[Path(file).suffix](content, device)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a runtime raises on a damaged file
        raise InputError(
            f"{file} cannot be opened ({' '.join(said(error).split())[:200]}); give a file that `jdkd export` wrote."
        ) from error


def onnx_run(content: bytes, device: str) -> tuple[Run, Mapping[str, str]]:
    """What runs an ONNX file, and its metadata."""
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


def pt2_run(content: bytes, device: str) -> tuple[Run, Mapping[str, str]]:
    """What runs an exported program of torch's, and its extra files."""
    import torch
    import torchvision.ops  # noqa: F401  (its operators are in the program)

    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise InputError("the file is damaged, or no exported program of torch's; give one that `jdkd export` wrote.")
    extra = {FACTS: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not write to the file's bytes
        module = torch.export.load(io.BytesIO(content), extra_files=extra).module(check_guards=False).to(device)

    def run(images: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = module(torch.from_numpy(images).to(device), torch.from_numpy(sizes).to(device))
        return [output.cpu().numpy() for output in found]

    return run, extra


def _opened(opened: Callable[[bytes, str], tuple[Run, Mapping[str, str]]], content: bytes, device: str) -> Exported:
    run, said_of_it = opened(content, device)
    if not said_of_it.get(FACTS):
        raise InputError("the file does not say how its images are resized; give one that `jdkd export` wrote.")
    facts = json.loads(said_of_it[FACTS])
    if facts["format"] != FORMAT:
        raise InputError(f"the file is of format {facts['format']}, and {FORMAT} is known here; export it anew.")
    return Exported(run, facts)


OPENERS: dict[str, Callable[[bytes, str], Exported]] = {
    ".onnx": lambda content, device: _opened(onnx_run, content, device),
    ".pt2": lambda content, device: _opened(pt2_run, content, device),
}
