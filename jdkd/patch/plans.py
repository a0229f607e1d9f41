"""What of a detector can be accelerated, found out on a copy of it: see :func:`planned`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from jdkd.detect.contract import detections
from jdkd.errors import InputError
from jdkd.latency.calls import on_device
from jdkd.latency.folding import foldable, is_plain
from jdkd.nn.necks import neck_of
from jdkd.patch.chains import Fused, flow_of
from jdkd.patch.convolutions import Convolution, Folded, Form, Linear, no_onednn
from jdkd.patch.graphs import put_graphs, why_no_graph
from jdkd.patch.levels import OverCanvas, OverLevels, are_levels, layers_over, reach
from jdkd.patch.overrides import Overrides

INGREDIENTS = (
    "folded",
    "channels_last",
    "packed",
    "fused",
    "grouped",
    "graphs",
)
"""Norms folded into convolutions; weights channels-last; weights in oneDNN's own layout; a convolution with its norm,
residual and ReLU in one pass; heads run once over all levels; backbone, neck and heads in a CUDA graph."""
FOLDED, CHANNELS_LAST, PACKED, FUSED, GROUPED, GRAPHS = INGREDIENTS


@dataclass(frozen=True)
class Plan:
    """What can be done where, by the paths of modules.

    Args:
        convolutions: that are plain, and the norm that can be folded into each, or None.
        linears: that are plain.
        flows: code of modules that only joins its children.
        unfollowed: why code of other modules stays as it is, where it could not be followed.
        heads: that are called with a list of levels, and the layers of each that may run over a canvas.
        trunk: what makes the levels of a batch of images, if that is known.
        behind: heads that are called with levels of the trunk alone, and which these are.
        device, dtype: of the weights.
    """

    convolutions: dict[str, str | None]
    linears: tuple[str, ...]
    flows: dict[str, fx.Graph]
    unfollowed: dict[str, str]
    heads: dict[str, list[str]]
    trunk: str | None
    behind: dict[str, list[int]]
    device: torch.device
    dtype: torch.dtype

    def why_not(self, ingredient: str) -> str | None:
        """Why an ingredient is not even tried, in one clause; None where it is."""
        if ingredient == GRAPHS:
            return why_no_graph(self.device, self.trunk)
        if ingredient == GROUPED:
            return None if self.heads else "no head is called with a list of levels that it convolves alike"
        if not self.convolutions:
            return "it has no convolution that is an nn.Conv2d and nothing more"
        if ingredient == FOLDED and not any(self.convolutions.values()):
            return "no normalisation directly follows a convolution"
        if ingredient == FUSED and not self.flows:
            return "no sum or ReLU follows a convolution in code that does nothing else"
        return no_onednn(self.device, self.dtype) if ingredient == PACKED else None

    def put(self, model: nn.Module, ingredients: Sequence[str]) -> Overrides:
        """Lets a model, or a copy of it, run with some ingredients."""
        overrides = Overrides()
        chosen = set(ingredients)
        form = Form(CHANNELS_LAST in chosen, PACKED in chosen)
        fold = bool(chosen & {FOLDED, FUSED})
        convolutions = self._put_layers(overrides, model, form, fold) if chosen - {GROUPED, GRAPHS} else {}
        if FUSED in chosen:
            for path, graph in self.flows.items():
                fused = Fused(model.get_submodule(path), graph, convolutions)
                if fused.steps:
                    overrides.put(fused)
        if GROUPED in chosen:
            for path, names in self.heads.items():
                head = model.get_submodule(path)
                layers = [head.get_submodule(name) for name in names]
                overrides.put(OverLevels(head, max(map(reach, layers))))
                for layer in layers:
                    overrides.put(OverCanvas(layer))
        if GRAPHS in chosen and self.trunk:
            heads = {model.get_submodule(path): numbers for path, numbers in self.behind.items()}
            put_graphs(overrides, model.get_submodule(self.trunk), heads)
        return overrides

    def _put_layers(self, overrides: Overrides, model: nn.Module, form: Form, fold: bool) -> dict[int, Convolution]:
        found = {}
        for path, beside in self.convolutions.items():
            norm = model.get_submodule(beside) if fold and beside else None
            convolution = Convolution(model.get_submodule(path), norm, form)
            found[id(convolution.module)] = convolution
            overrides.put(convolution)
            if norm is not None:
                overrides.put(Folded(convolution))
        for path in self.linears if form.packed else ():
            overrides.put(Linear(model.get_submodule(path), form))
        return found


def structure_of(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its tensors, in which anything else may be changed."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def planned(model: nn.Module, images: Sequence[Tensor]) -> Plan:
    """Reads off what can be done: modules are traced one by one, and the model runs once.

    Args:
        model: in eval mode; a copy, as code that runs on symbols may leave traces.
        images: ``[3, H, W]`` that it runs on.
    """
    modules = dict(model.named_modules())
    first = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
    convs = [path for path, m in modules.items() if type(m) is nn.Conv2d and m.padding_mode == "zeros" and is_plain(m)]
    traced = structure_of(model)  # what runs on symbols may keep some
    norms = {conv: norm for conv, norm in foldable(traced).items() if is_plain(modules[norm])}
    flows, unfollowed = _flows(traced)

    def joins(path: str, flow: fx.Graph) -> bool:
        layers = [(traced.get_submodule(conv), norms.get(conv)) for conv in convs]
        known = {id(conv): Convolution(conv, norm and traced.get_submodule(norm), Form()) for conv, norm in layers}
        return Fused(traced.get_submodule(path), flow, known).steps > 0

    heads, trunk, behind = _seen(model, on_device(images, first.device))
    return Plan(
        {path: norms.get(path) for path in convs},
        tuple(path for path, m in modules.items() if type(m) is nn.Linear and is_plain(m)),
        {path: flow for path, flow in flows.items() if joins(path, flow)},
        unfollowed,
        heads,
        trunk,
        behind,
        first.device,
        first.dtype,
    )


def _flows(model: nn.Module) -> tuple[dict[str, fx.Graph], dict[str, str]]:
    """Code that only joins children, by the paths of modules, and why other code could not be followed."""
    flows: dict[str, fx.Graph] = {}
    unfollowed: dict[str, str] = {}
    for path, module in model.named_modules():
        try:
            if is_plain(module) and (flow := flow_of(module)) is not None:
                flows[path] = flow
        except InputError as error:
            unfollowed[path] = str(error)
    return flows, unfollowed


def _seen(model: nn.Module, images: list[Tensor]) -> tuple[dict[str, list[str]], str | None, dict[str, list[int]]]:
    """Heads over levels and their layers; the trunk; and heads behind it, with the numbers of their levels."""
    heads: dict[str, list[str]] = {}
    behind: dict[str, list[int]] = {}
    made: list[int] = []
    path = neck_of(model)
    trunk: list[str] = []

    def called(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name == path and len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() == 4 and not named:
                trunk.append(name)
            if not args or not are_levels(args[0]):
                return
            if not any(name.startswith(f"{other}.") for other in heads) and (layers := layers_over(module)):
                heads[name] = layers
            within = any(name.startswith(f"{other}.") for other in behind)
            if len(args) == 1 and not named and not within and all(id(level) in made for level in args[0]):
                behind[name] = [made.index(id(level)) for level in args[0]]

        return hook

    def returned(module: nn.Module, args: Any, out: Any) -> None:
        kept.extend(leaves := tree_leaves(out))
        made[:] = [id(leaf) for leaf in leaves]

    kept: list[Any] = []  # so that no other tensor takes their place
    handles = [
        each.register_forward_pre_hook(called(name), with_kwargs=True) for name, each in model.named_modules() if name
    ]
    if path:
        handles.append(model.get_submodule(path).register_forward_hook(returned))
    try:
        with torch.no_grad():
            detections(model, images)
    finally:
        for handle in handles:
            handle.remove()
    once = trunk[0] if len(trunk) == 1 else None
    return _inner(heads, model), once, behind if once else {}


def _inner(heads: dict[str, list[str]], model: nn.Module) -> dict[str, list[str]]:
    """Heads whose layers are no part of each other, and are plain."""
    plain = {
        path: [name for name in names if all(map(is_plain, model.get_submodule(f"{path}.{name}").modules()))]
        for path, names in heads.items()
    }
    return {path: names for path, names in plain.items() if names and is_plain(model.get_submodule(path))}
