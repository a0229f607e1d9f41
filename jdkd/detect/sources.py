"""See :func:`open_model`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import detection as detectors
from torchvision.models import get_model_builder, list_models

from jdkd.detect.architecture import architecture_of, known_architecture
from jdkd.detect.checkpoint import load
from jdkd.detect.families import BUILDER, FAMILIES
from jdkd.detect.resizing import resize
from jdkd.errors import InputError, one_of_these
from jdkd.files import read_text
from jdkd.rewrite import Architecture, describe
from jdkd.rewrite import build as rebuilt
from jdkd.rewrite.architecture import set_architecture
from jdkd.rewrite.building import call, imported
from jdkd.rewrite.checkpoint import ARCHITECTURE
from jdkd.rewrite.description import can_describe

COCO = 90  # classes, where nobody says how many
SIZES = ("min_size", "max_size", "max_detections")
OURS = ("backbone", "pyramid", "channels", "box_head")  # what torchvision's own builders do not take


def open_model(source: str, *, classes: int | None = None, **options: Any) -> nn.Module:
    """A model by what a user calls it, in evaluation mode.

    Args:
        source: a folder written by ``jdkd train``, ``jdkd import`` or :func:`jdkd.detect.save`; the name of a detector
            of torchvision (``"retinanet_resnet50_fpn"``), which is built as torchvision does it, with fresh weights; a
            family of :data:`jdkd.detect.FAMILIES`, which wants a backbone, also as ``"family:backbone"``; a JSON
            file of an architecture, built with fresh weights; or ``"package.module:function"``, which is imported (the
            current folder is looked in too).
        classes: number of object classes, without background, of what is built. A function is called with it, and one
            for the background, as ``num_classes`` if it takes that, and a folder has its own.
        options: of :func:`jdkd.detect.detector`, each of them or None: ``backbone``, ``pyramid``, ``channels`` and
            ``box_head`` take the family of a name, ``norm`` exchanges batch norms, and ``min_size``, ``max_size`` and
            ``max_detections`` hold of any detector with torchvision's transform.

    Returns:
        The model; it carries the ``architecture`` that it was built from.

    Raises:
        InputError: it is none of these, what it names makes no ``torch.nn.Module``, or an option is not for it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not isinstance(source, str | Path):
        raise InputError(f"a model is opened by its name, its folder or package.module:function, got {source!r:.80}.")
    if classes is not None and (type(classes) is not int or classes < 1):
        raise InputError(f"classes must be a whole number of at least 1, got {classes!r}.")
    source = str(source)
    if (Path(source) / ARCHITECTURE).is_file():
        _refuse(given, ("norm", *OURS), f"{source} is a folder, whose detector has its own")
        return _resized(load(source), given)
    if source.endswith(".json"):
        _refuse(given, ("norm", *OURS), f"{source} is a file, whose detector has its own")
        return _resized(_of_file(Path(source)), given)
    family, colon, backbone = source.partition(":")
    if family in FAMILIES and colon:
        _refuse(given, ("backbone",), f"{source} names its")
        source, given = family, given | {"backbone": backbone}
    if ":" in source:
        _refuse(given, OURS, f"{source} builds its own")
        takes = "num_classes" in _parameters(imported(source))
        known = {"num_classes": classes + 1} if takes and classes is not None else {}
        return _resized(_called(*_with_norm(source, known, given)), given)
    return _called(*_builder(source, classes, given))


def has_own_weights(source: str) -> bool:
    """Whether what :func:`open_model` makes of a source may have been trained: folders, and what functions return."""
    family, colon, _ = source.partition(":")
    return Path(source).is_dir() or (bool(colon) and family not in FAMILIES)


def builders_of(architecture: Architecture) -> Iterator[Architecture]:
    """What a detector is built by: a builder, and inside it the one whose detector it changes, and so on."""
    arguments = architecture.arguments
    yield architecture
    if isinstance(arguments.get("builder"), str) and isinstance(arguments.get("arguments"), Mapping):
        yield from builders_of(Architecture(arguments["builder"], arguments["arguments"]))


def parts_of(name: str) -> tuple[str, str]:
    """Family and backbone in a name of torchvision's, ``("retinanet_v2", "resnet50")``; ("", "") of another."""
    found = re.fullmatch(r"([a-z]+)\d*_(.+?)(_320)?(_fpn)?(_v2)?", name)
    return (f"{found[1]}{found[5] or ''}", found[2]) if found and name in torchvisions() else ("", "")


def torchvisions() -> list[str]:
    """Names of torchvision's detectors."""
    return list_models(module=detectors)


def _of_file(file: Path) -> nn.Module:
    """What a file of an architecture describes."""
    text = read_text(file, "give the JSON file of an architecture")
    return rebuilt(Architecture.from_json(text, source=str(file))).eval()


def _builder(source: str, classes: int | None, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Import path and arguments of what makes a model by name."""
    family, backbone = (source, "") if source in FAMILIES else parts_of(source)
    if not family and Path(source).is_file():
        raise InputError(
            f"{source} is a file, and weights alone do not say of which detector they are; make a folder of it with "
            f"`jdkd import MODEL --weights {source} --out FOLDER`."
        )
    if not family and len(Path(source).parts) > 1:
        raise InputError(
            f"{source} does not exist; give the folder of a detector, as `jdkd train` and `jdkd import` write it, or a "
            "name."
        )
    if not family:
        known = (*torchvisions(), *FAMILIES)
        raise InputError(
            f"{source!r} is no folder with an {ARCHITECTURE}, no package.module:function, none of torchvision's "
            f"detectors {', '.join(torchvisions())}, and none of the families {', '.join(FAMILIES)} (with a backbone, "
            f"as FAMILY:BACKBONE); {one_of_these(source, known)}."
        )
    if source not in FAMILIES and not given.keys() & set(OURS):
        free = [name for name in _parameters(get_model_builder(source)) if name.startswith("weights")]
        outputs = {} if classes is None else {"num_classes": classes + 1}
        builder, arguments = _with_norm(f"{detectors.__name__}:{source}", dict.fromkeys(free) | outputs, given)
        sizes = {name: given[name] for name in SIZES if name in given}
        if not sizes:
            return builder, arguments
        return "jdkd.detect:resized", {"builder": builder, "arguments": arguments, **sizes}
    if "backbone" not in given and not backbone:
        whole = ", ".join(name for name in torchvisions() if parts_of(name)[0] == source)
        but = f", and has a backbone only in the names {whole}" if whole else ", and has no backbone of its own"
        raise InputError(f"{source} is a family of detectors{but}; give a backbone too.")
    count = COCO if classes is None else classes
    return BUILDER, {"family": family, "backbone": backbone, "classes": count, **given}


def _called(builder: str, arguments: Mapping[str, Any]) -> nn.Module:
    """What a builder makes, with its architecture; one that it carries already stays, if that says all of it.

    What a function of a user's makes by one of our builders, and gives other anchors, is that function's.
    """
    model = call(builder, arguments).eval()
    known = known_architecture(model)
    if known is None or "builder" in arguments:
        set_architecture(model, Architecture(builder, arguments))
    elif known.builder != builder and not can_describe(model, known.builder, known.arguments):
        set_architecture(model, Architecture(builder, arguments, classes=known.classes))
    return model


def _with_norm(builder: str, arguments: dict[str, Any], given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if "norm" not in given:
        return builder, arguments
    return "jdkd.detect:with_norms", {"builder": builder, "arguments": arguments, "norm": given["norm"]}


def _resized(model: nn.Module, given: Mapping[str, Any]) -> nn.Module:
    """Of another input size, which its architecture says; anchors and the like are its own matter."""
    if sizes := {name: given[name] for name in SIZES if name in given}:
        resize(model, **sizes)
        known = architecture_of(model, "open_model")
        set_architecture(model, describe(model, known.builder, known.arguments, classes=known.classes))
    return model


def _refuse(given: Mapping[str, Any], names: tuple[str, ...], why: str) -> None:
    if held := [name for name in names if name in given]:
        raise InputError(f"{why} {held[0]}; leave {held[0]} {given[held[0]]!r} out.")


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of what is written in C, say
        return ()
