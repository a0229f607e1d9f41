"""A pruned candidate of a plain model, evaluated over the model's own weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.coupling import ElasticGroups, repeated
from jdkd.nn.elastic import Elastic
from jdkd.nn.unwrapping import unwrapped
from jdkd.ops.active_channels import Channels, ChannelsLike, active_channels, active_part
from jdkd.ops.elastic_conv import conv_channels

STATISTICS = ("running_mean", "running_var")
_ABSENT = object()  # where a dictionary had no such entry


class Swap(NamedTuple):
    """An entry of a module's dictionary, and what stands there while the candidate runs."""

    home: dict[str, Any]
    key: str
    value: Any


class Edit(NamedTuple):
    """What a candidate makes of one module.

    Args:
        module: whose entries are replaced.
        kept: the active channels by side, or the name of a child that does not run.
        key: equal for edits that are known to be the same.
        where: path and groups, for errors.
    """

    module: nn.Module
    kept: Mapping[str, Channels] | str
    key: Hashable
    where: str

    @property
    def site(self) -> nn.Module:
        """The layer, or the module that does not run."""
        return self.module._modules[self.kept] if isinstance(self.kept, str) else self.module

    def swaps(self) -> list[Swap]:
        """What to put where; listed channels are gathered here."""
        if isinstance(self.kept, str):
            child = _Skipped().train(self.site.training)
            return [Swap(self.module._modules, self.kept, child)]
        try:
            return list(_slim(self.module, self.kept))
        except InputError as error:
            raise InputError(f"masked: {self.where}: {error}") from None


class _Skipped(nn.Identity):
    """Stands for a module that does not run."""


@contextlib.contextmanager
def masked(
    model: nn.Module,
    keep: Mapping[str, ChannelsLike],
    groups: ElasticGroups | None = None,
    *,
    skip: Collection[str] = (),
) -> Iterator[nn.Module]:
    """Makes a plain model its pruned candidate for the length of a ``with``; no module is copied.

    Inside, every layer holds the active part of its own weights, and inactive channels are never computed: outputs
    are those of the network that was physically pruned. Leading channels are views. Listed ones are gathered once, on
    entry, so that writes to the model's weights inside are not seen. Parameters are then slim, require no gradient and
    belong to the candidate, as does the state dict. On exit, after an exception too, the model is what it was: the same
    tensors, unchanged unless they were written in place inside. A write into leading parameters reaches the model's
    own. Running statistics of the batch norms that are narrowed are copies, so that calibrating them leaves the
    model's alone. What is not narrowed, such as a batch norm outside all groups, is the model's and is written as ever.
    Only weight, bias and running statistics are narrowed; what else a subclass holds stays whole. Use it in one thread
    at a time; candidates of candidates may be nested.

    Args:
        model: of ``nn.Conv2d``, ``nn.Linear`` and batch normalisations, frozen ones too, in evaluation mode; inside
            ``DistributedDataParallel``, ``AveragedModel`` or ``torch.compile`` too. Paths are the model's own.
        keep: active channels of groups, by name: the number of leading ones, or distinct indices. The other groups
            stay whole.
        groups: which channels are coupled; the model's own ``elastic_groups`` if left out.
        skip: paths of residual blocks, or of other modules that give what they take in shape, that do not run.

    Yields:
        The model.

    Raises:
        InputError: if what is kept does not fit the model, or it is in training mode; names module, group and values.
    """
    swaps = [swap for edit in edits(model, keep, groups, skip) for swap in edit.swaps()]
    with swapped(swaps):
        yield model


@contextlib.contextmanager
def swapped(swaps: Sequence[Swap]) -> Iterator[None]:
    """Puts every value in its place for the length of a ``with``; afterwards everything is what it was."""
    before = [Swap(home, key, home.get(key, _ABSENT)) for home, key, _ in swaps]
    try:
        for home, key, value in swaps:
            home[key] = value
        yield
    finally:
        for home, key, value in reversed(before):
            if value is _ABSENT:
                home.pop(key, None)
            else:
                home[key] = value


def edits(
    model: nn.Module,
    keep: Mapping[str, ChannelsLike],
    groups: ElasticGroups | None,
    skip: Collection[str],
) -> list[Edit]:
    """Reads a candidate, arguments as :func:`masked`, and touches nothing."""
    if not isinstance(keep, Mapping):
        raise InputError(f"masked: keep={keep!r} is no mapping; give {{group: channels}}, or {{}} for the whole model")
    if isinstance(skip, str) or not isinstance(skip, Collection) or not all(isinstance(path, str) for path in skip):
        raise InputError(f"masked: skip={skip!r} is no list of paths; give some, as in ['blocks.1'], or ()")
    model = unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    groups = _declared(model, groups, modules)
    sizes = groups.sizes(modules)
    found = [_skipped(modules, path) for path in skip]
    running = {m for path, m in modules.items() if not any(f"{path}.".startswith(f"{block}.") for block in skip)}
    sides: dict[nn.Module, dict[str, Channels]] = {}
    keys: dict[nn.Module, dict[str, Hashable]] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, value in keep.items():
        if name not in sizes:
            raise InputError(f"masked: there is no group {name!r}; name one of {', '.join(sizes) or 'those declared'}")
        channels = active_channels(value, sizes[name], f"masked: group {name!r}")
        if channels.index is None and channels.count == sizes[name]:
            continue
        for path, side, times in groups.groups[name]:
            layer = modules[path]
            if layer not in running:
                continue
            sides.setdefault(layer, {})[side] = repeated(channels, times)
            keys.setdefault(layer, {})[side] = (name, _identity(channels))
            names.setdefault(layer, [path]).append(name)
    for layer, kept in sides.items():
        path, *of = names[layer]
        found.append(Edit(layer, kept, (layer, *sorted(keys[layer].items())), f"{path} (groups {', '.join(of)})"))
    return found


def _declared(model: nn.Module, groups: ElasticGroups | None, modules: Mapping[str, nn.Module]) -> ElasticGroups:
    """The groups of what there is: in a candidate of a candidate, without the blocks that were left out before."""
    for path, layer in modules.items():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.running_mean is not None:
            raise InputError(
                f"masked: {path}, a {type(layer).__name__}, is in training mode and would write the statistics of "
                "the model; call model.eval()"
            )
    groups = groups if groups is not None else getattr(model, "elastic_groups", None)
    if groups is None:
        raise InputError(
            f"masked: {type(model).__name__} does not say which of its channels are coupled; set its elastic_groups "
            "to an ElasticGroups, or give one"
        )
    if not isinstance(groups, ElasticGroups):
        raise InputError(f"masked: groups is a {type(groups).__name__}; give an ElasticGroups")
    out = tuple(f"{path}." for path, module in modules.items() if isinstance(module, _Skipped))
    left = {name: [s for s in sides if not f"{s.module}.".startswith(out)] for name, sides in groups.groups.items()}
    home: dict[tuple[nn.Module | None, str], tuple[str, str]] = {}
    for name, sides in left.items():
        for path, side, _ in sides:
            other = home.setdefault((modules.get(path), side), (name, path))
            if path in modules and other[0] != name:
                raise InputError(
                    f"masked: {path} and {other[1]} are one module, and its side {side!r} is in the groups {name!r} "
                    f"and {other[0]!r}; put what is coupled in one group"
                )
    return dataclasses.replace(groups, groups={name: sides for name, sides in left.items() if sides})


def _identity(channels: Channels) -> Hashable:
    """Equal for channels that are known to be the same without a device synchronisation."""
    if channels.index is None:
        return channels.count
    return tuple(channels.index.tolist()) if channels.index.device.type == "cpu" else id(channels.index)


def _skipped(modules: Mapping[str, nn.Module], path: str) -> Edit:
    parent, _, name = path.rpartition(".")
    if not path or path not in modules:
        raise InputError(f"masked: skip names the module {path!r}, which {type(modules['']).__name__} does not have")
    return Edit(modules[parent], name, (modules[parent], name), path)


def _slim(layer: nn.Module, sides: Mapping[str, Channels]) -> Iterator[Swap]:
    """What makes a layer its active part."""
    names: tuple[str, ...] = ("weight", "bias")
    if isinstance(layer, Elastic):
        raise InputError(f"{type(layer).__name__} is an elastic layer; use set_subnet for its model")
    if isinstance(layer, nn.Conv2d | nn.Linear) and layer._parameters.get("weight") is None:
        raise InputError(
            f"the weight of this {type(layer).__name__} is computed at every forward; make it a parameter first, as by "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(layer, nn.Conv2d):
        inputs, outputs, kept = conv_channels(layer.weight.shape, layer.groups, sides.get("in"), sides.get("out"))
        columns = inputs if layer.groups == 1 else None
        numbers = {"in_channels": inputs.count, "out_channels": outputs.count, "groups": kept}
    elif isinstance(layer, nn.Linear):
        columns = active_channels(sides.get("in"), layer.in_features, "in_features")
        outputs = active_channels(sides.get("out"), layer.out_features, "out_features")
        numbers = {"in_features": columns.count, "out_features": outputs.count}
    elif "running_mean" in layer._buffers:
        columns, outputs = None, sides["out"]
        numbers = {"num_features": outputs.count}
        names += STATISTICS
        if layer._buffers.get("num_batches_tracked") is not None:
            yield Swap(layer._buffers, "num_batches_tracked", layer.num_batches_tracked.clone())
    else:
        raise InputError(
            f"{type(layer).__name__} cannot be masked; group nn.Conv2d, nn.Linear and batch normalisations"
        )
    for name, value in numbers.items():
        if name in vars(layer):
            yield Swap(vars(layer), name, value)
    for home in (layer._parameters, layer._buffers):
        for name in names:
            if home.get(name) is not None:
                part = _part(home[name], outputs, columns)
                yield Swap(home, name, part.clone() if name in STATISTICS else part)


def _part(tensor: Tensor, rows: Channels, columns: Channels | None) -> Tensor:
    with torch.no_grad():
        part = active_part(tensor.detach(), rows, columns if tensor.dim() > 1 else None)
    return nn.Parameter(part, requires_grad=False) if isinstance(tensor, nn.Parameter) else part
