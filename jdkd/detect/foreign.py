"""See :func:`import_detector`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from jdkd.detect.predictors import remake_predictors
from jdkd.detect.sources import open_model
from jdkd.detect.weights import COUNTER, LoadReport, load_weights, tensor_names
from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.rewrite import Architecture, build, describe

EXACT = ("fasterrcnn", "keypointrcnn", "maskrcnn", "retinanet")  # torchvision's COCO_V1 of a ResNet-50: no eps


def import_detector(
    source: str,
    weights: Path | str | None = None,
    *,
    classes: Sequence[str] = (),
    norm_eps: float | None = None,
) -> nn.Module:
    """Opens a detector that was made elsewhere, with its weights, and for other classes where they are asked for.

    Batch norms are frozen where the weights come from frozen ones, which count no batches: torchvision's are where it
    loaded weights of its own. What is decided here is said once.

    Args:
        source: as of :func:`jdkd.detect.open_model`.
        weights: as of :func:`jdkd.detect.load_weights`; every tensor of the detector must be in it. Without it, the
            model keeps what its builder gave it.
        classes: names of the object classes, without background; where the detector is for another number, exactly the
            predictors are made anew, with fresh weights unless the file has theirs.
        norm_eps: of frozen batch norms; by default what torchvision has for the source.

    Returns:
        The detector in evaluation mode, with its ``architecture``; :func:`jdkd.detect.save` writes it.

    Raises:
        InputError: the source makes no model, the weights do not fit, or the classes are repeated or empty.
    """
    names = [name for name in classes if name.strip()]
    if len(names) != len(classes) or len(set(names)) != len(names):
        raise InputError(f"classes must be names, each once, got {', '.join(map(repr, classes))[:200]}.")
    model = open_model(source)
    origin: Architecture = model.architecture
    if weights is not None and not Path(source).is_dir() and _from_frozen_norms(model, weights):
        eps = _eps(source) if norm_eps is None else norm_eps
        arguments = {"builder": origin.builder, "arguments": origin.arguments, "eps": eps}
        origin = Architecture("jdkd.detect:with_frozen_norms", arguments)
        model = build(origin).eval()
        say_once(
            f"{weights} counts no batches, so it is of frozen batch norms, and they are frozen here too, with an eps "
            f"of {eps:g}; --norm-eps sets another"
        )
    elif norm_eps is not None:
        raise InputError(f"norm_eps {norm_eps:g} is for weights of frozen batch norms, and these are not.")
    if weights is not None:
        _load(model, weights, len(classes))
    if classes:
        _remake(model, len(classes))
    known = tuple(classes) or origin.classes
    model.architecture = describe(model, origin.builder, origin.arguments, classes=known)
    return model


def _load(model: nn.Module, weights: Path | str, classes: int) -> None:
    """Loads all of the model; where its predictors are for another number of classes, those that were asked for."""
    report = load_weights(model, weights)
    if report.misshapen and classes and (remade := remake_predictors(model, classes + 1)):
        ours = {name.rpartition(".")[0] for name in report.misshapen}
        if ours <= remade.keys():
            report = load_weights(model, weights)
    if report.misshapen or report.missing:
        raise InputError(f"{weights} does not fit: {_left_out(report)}.")
    if report.unexpected:
        say_once(f"{weights} has {len(report.unexpected)} tensors that the model does not: {report.unexpected[0]}, ...")


def _left_out(report: LoadReport) -> str:
    parts = [
        f"{name} is {theirs} in the file and {ours} in the model" for name, (theirs, ours) in report.misshapen.items()
    ]
    parts += [f"{name} is not in the file" for name in report.missing]
    more = f", and {len(parts) - 3} more" if len(parts) > 3 else ""
    return (
        f"{', '.join(parts[:3])}{more}; give the weights of this architecture, and where only the predictors differ, "
        "--classes with as many names as the file's detector has"
    )


def _remake(model: nn.Module, classes: int) -> None:
    remade = remake_predictors(model, classes + 1)
    if remade is None:
        say_once(f"{type(model).__name__} has no predictor of torchvision's; its {classes} classes are taken on trust")
    elif remade:
        listed = ", ".join(f"{name} ({old} outputs, now {new})" for name, (old, new) in remade.items())
        say_once(f"made anew for {classes} classes and the background, to be trained: {listed}")


def _from_frozen_norms(model: nn.Module, weights: Path | str) -> bool:
    norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    names = tensor_names(weights)
    with_statistics = any(name.endswith("running_mean") for name in names)
    return norms and with_statistics and not any(name.endswith(COUNTER) for name in names)


def _eps(source: str) -> float:
    return 0.0 if source in {f"{family}_resnet50_fpn" for family in EXACT} else torch.nn.BatchNorm2d(1).eps
