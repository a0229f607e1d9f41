"""How much a channel or a block matters, read off the weights."""

import torch
from torch import Tensor, nn

from jdkd.detect import Group, channel_groups
from jdkd.detect.resnet import STAGES


def gamma_importance(model: nn.Module, group: Group) -> Tensor:
    """|gamma| of the normalisation that a group passes through, mean over several (Liu et al., ICCV 2017).

    Returns:
        ``[C]`` float tensor on the CPU; defined for inner groups and residual streams.
    """
    state = model.state_dict()
    gammas = [state[name] for name, _ in group.producers if f"{name.removesuffix('weight')}running_var" in state]
    return torch.stack([gamma.detach().abs().float().cpu() for gamma in gammas]).mean(0)


def magnitude_importance(model: nn.Module, group: Group) -> Tensor:
    """Norm of what makes a channel times norm of what reads it; for groups without a normalisation.

    Every tensor's norms are divided by their mean first, so that no tensor speaks louder for its scale alone.

    Returns:
        ``[C]`` float tensor on the CPU.
    """
    state = model.state_dict()
    made = [_norms(state[name], dim, 1) for name, dim in group.producers if state[name].dim() > 1]
    read = [_norms(state[name], dim, repeat) for name, dim, repeat in group.consumers]
    return torch.stack(made).mean(0) * torch.stack(read).mean(0)


def weakest_blocks(model: nn.Module, stage: int, count: int) -> tuple[int, ...]:
    """The blocks of a stage, never its first, whose last normalisation has the smallest mean |gamma|."""
    blocks = getattr(model.backbone.body, STAGES[stage])
    strength = [getattr(block, f"bn{block.depth}").weight.detach().abs().mean().item() for block in blocks]
    return tuple(sorted(range(1, len(blocks)), key=strength.__getitem__)[:count])


def strongest(importance: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the ``count`` most important channels, in ascending order."""
    return tuple(sorted(importance.argsort(descending=True, stable=True)[:count].tolist()))


def inner_groups(model: nn.Module) -> dict[str, Group]:
    """The channel groups inside the residual blocks, by name."""
    return {name: group for name, group in channel_groups(model.spec).items() if ".inner" in name}


def _norms(tensor: Tensor, dim: int, repeat: int) -> Tensor:  # -> [C]
    rows = tensor.detach().float().cpu().movedim(dim, 0).flatten(1)  # [C * repeat, rest]
    norms = rows.reshape(rows.shape[0] // repeat, -1).norm(dim=1)
    return norms / norms.mean().clamp(min=1e-12)
