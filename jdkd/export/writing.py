"""See :func:`exported`."""

from __future__ import annotations

import importlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from jdkd import __version__
from jdkd.detect.architecture import identity, known_architecture
from jdkd.detect.exportable import Exportable, exportable
from jdkd.detect.input_size import input_transform
from jdkd.errors import InputError, said
from jdkd.export.opening import FACTS, FORMAT
from jdkd.export.suppression import by_onnx, by_score, by_torchvision
from jdkd.nn.unwrapping import unwrapped
from jdkd.run_folder import versions

OPSET = 18
INPUTS = ("images", "sizes")
RULE = (
    "images [N, 3, H, W]: RGB in 0..1, resized (bilinear, half pixels, no antialiasing) to the height and width in "
    "`fixed`, or where there is none the short side to min_size unless the long side would exceed max_size (floor), "
    "padded at the bottom and the right to a multiple of `multiple`; sizes [N, 2]: height and width of each without "
    "the padding. Mean and deviation are inside. boxes are xyxy in pixels of the resized image; label 1 is the first "
    "of `classes`; rows of score 0 are no detections; masks are those of the boxes, to be pasted"
)
GUARDS = ". torch.export.load(FILE).module(check_guards=False) takes small images too, of which a level is one cell"


def exported(
    model: nn.Module,
    form: str,
    *,
    half: bool = False,
    nms: str = "inside",
    weights: str | None = None,
    stages: bool = False,
    counting: bool = False,
) -> bytes:
    """A detector as the content of a file.

    Args:
        model: as of :func:`jdkd.detect.exportable.exportable`; left as it was.
        form: ``"onnx"``, of standard operators alone, or ``"pt2"``, torch's exported program.
        half: weights and features in fp16; inputs and outputs stay fp32.
        nms: ``"inside"`` or ``"outside"``, the last non-maximum suppression.
        weights: SHA-256 of the file of the weights.
        stages: return what is computed on the way, too.
        counting: let every suppression keep the best, however they overlap, to be timed before there are trained
            weights.

    Raises:
        InputError: there is no such form of the detector, or torch cannot write it.
    """
    suppress = by_score if counting else by_onnx if form == "onnx" else by_torchvision
    made = exportable(model, suppress, half=half, final=nms == "inside")
    made.with_stages = stages
    told = facts(model, made, form, half=half, nms=nms, weights=weights)
    write = {"onnx": _onnx, "pt2": _pt2}[form]
    with _quietly(), torch.no_grad():
        try:
            return write(made, told)
        except (InputError, ModuleNotFoundError):
            raise
        except Exception as error:  # whatever an exporter raises on a model that it cannot follow
            kind = type(unwrapped(model)).__name__
            raise InputError(
                f"torch {torch.__version__} cannot write this {kind} as {form}: {' '.join(said(error).split())[:300]}"
            ) from error


def require_runtime(form: str) -> None:
    """Makes sure that what writes and runs a form is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    for package in ("onnx", "onnxruntime") if form == "onnx" else ():
        importlib.import_module(package)


def facts(
    model: nn.Module, made: Exportable, form: str, *, half: bool, nms: str, weights: str | None
) -> dict[str, Any]:
    """What a file says of itself."""
    transform, known = cast(Any, input_transform(model)), known_architecture(model)  # what has none is refused before
    heads = made.limits
    return {
        "format": FORMAT,
        "detector": type(unwrapped(model)).__name__,
        "classes": list(known.classes) if known else [],
        "architecture": identity(model),
        "weights_sha256": weights,
        "dtype": "fp16" if half else "fp32",
        "nms": nms,
        "nms_iou": heads.nms_thresh,
        "score_threshold": heads.score_thresh,
        "detections": heads.detections_per_img,
        "resize": {
            "min_size": int(transform.min_size[-1]),
            "max_size": int(transform.max_size),
            "multiple": int(transform.size_divisible),
            **({"fixed": [int(side) for side in reversed(fixed)]} if (fixed := transform.fixed_size) else {}),
        },
        "mean": list(map(float, transform.image_mean)),
        "std": list(map(float, transform.image_std)),
        "inputs": list(INPUTS),
        "outputs": list(made.names),
        "rule": RULE + (GUARDS if form == "pt2" else ""),
        "versions": {"jdkd": __version__, **versions()},
    }


def _example(resize: Mapping[str, Any], cells: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of the one size that a detector takes, or of so many times `multiple` rows and columns."""
    multiple = resize["multiple"]
    if "fixed" in resize:
        cells = tuple(-(-side // multiple) for side in resize["fixed"])
    height, width = (multiple * count for count in cells)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor([[height, width], [height - 1, width - 2]])


def _onnx(made: Exportable, told: Mapping[str, Any]) -> bytes:
    """By torch's exporter of traces: it writes every size as a computation, where the newer one guards on some."""
    import onnx

    multiple, stream = told["resize"]["multiple"], io.BytesIO()
    example = _example(told["resize"], (max(2, 64 // multiple), max(3, 96 // multiple)))
    outputs = made(*example)  # says the names of the stages
    stages = made.stage_names if made.with_stages else []
    names = [*told["outputs"], *stages]
    sides = {} if "fixed" in told["resize"] else {2: "height", 3: "width"}
    axes = {"images": {0: "batch", **sides}, **{name: {0: "batch"} for name in ("sizes", *names)}}
    for name, output in zip(stages, outputs[len(made.names) :], strict=True):
        axes[name] = {dim: f"{name}: {dim}" for dim in range(output.dim())}
    torch.onnx.export(
        made,
        example,
        cast(Any, stream),
        dynamo=False,
        opset_version=OPSET,
        input_names=list(INPUTS),
        output_names=names,
        dynamic_axes=axes,
    )
    model = onnx.load_from_string(stream.getvalue())
    if foreign := {each.domain for each in model.opset_import} - {"", "ai.onnx"}:
        raise InputError(f"the detector needs operators of {', '.join(sorted(foreign))}, which are not ONNX's own.")
    del model.graph.value_info[:]
    model.producer_name, model.producer_version = "jdkd", __version__
    onnx.helper.set_model_props(model, {FACTS: json.dumps({**told, "outputs": names, "opset": OPSET})})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _pt2(made: Exportable, told: Mapping[str, Any]) -> bytes:
    """By ``torch.export``; the example is so large that no level is of one cell, which torch would take for granted."""
    from torch.export import Dim, export, save

    multiple, stream = told["resize"]["multiple"], io.BytesIO()
    batch, *sides = Dim("batch", max=1024), *(Dim(name, max=2**20 // multiple) for name in ("height", "width"))
    height, width = (multiple * side if multiple > 1 else side for side in sides)
    free = {} if "fixed" in told["resize"] else {2: height, 3: width}
    shapes = ({0: batch, **free}, {0: batch})
    example = _example(told["resize"], tuple(max(count, 32 * count // multiple) for count in (9, 11)))
    program = export(made, example, dynamic_shapes=shapes, strict=False)
    names = [*told["outputs"], *(made.stage_names if made.with_stages else ())]
    save(program, stream, extra_files={FACTS: json.dumps({**told, "outputs": names})})
    return stream.getvalue()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch's exporters say of a trace, its constants and their own age."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
