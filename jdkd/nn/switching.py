"""One switch for the subnet of a whole model, and what is active taken out of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.coupling import ElasticGroups, repeated
from jdkd.nn.elastic import Elastic, same
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_block import ElasticBlock
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.elastic_linear import ElasticLinear
from jdkd.nn.exchange import as_plain
from jdkd.nn.subnet import Subnet
from jdkd.nn.subnet_epoch import SubnetEpoch
from jdkd.nn.unwrapping import unwrapped
from jdkd.ops.active_channels import Channels, active_channels
from jdkd.ops.kernel_size import KernelLike


def set_subnet(model: nn.Module, subnet: Subnet, groups: ElasticGroups | None = None) -> None:
    """Makes a subnet the active one of a whole model: from now on a forward runs it.

    Nothing is copied, and there is no device synchronisation. Everything is checked before anything changes. What the
    subnet does not name is active as a whole, elastic layers outside every group too.

    Args:
        model: holds the elastic layers; inside ``DistributedDataParallel``, ``DataParallel``, ``AveragedModel`` or
            ``torch.compile`` too. Paths are those of the model itself.
        subnet: what is to be active.
        groups: which channels are coupled; the model's own ``elastic_groups`` if left out.

    Raises:
        InputError: if the subnet does not fit the model, or the declaration does not; names module, group and values.
    """
    if not isinstance(subnet, Subnet):
        raise InputError(f"set_subnet: subnet={subnet!r} is a {type(subnet).__name__}; give a Subnet")
    model = unwrapped(model)
    groups = groups if groups is not None else getattr(model, "elastic_groups", None)
    if groups is None:
        raise InputError(
            f"set_subnet: {type(model).__name__} does not say which of its channels are coupled; set its "
            "elastic_groups to an ElasticGroups, or give one"
        )
    modules = dict(model.named_modules())
    changes = _parts(modules, groups, subnet)
    before = {id(layer._record.since): layer._record.since for layer, _ in changes}
    epoch = SubnetEpoch.current(before.values())  # one for all: a change of depth dates layers whose channels stay, too
    if epoch.recomputation is None and all(same(layer._record.given, part) for layer, part in changes):
        return
    moved: dict[tuple, Tensor] = {}
    for layer, part in changes:
        layer._put(part, epoch, moved)


def _parts(modules: Mapping[str, nn.Module], groups: ElasticGroups, subnet: Subnet) -> list[tuple[Elastic, tuple]]:
    """Every elastic layer of a model with the part of it that is to be active."""
    blocks = groups.read_depths(modules, dict(subnet.depths))
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
    parts: list[tuple[Elastic, tuple]] = []
    for path, layer in modules.items():
        if isinstance(layer, ElasticBlock):
            parts.append((layer, blocks.get(layer) or layer.part()))
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


def _part(layer: Elastic, sides: Mapping[str, Channels], kernel: KernelLike, subnet: Subnet) -> tuple:
    if kernel is not None and not isinstance(layer, ElasticConv2d):
        raise InputError(f"kernel_size={kernel!r} for a {type(layer).__name__}; only convolutions have one")
    if isinstance(layer, ElasticConv2d):
        return layer.part(sides.get("in"), sides.get("out"), kernel)
    if isinstance(layer, ElasticLinear):
        return layer.part(sides.get("in"), sides.get("out"))
    named = (subnet.id,) if isinstance(layer, ElasticBatchNorm2d) and layer.has_own_statistics else ()
    return layer.part(sides.get("out"), *named)


def export(model: nn.Module) -> nn.Module:
    """Takes the active subnet out of a model.

    Args:
        model: any module with elastic layers in it; it stays as it is. Of one that is wrapped, as by
            ``DistributedDataParallel`` or ``torch.compile``, the model inside is exported.

    Returns:
        A copy in which plain layers with the active slice stand for the elastic ones, equal in output. Nothing that is
        inactive is copied: blocks that are switched off are gone from sequences and lists, elsewhere an ``nn.Identity``
        stands for them. Plain layers are new: hooks and attributes of the elastic ones stay behind, a computed weight
        (``torch.nn.utils.parametrize``) is a parameter, weights are contiguous, and those that were shared are no more.
    """
    model = unwrapped(model)
    plain: dict[int, Any] = {}
    gone: list[str] = []
    for path, module in reversed([*model.named_modules()]):  # children before their parents
        if callable(getattr(type(module), "exported", None)):  # made of elastic layers
            plain[id(module)] = cast(Any, module).exported(plain)
        elif isinstance(module, ElasticBlock):
            plain[id(module)] = as_plain(copy.deepcopy(module, plain)) if module.is_active else nn.Identity()
            gone = gone if module.is_active else [*(inner for inner in gone if not inner.startswith(f"{path}.")), path]
        elif isinstance(module, Elastic):
            plain[id(module)] = module.export()
    exported = copy.deepcopy(model, plain)
    for path in gone:  # the last ones of a container first
        owner, _, name = path.rpartition(".")
        container = exported.get_submodule(owner)
        if path and isinstance(container, nn.Sequential | nn.ModuleList):
            del container[list(container._modules).index(name)]
    return exported
