"""See :func:`import_detector`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jdkd.detect.architecture import architecture_of
from jdkd.detect.families import BUILDER, class_names
from jdkd.detect.predictors import remake_predictors
from jdkd.detect.published import weights_file
from jdkd.detect.sources import builders_of, open_model, parts_of
from jdkd.detect.weights import COUNTER, LoadReport, load_weights, placed_names
from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.rewrite import Architecture, build, describe
from jdkd.rewrite.architecture import set_architecture

EXACT = ("fasterrcnn", "keypointrcnn", "maskrcnn", "retinanet")  # torchvision's COCO_V1 of a ResNet-50: no eps


def import_detector(
    source: str,
    weights: Path | str | None = None,
    *,
    classes: Sequence[str] = (),
    norm_eps: float | None = None,
    **options: Any,
) -> nn.Module:
    """Opens a detector that was made elsewhere, with its weights, and for other classes where they are asked for.

    Batch norms are frozen where the weights come from frozen ones, which count no batches: torchvision's are where it
    loaded weights of its own. What is decided here is said once.

    Args:
        source: as of :func:`jdkd.detect.open_model`.
        weights: as of :func:`jdkd.detect.load_weights`, or the name of torchvision's (``"DEFAULT"``, ``"COCO_V1"``);
            every tensor of the detector must be in it. Without it, the model keeps what its builder gave it.
        classes: names of the object classes, without background; where the detector is for another number, exactly the
            predictors are made anew, with fresh weights unless the file has theirs.
        norm_eps: of frozen batch norms; by default what torchvision has for the source.
        options: as of :func:`jdkd.detect.open_model`.

    Returns:
        The detector in evaluation mode, with its ``architecture``; :func:`jdkd.detect.save` writes it.

    Raises:
        InputError: the source makes no model, the weights do not fit, or the classes are repeated or empty.
    """
    classes = class_names(classes) if len(classes) else ()
    model = open_model(source, **options)
    origin = architecture_of(model, "import_detector")
    if weights is not None:
        weights = weights_file(weights, origin)
        if (
            options.get("norm") is None
            and not Path(source).is_dir()
            and (frozen := frozen_like(model, weights, norm_eps)) is not None
        ):
            model, origin, norm_eps = frozen, architecture_of(frozen, "import_detector"), None
    if norm_eps is not None:
        raise InputError(f"norm_eps {norm_eps:g} is for weights of frozen batch norms, and these are not.")
    if weights is not None:
        _load(model, weights, len(classes))
    if classes:
        adapt_classes(model, len(classes))
    known = tuple(classes) or origin.classes
    set_architecture(model, describe(model, origin.builder, origin.arguments, classes=known))
    return model


def frozen_like(model: nn.Module, weights: Path | str, norm_eps: float | None = None) -> nn.Module | None:
    """The model with frozen batch norms, where a file has weights of all of them and counts no batches, else None.

    Args:
        model: with its ``architecture``, and fresh weights.
        weights: the file.
        norm_eps: of the frozen norms; by default what torchvision has.
    """
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    places = placed_names(model, weights)
    means = {f"{path}.running_mean" for path in norms}
    if not norms or not means <= places or any(name.endswith(COUNTER) for name in places):
        return None
    known = architecture_of(model, "frozen_like")
    exact = _has_no_eps(known) and {n for n in model.state_dict() if not n.endswith(COUNTER)} <= places
    eps = (0.0 if exact else torch.nn.BatchNorm2d(1).eps) if norm_eps is None else norm_eps
    arguments = {"builder": known.builder, "arguments": known.arguments, "eps": eps}
    kept = {name: value for name, value in known.attributes.items() if name.rpartition(".")[0] not in norms}
    frozen = build(known.replace(builder="jdkd.detect:with_frozen_norms", arguments=arguments, attributes=kept)).eval()
    own = {name: tensor for name, tensor in model.state_dict().items() if name in known.shapes}
    frozen.load_state_dict(own, strict=False)  # predictors as they were made anew for other classes
    say_once(
        f"{weights} counts no batches, so it is of frozen batch norms, and they are frozen here too, with an eps "
        f"of {eps:g}; --norm-eps of jdkd import sets another, --norm of jdkd train another kind"
    )
    return frozen


def adapt_classes(model: nn.Module, classes: int) -> None:
    """Makes the predictors of a detector anew, in place, where it is for another number of classes, and says so."""
    remade = remake_predictors(model, classes + 1)
    if remade is None:
        say_once(f"{type(model).__name__} has no predictor of torchvision's; its {classes} classes are taken on trust")
    elif remade:
        listed = ", ".join(f"{name} ({old} outputs, now {new})" for name, (old, new) in remade.items())
        say_once(f"made anew for {classes} classes and the background, to be trained: {listed}")


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
        "`jdkd import --classes` with as many names as the file's detector has"
    )


def _has_no_eps(architecture: Architecture) -> bool:
    """Whether torchvision's first COCO weights are of this detector, whose norms it gives an eps of 0."""
    *_, inner = builders_of(architecture)
    family, backbone = parts_of(inner.builder.rpartition(":")[2])
    if inner.builder == BUILDER:
        family, backbone = inner.arguments["family"], inner.arguments["backbone"]
    return family in EXACT and backbone == "resnet50"
