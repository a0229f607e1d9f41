"""A pruned candidate of a plain model, evaluated over the model's own weights."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.coupling import ElasticGroups, repeated
from jdkd.nn.elastic import Elastic
from jdkd.ops.active_channels import Channels, ChannelsLike, active_channels, active_part
from jdkd.ops.elastic_conv import conv_channels


class _Swap(NamedTuple):
    """An entry of a module's dictionary, and what stands there while the candidate runs."""

    home: dict[str, Any]
    key: str
    value: Any


@contextlib.contextmanager
def masked(
    model: nn.Module,
    masks: Mapping[str, ChannelsLike],
    groups: ElasticGroups | Mapping[str, Any],
    *,
    skip: Collection[str] = (),
) -> Iterator[nn.Module]:
    """Makes a plain model its pruned candidate for the length of a ``with``; no module is copied.

    Inside, every layer holds the active part of its own weights, and inactive channels are never computed: outputs
    are those of the network that was physically pruned. Leading channels are views. Listed ones are gathered once, on
    entry, so that writes to the model's weights inside are not seen. Parameters are then slim, require no gradient and
    belong to the candidate, as does the state dict. On exit, after an exception too, the model is what it was: the same
    tensors, unchanged. Use it in one thread at a time; candidates of candidates may be nested.

    Args:
        model: of ``nn.Conv2d``, ``nn.Linear`` and batch normalisations, frozen ones too, in evaluation mode.
        masks: active channels of groups, by name: the number of leading ones, or distinct indices. The other groups
            stay whole.
        groups: which channels are coupled; by layers, or by names of tensors as :meth:`ElasticGroups.from_tensors`
            reads them.
        skip: paths of residual blocks, or of other modules that give what they take in shape, that do not run.

    Yields:
        The model.

    Raises:
        InputError: if masks do not fit the model, or it is in training mode; names module, group and values.
    """
    groups = groups if isinstance(groups, ElasticGroups) else ElasticGroups.from_tensors(groups)
    swaps = _swaps(model, masks, groups, skip)
    before = [_Swap(home, key, home[key]) for home, key, _ in swaps]
    try:
        for home, key, value in swaps:
            home[key] = value
        yield model
    finally:
        for home, key, value in before:
            home[key] = value


def _swaps(
    model: nn.Module, masks: Mapping[str, ChannelsLike], groups: ElasticGroups, skip: Collection[str]
) -> list[_Swap]:
    modules = dict(model.named_modules())
    for path, layer in modules.items():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.running_mean is not None:
            raise InputError(
                f"masked: {path}, a {type(layer).__name__}, is in training mode and would write the statistics of "
                "the model; call model.eval()"
            )
    sizes = groups.sizes(modules)
    sides: dict[str, dict[str, Channels]] = {}
    names: dict[str, list[str]] = {}
    for name, value in masks.items():
        if name not in sizes:
            raise InputError(f"masked: there is no group {name!r}; name one of {', '.join(sizes) or 'those declared'}")
        channels = active_channels(value, sizes[name], f"masked: group {name!r}")
        if channels.index is None and channels.count == sizes[name]:
            continue
        for path, side, times in groups.groups[name]:
            sides.setdefault(path, {})[side] = repeated(channels, times)
            names.setdefault(path, []).append(name)
    swaps = [swap for path in skip for swap in _skipped(modules, path)]
    for path, chosen in sides.items():
        if any(path == block or path.startswith(f"{block}.") for block in skip):
            continue
        try:
            swaps += _slim(modules[path], chosen)
        except InputError as error:
            raise InputError(f"masked: {path} (groups {', '.join(names[path])}): {error}") from None
    return swaps


def _skipped(modules: Mapping[str, nn.Module], path: str) -> Iterator[_Swap]:
    parent, _, name = path.rpartition(".")
    if not path or path not in modules:
        raise InputError(f"masked: skip names the module {path!r}, which {type(modules['']).__name__} does not have")
    yield _Swap(modules[parent]._modules, name, nn.Identity().train(modules[path].training))


def _slim(layer: nn.Module, sides: Mapping[str, Channels]) -> Iterator[_Swap]:
    """What makes a layer its active part."""
    if isinstance(layer, Elastic):
        raise InputError(f"{type(layer).__name__} is an elastic layer; use set_subnet for its model")
    if isinstance(layer, nn.Conv2d):
        inputs, outputs, kept = conv_channels(layer.weight, layer.groups, sides.get("in"), sides.get("out"))
        columns = inputs if layer.groups == 1 else None
        numbers = {"in_channels": inputs.count, "out_channels": outputs.count, "groups": kept}
    elif isinstance(layer, nn.Linear):
        columns = active_channels(sides.get("in"), layer.in_features, "in_features")
        outputs = active_channels(sides.get("out"), layer.out_features, "out_features")
        numbers = {"in_features": columns.count, "out_features": outputs.count}
    elif "running_mean" in layer._buffers:
        columns, outputs = None, sides["out"]
        numbers = {"num_features": outputs.count}
    else:
        raise InputError(
            f"{type(layer).__name__} cannot be masked; group nn.Conv2d, nn.Linear and batch normalisations"
        )
    for name, value in numbers.items():
        if name in vars(layer):
            yield _Swap(vars(layer), name, value)
    for home in (layer._parameters, layer._buffers):
        for name, tensor in home.items():
            if tensor is not None and tensor.dim() > 0:
                yield _Swap(home, name, _part(tensor, outputs, columns))


def _part(tensor: Tensor, rows: Channels, columns: Channels | None) -> Tensor:
    with torch.no_grad():
        part = active_part(tensor.detach(), rows, columns if tensor.dim() > 1 else None)
    return nn.Parameter(part, requires_grad=False) if isinstance(tensor, nn.Parameter) else part
