"""Weight inheritance: a rewritten detector keeps every weight of its parent that it still has room for.

Pruning, growth, removed and added blocks, and subnets cut out of a supernet are one operation: for every channel
group of the child a list gives the parent's index of each channel, and for every stage a list gives the parent's
index of each block. Channels and blocks that the parent does not have are initialised so that they change no output.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from jdkd.detect.build import build
from jdkd.detect.contract import own_detector
from jdkd.detect.groups import channel_groups
from jdkd.detect.resnet import STAGES
from jdkd.detect.spec import INNER_CONVS, DetectorSpec
from jdkd.errors import InputError

NEW = -1  # in an index list: a channel without an ancestor; in a block list: a block without one

Channels = Mapping[str, Sequence[int]]  # child group -> parent channel of each child channel
Blocks = Sequence[Sequence[int]]  # per stage: parent block of each child block


def inherit(
    parent: nn.Module, spec: DetectorSpec, *, channels: Channels | None = None, blocks: Blocks | None = None
) -> nn.Module:
    """Builds ``spec`` with the weights of ``parent``.

    New channels keep their fresh producers but are read with zero weights, and new blocks are the identity
    (Dirac convolutions, last normalisation at gamma 0, the others at gamma 1), so growth changes no output.
    (Zero weights on the reading side are the function-preserving widening of network morphism, Wei et al.,
    ICML 2016; Dirac convolutions with a zero last gamma follow SP-NAS, Jiang et al., CVPR 2020, except that
    there all gammas are zero, which makes a block that can never learn.)

    Args:
        parent: a detector made by :func:`build`.
        spec: what the child is to be.
        channels: parent channel of each child channel, per group of the child; :data:`NEW` marks growth.
            Groups that are not named keep their channels in order, and must have kept their size.
        blocks: per stage, the parent block of each child block, :data:`NEW` for an added one; by default
            every block keeps its place.

    Returns:
        The child, in training mode, on the parent's device.

    Raises:
        InputError: the parent is no such detector, or an index list does not fit the child or the parent.
    """
    parent = own_detector(parent, "inherit")
    blocks = blocks or [range(stage.depth) for stage in spec.stages]
    ancestors = _block_ancestors(parent.spec, spec, blocks)
    index = _channel_index(parent.spec, spec, channels or {}, ancestors)
    child = build(spec)
    device = next(parent.parameters()).device
    theirs = {name: tensor.detach() for name, tensor in parent.state_dict().items()}
    born = child.state_dict()
    for name, tensor in born.items():
        prefix, found = _ancestor(name, ancestors)
        if prefix is not None:
            _born_as_identity(name, tensor, last=f"bn{INNER_CONVS[spec.block] + 1}.")
        elif found in theirs:
            born[name] = _gather(theirs[found].cpu(), tensor, index.get(name, ()))
    _check_shapes(born, child)
    child.load_state_dict(born)
    return child.to(device)


def _block_ancestors(parent: DetectorSpec, child: DetectorSpec, blocks: Blocks) -> dict[str, str | None]:
    """Prefix of every block of the child -> prefix of the parent block it was, or None for a new one."""
    ancestors: dict[str, str | None] = {}
    for number, (name, origin) in enumerate(zip(STAGES, blocks, strict=True)):
        depth, stage = parent.stages[number].depth, child.stages[number]
        if len(origin) != stage.depth or any(not NEW <= i < depth for i in origin) or origin[0] != 0:
            raise InputError(
                f"blocks of {name} must name one of its parent's {depth} blocks (or {NEW}) for each of its "
                f"{stage.depth} blocks, and begin with block 0, got {list(origin)}."
            )
        for i, before in enumerate(origin):
            ancestors[f"{name}.{i}."] = None if before == NEW else f"{name}.{before}."
    return ancestors


def _channel_index(
    parent: DetectorSpec, child: DetectorSpec, channels: Channels, ancestors: Mapping[str, str | None]
) -> dict[str, list[tuple[int, Tensor, bool]]]:
    """Tensor name in the child -> [(dimension, parent index of each entry, whether it is a reading side)]."""
    ours, theirs = channel_groups(child), channel_groups(parent)
    index: dict[str, list[tuple[int, Tensor, bool]]] = {}
    if unknown := channels.keys() - ours.keys():
        raise InputError(f"channels names the groups {sorted(unknown)}, which the child lacks; it has {sorted(ours)}.")
    for name, group in ours.items():
        before = _renamed(name, ancestors)
        if before is None:
            continue
        size = theirs[before].size
        kept = torch.as_tensor(list(channels.get(name, range(group.size))), dtype=torch.int64)
        if (
            len(kept) != group.size
            or kept.max() >= size
            or kept.min() < NEW
            or (name not in channels and len(kept) != size)
        ):
            raise InputError(
                f"channels[{name!r}] must give {group.size} indices below {size}, got {len(kept)} from "
                f"{int(kept.min())} to {int(kept.max())}; name the channels that are kept."
            )
        for tensor, dim in group.producers:
            index.setdefault(tensor, []).append((dim, kept, False))
        for tensor, dim, repeat in group.consumers:
            index.setdefault(tensor, []).append((dim, _repeat(kept, repeat), True))
    return index


def _repeat(kept: Tensor, repeat: int) -> Tensor:  # [C] -> [C * repeat]
    entries = kept[:, None] * repeat + torch.arange(repeat)
    return torch.where(kept[:, None] == NEW, NEW, entries).flatten()


def _gather(source: Tensor, born: Tensor, index: Sequence[tuple[int, Tensor, bool]]) -> Tensor:
    """Takes the parent's entries; new ones keep ``born`` where they produce and are zero where they are read."""
    out = source
    for dim, kept, _ in index:
        out = out.index_select(dim, kept.clamp(min=0))
    out = out.clone()
    for reading in (False, True):  # zeros last: a new channel read by a new one is read with zero weight
        for dim, kept, is_reading in index:
            new = (kept == NEW).nonzero().flatten()
            if is_reading is reading and len(new):
                fill = torch.zeros_like(out) if reading else born
                out.index_copy_(dim, new, fill.index_select(dim, new))
    return out


def _born_as_identity(name: str, tensor: Tensor, last: str) -> None:
    if tensor.dim() == 4:
        nn.init.dirac_(tensor)
    elif name.endswith(".weight") and last in name:
        tensor.zero_()


def _ancestor(name: str, ancestors: Mapping[str, str | None]) -> tuple[str | None, str]:
    """(prefix of the new block that the tensor belongs to, or None; its name in the parent)."""
    for prefix, before in ancestors.items():
        if f".body.{prefix}" in name:
            return (prefix, "") if before is None else (None, name.replace(prefix, before, 1))
    return None, name


def _renamed(group: str, ancestors: Mapping[str, str | None]) -> str | None:
    for prefix, before in ancestors.items():
        if group.startswith(prefix):
            return None if before is None else group.replace(prefix, before, 1)
    return group


def _check_shapes(state: Mapping[str, Tensor], child: nn.Module) -> None:
    for name, tensor in child.state_dict().items():
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{name} is {list(tensor.shape)} in the child but {list(state[name].shape)} was inherited; only "
                "inner, FPN and box-head widths, depths and the input size may differ from the parent's."
            )
