"""From a config to an optimizer, fresh or with a parent's moments; the penalty of network slimming."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped
from jdkd.train.config import TrainConfig

AUXILIARY = "auxiliary"  # before the names of parameters that are trained with the model's and are none of them


def build_optimizer(model: nn.Module, config: TrainConfig, auxiliary: nn.Module | None = None) -> torch.optim.Optimizer:
    """AdamW or SGD over what is trainable; one-dimensional parameters (norms, biases) are not decayed.

    Args:
        model: whose parameters it knows by their names.
        config: the settings.
        auxiliary: a module that is trained along, in the same groups.

    Raises:
        InputError: that has parameters of the model, or nothing is trainable.
    """
    named = list(unwrapped(model).named_parameters())
    if auxiliary is not None:
        names = {parameter: name for name, parameter in named}
        if shared := next((names[parameter] for parameter in auxiliary.parameters() if parameter in names), None):
            raise InputError(f"auxiliary holds the model's own {shared}; give it only what is no part of the model")
        named += [(f"{AUXILIARY}.{name}", parameter) for name, parameter in auxiliary.named_parameters()]
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [(name, p) for name, p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError(
            f"{type(unwrapped(model)).__name__} has no parameter that can be trained; let one require gradients."
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def inherit_moments(optimizer: torch.optim.Optimizer, parent: Any) -> None:
    """Lets an optimizer go on with the moments of another, where parameters have the same name and shape.

    The others, those of a cut layer or a new block, begin fresh, as do those of an auxiliary module, which another
    training made.

    Args:
        optimizer: of :func:`build_optimizer`, that has not stepped.
        parent: state of another such optimizer; steps write into its moments.

    Raises:
        InputError: it is no state, that of another kind of optimizer, or no parameter is in both.
    """
    before = dict(_states_by_name(parent))
    wanted = "momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"
    if foreign := next((state for state in before.values() if wanted not in state), None):
        raise InputError(
            f"inherit holds the state of another optimizer ({', '.join(foreign)}; this one keeps {wanted}); train with "
            "the parent's optimizer, or leave inherit out"
        )
    own = optimizer.state_dict()
    found = {}
    for group, named in zip(own["param_groups"], optimizer.param_groups, strict=True):
        for number, name, parameter in zip(group["params"], group["param_names"], named["params"], strict=True):
            state = {} if name.startswith(f"{AUXILIARY}.") else before.get(name, {})
            if state and state[wanted].shape == parameter.shape:
                found[number] = state
    if not found:
        names = [name for group in own["param_groups"] for name in group["param_names"]]
        raise InputError(
            f"inherit has moments of {len(before)} parameters ({', '.join([*before][:3]) or 'none'}), and none has the "
            f"name and shape of one of the {len(names)} that are trained ({', '.join(names[:3])}); give the checkpoint "
            "of a parent, or leave inherit out"
        )
    optimizer.load_state_dict({**own, "state": found})


def _states_by_name(state: Any) -> list[tuple[str, Mapping[str, Tensor]]]:
    """Name and moments of the parameters in an optimizer's state."""
    try:
        names: dict[int, str] = {}
        for group in state["param_groups"]:
            names.update(zip(group["params"], group["param_names"], strict=True))
        return [(names[number], moments) for number, moments in state["state"].items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"inherit holds a {type(state).__name__} that is not the state of an optimizer with its parameters' names; "
            "give the checkpoint of a training of jdkd.train.fit, or leave inherit out"
        ) from error


def slimmable_scales(model: nn.Module) -> list[Tensor]:
    """The scales (gamma, ``[C]``) of all batch norms."""
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.weight is not None
    ]


@torch.no_grad()
def add_l1_subgradient(scales: list[Tensor], strength: float) -> None:
    """Adds ``strength * sign(gamma)`` to the gradients (Liu et al., ICCV 2017, section 3).

    Scales that took no part in this step, such as frozen ones and those of blocks that a subnet skips, are left alone.
    """
    active = [scale for scale in scales if scale.grad is not None]
    if active and strength:
        torch._foreach_add_([scale.grad for scale in active], torch._foreach_sign(active), alpha=strength)
