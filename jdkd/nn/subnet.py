"""A subnet of a whole model: as data, with a declaration of what is coupled, and one switch."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.conv_bn_act import ElasticConvBNAct
from jdkd.nn.coupling import ElasticGroups, repeated
from jdkd.nn.elastic import Elastic, same
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.elastic_linear import ElasticLinear
from jdkd.nn.moment import now
from jdkd.nn.stage import ElasticStage
from jdkd.ops.active_channels import Channels, active_channels

Pairs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Subnet:
    """What is active in a model: data, hashable, and JSON by :meth:`to_json`.

    Args:
        channels: of groups of coupled channels, by name: the number of leading ones, or distinct indices. A group that
            is not named is active as a whole.
        kernel_sizes: of convolutions, by their path in the model, in taps. The others run with their whole kernel.
        depths: blocks that run, by the name of the stage. The others run as a whole.

    Subnets are equal as data. ``{"a": 2}`` and ``{"a": [0, 1]}`` activate the same channels and are two subnets, with
    two ids and, in layers with ``statistics="own"``, two sets of statistics; so are a group at the number of all its
    channels and a group that is not named. Write what is to be one subnet in one way.
    """

    channels: Mapping[str, int | Sequence[int]] | Pairs = field(default=())
    kernel_sizes: Mapping[str, int | Sequence[int]] | Pairs = field(default=())
    depths: Mapping[str, int] | Pairs = field(default=())

    def __post_init__(self) -> None:
        for name in ("channels", "kernel_sizes", "depths"):
            given = _mapping(getattr(self, name), name)
            pairs = tuple((key, _frozen(given[key], f"{name}[{key!r}]")) for key in sorted(given))
            object.__setattr__(self, name, pairs)

    @property
    def id(self) -> str:
        """A short name of what is active, by its contents: ``s`` and 12 hexadecimal digits."""
        return "s" + hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Returns: what :meth:`from_json` reads, of ints, lists and dicts alone."""
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in getattr(self, name)}
            for name in ("channels", "kernel_sizes", "depths")
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Subnet:
        """Reads what :meth:`to_json` gave; raises InputError on fields that it does not have."""
        if not isinstance(fields, Mapping):
            raise InputError(f"Subnet.from_json: fields={fields!r}; give the dict that to_json returns")
        if unknown := sorted(fields.keys() - cls.__dataclass_fields__.keys()):
            raise InputError(f"Subnet: there are no fields {unknown}; give {', '.join(cls.__dataclass_fields__)}")
        return cls(**fields)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    """Reads a field of a subnet: a mapping, or pairs."""
    try:
        return dict(value)
    except (TypeError, ValueError):
        raise InputError(f"Subnet: {what}={value!r}; give a mapping from names, such as {{'a': 4}}") from None


def _frozen(value: Any, what: str) -> int | tuple[int, ...]:
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() == 1:
        value = value.tolist()
    numbers = [value] if isinstance(value, int) else value
    if not isinstance(numbers, Sequence) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise InputError(f"Subnet: {what}={value!r} is neither an int nor a list of ints in host memory")
    return value if isinstance(value, int) else tuple(numbers)


def set_subnet(model: nn.Module, subnet: Subnet, groups: ElasticGroups | None = None) -> None:
    """Makes a subnet the active one of a whole model: from now on a forward runs it.

    Nothing is copied, and the host does not wait. Everything is checked before anything changes. What the subnet does
    not name is active as a whole, elastic layers outside every group too.

    Args:
        model: holds the elastic layers.
        subnet: what is to be active.
        groups: which channels are coupled; the model's own ``elastic_groups`` if left out.

    Raises:
        InputError: if the subnet does not fit the model, or the declaration does not; names module, group and values.
    """
    if not isinstance(subnet, Subnet):
        raise InputError(f"set_subnet: subnet={subnet!r} is a {type(subnet).__name__}; give a Subnet")
    groups = groups if groups is not None else getattr(model, "elastic_groups", None)
    if groups is None:
        raise InputError(
            f"set_subnet: {type(model).__name__} does not say which of its channels are coupled; set its "
            "elastic_groups to an ElasticGroups, or give one"
        )
    modules = dict(model.named_modules())
    changes = _parts(modules, groups, subnet)
    before = {id(layer._record.since): layer._record.since for layer, _ in changes}
    moment = now(before.values())  # one for all layers: a change of depth dates those whose channels stay, too
    if moment.recomputation is None and all(same(layer._record.given, part) for layer, part in changes):
        return
    moved: dict[tuple, Tensor] = {}
    for layer, part in changes:
        layer._put(part, moment, moved)


def _parts(modules: Mapping[str, nn.Module], groups: ElasticGroups, subnet: Subnet) -> list[tuple[Elastic, tuple]]:
    """Every elastic layer of a model with the part of it that is to be active."""
    stages = groups.read_depths(modules, dict(subnet.depths))
    sides: dict[str, dict[str, Channels]] = {}
    names: dict[str, list[str]] = {}
    chosen, sizes = dict(subnet.channels), groups.sizes(modules)
    for unknown in chosen.keys() - sizes.keys():
        raise InputError(
            f"set_subnet: the subnet names the group {unknown!r} and the model declares {', '.join(sizes)}; name one "
            "of those"
        )
    for name, size in sizes.items():
        channels = active_channels(chosen.get(name), size, f"set_subnet: group {name!r}")
        for module, side, times in groups.groups[name]:
            sides.setdefault(module, {})[side] = repeated(channels, times)
            names.setdefault(module, []).append(name)
    kernels = dict(subnet.kernel_sizes)
    parts = []
    for path, layer in modules.items():
        if isinstance(layer, ElasticStage):
            parts.append((layer, stages.get(layer) or layer.part()))
        elif isinstance(layer, Elastic):
            try:
                parts.append((layer, _part(layer, sides.pop(path, {}), kernels.pop(path, None), subnet)))
            except InputError as error:
                of = f" (groups {', '.join(names[path])})" if path in names else ""
                raise InputError(f"set_subnet: {path}{of}: {error}") from None
    for path in kernels:
        raise InputError(f"set_subnet: the subnet has a kernel size for {path!r}, which is no elastic convolution")
    for path in sides:
        raise InputError(
            f"set_subnet: {path}, of the groups {', '.join(names[path])}, is a "
            f"{type(modules[path]).__name__}; build it as an elastic layer, or leave it out of the groups"
        )
    return parts


def _part(layer: Elastic, sides: Mapping[str, Channels], kernel: int | tuple[int, ...] | None, subnet: Subnet) -> tuple:
    if kernel is not None and not isinstance(layer, ElasticConv2d):
        raise InputError(f"kernel_size={kernel!r} for a {type(layer).__name__}; only convolutions have one")
    if isinstance(layer, ElasticConv2d):
        return layer.part(sides.get("in"), sides.get("out"), kernel)
    if isinstance(layer, ElasticLinear):
        return layer.part(sides.get("in"), sides.get("out"))
    assert isinstance(layer, ElasticBatchNorm2d)
    return layer.part(sides.get("out"), subnet.id if layer.has_own_statistics else None)


def export(model: nn.Module) -> nn.Module:
    """Takes the active subnet out of a model.

    Args:
        model: any module with elastic layers in it; it stays as it is.

    Returns:
        A copy in which plain layers with the active slice stand for the elastic ones, equal in output. Nothing that is
        inactive is copied.
    """
    plain: dict[int, Any] = {}
    for module in reversed([*model.modules()]):  # children before their parents
        if isinstance(module, ElasticStage | ElasticConvBNAct):
            plain[id(module)] = module.exported(plain)
        elif isinstance(module, Elastic):
            plain[id(module)] = module.export()
    return copy.deepcopy(model, plain)
