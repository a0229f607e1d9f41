"""See :func:`repair`: least squares for the layers that read what was cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jdkd.detect.contract import detections
from jdkd.detect.proposals import proposals_of
from jdkd.errors import require_batches
from jdkd.graph import Topology
from jdkd.morph.origins import came_from
from jdkd.nn.modes import mode
from jdkd.nn.necks import run_until, trunk_of
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Rewrite
from jdkd.rewrite.building import set_attribute
from jdkd.rewrite.channels import checked, leaving, named, require_traced
from jdkd.train.inputs import images_of, images_on

PLACES = 2048  # of the output that are looked at in each call of a layer, at most
PRODUCTS = nn.Linear.forward, nn.Conv2d.forward  # of layers whose outputs are their weights times what they read
RIDGE = 0.01  # of the mean square of what a layer reads: how much its weights hold on to what they were


@dataclass
class _Layer:
    """A layer that reads cut channels.

    Args:
        module: the child's.
        outputs: which of the parent's outputs it still has.
        seen: for every call, which places of its output are looked at, and what stood there in the parent.
        rows: what it reads at these places in the child so far, call by call.
    """

    module: nn.Linear | nn.Conv2d
    outputs: np.ndarray
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def solve(self) -> None:
        """New weights: those nearest to the old ones by which its outputs are nearest to the parent's; where these are
        not finite, as activations were not, the old ones stay."""
        x = torch.cat(self.rows)  # [places, inputs]
        y = torch.cat([wanted for _, wanted in self.seen])  # [places, outputs]
        module, weight = self.module, self.module.weight.detach()
        flat = weight.flatten(1).double()  # [outputs, inputs]
        if module.bias is not None:
            x, flat = F.pad(x, (0, 1), value=1.0), torch.cat([flat, module.bias.detach().double()[:, None]], 1)
        x, y = x.double(), y.double()
        residual = y - x @ flat.T
        ridge = RIDGE * x.square().mean().clamp(min=1e-12) * len(x)
        wide = len(x) <= x.shape[1]
        gram = x @ x.T if wide else x.T @ x
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram)).to(x))
        if failed or not factor.isfinite().all() or not residual.isfinite().all():
            return
        change = torch.cholesky_solve(residual if wide else x.T @ residual, factor)
        solved = flat + (x.T @ change if wide else change).T
        with torch.no_grad():
            if module.bias is not None:
                module.bias.copy_(solved[:, -1])
                solved = solved[:, :-1]
            weight.copy_(solved.reshape(weight.shape))


class _Done(Exception):
    """Ends a forward that has shown all that it can."""


@torch.no_grad()
def repair(
    child: nn.Module, parent: nn.Module, rewrite: Rewrite, topology: Topology, batches: Iterable[Any]
) -> list[str]:
    """Gives the layers that read cut channels new weights, so that they say of what is left what they said of all.

    Layer by layer, front to back, in closed form: the outputs of a convolution or linear layer on what the child,
    repaired up to there, gives it to read are brought as near as they go, in least squares with a ridge towards the
    inherited weights, to what they were in the parent (He et al., Channel Pruning, ICCV 2017). A layer that several
    levels share is repaired for all of them; one of a class with a forward of its own is not. The parent runs at the
    child's input size and with as many regions; where some are proposed, the child's second stage sees the parent's.

    Args:
        child: what ``rewrite`` made of the parent; changed in place. Recalibrate its norms afterwards.
        parent: the detector that was cut, in torch's wrappers or not; it stays as it is.
        rewrite: what was cut.
        topology: of the parent.
        batches: ``(images, targets)`` or images; all run at once.

    Returns:
        Paths of the layers that were repaired, in order.

    Raises:
        InputError: there is no batch, or ``topology`` is of another model.
    """
    child, parent = unwrapped(child), unwrapped(parent)
    require_traced(parent, topology)
    images = [image for batch in batches for image in images_on(child, images_of(batch))]
    require_batches(images, "repair")
    origins = came_from(parent, rewrite, topology)
    layers = _cut_readers(child, origins, rewrite, topology)
    with _with_attributes_of(parent, rewrite):
        proposed = _remember(parent, {origins[path]: layer for path, layer in layers.items()}, images)
    pending = {path: layer for path, layer in layers.items() if layer.seen}
    repaired: list[str] = []
    final: dict[str, list[Any]] = {}
    while pending:
        done = _pass(child, pending, images, proposed, final)
        if not done:
            break
        repaired += done
        for path in done:
            del pending[path]
    return repaired


def _pass(
    child: nn.Module,
    pending: Mapping[str, _Layer],
    images: list[Tensor],
    proposed: MutableMapping[str, Any],
    final: dict[str, list[Any]],
) -> list[str]:
    """One forward: layers that are called once are repaired as they are met, up to the first that is called again and
    again, which is repaired at its last call. It ends there, or when nothing is left to be repaired.

    Args:
        child, pending, images, proposed: as :func:`repair` has them.
        final: what the child's parts returned in passes before, by name and call by call, where nothing that it depends
            on is repaired any more; this pass begins after it, and adds to it.

    Returns:
        What was repaired; nothing where no layer met what the parent's read.
    """
    done: list[str] = []
    shared: list[str] = []  # the one that is being collected

    def entered(path: str, layer: _Layer, x: Tensor) -> None:
        if path in done or (shared and shared[0] != path):
            return
        places = layer.seen[len(layer.rows)][0] if len(layer.rows) < len(layer.seen) else None
        rows = None if places is None else _read(layer.module, x)
        if rows is None or places is None or (len(places) and int(places.max()) >= len(rows)):
            layer.rows.clear()
            return
        layer.rows.append(rows[places])
        if len(layer.seen) > 1 and not shared:
            shared.append(path)
        if len(layer.rows) == len(layer.seen):
            layer.solve()
            done.append(path)
            if shared or len(done) == len(pending):
                raise _Done

    def hook(path: str, layer: _Layer) -> Callable[..., None]:
        return lambda module, inputs: entered(path, layer, inputs[0])

    handles = [layer.module.register_forward_pre_hook(hook(path, layer)) for path, layer in pending.items()]
    try:
        with mode(child, training=False), proposals_of(child, proposed), _replayed(child, final, lambda: not shared):
            detections(child, images)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for layer in pending.values():
            layer.rows.clear()
    return done


@contextmanager
def _replayed(model: nn.Module, known: dict[str, list[Any]], is_final: Callable[[], bool]) -> Iterator[None]:
    """Lets the parts of a model return what is known of each of their calls, for a while, instead of running.

    Args:
        model: a detector that sees the same images in every forward.
        known: by the name of a part, call by call; what is not known yet is added where it is final.
        is_final: asked at the end of a call.
    """

    def replaying(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        calls, outs = count(), known.setdefault(name, [])

        def called(*given: Any, **named: Any) -> Any:
            if (call := next(calls)) < len(outs):
                return outs[call]
            out = run(*given, **named)
            if is_final():
                outs.append(out)
            return out

        return called

    parts = dict(model.named_children())
    for name, part in parts.items():
        part.forward = replaying(name, part.forward)
    try:
        yield
    finally:
        for part in parts.values():
            del part.forward


def _read(module: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:  # -> [places, inputs]
    """What a layer reads at each place of its output, images one after the other."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    padding = module._reversed_padding_repeated_twice
    kind = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, padding, mode=kind)
    patches = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)  # [N, inputs, L]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _said(module: nn.Module, out: Tensor) -> Tensor:  # -> [places, outputs]
    return out.flatten(2).transpose(1, 2).flatten(0, 1) if isinstance(module, nn.Conv2d) else out.flatten(0, -2)


def _remember(source: nn.Module, layers: Mapping[str, _Layer], images: list[Tensor]) -> dict[str, Any]:
    """What the parent's layers return at some places of each call; and what regions it proposes, if it gets there."""
    generator = torch.Generator().manual_seed(0)

    def hook(layer: _Layer) -> Callable[..., None]:
        def left(module: nn.Module, inputs: Any, out: Tensor) -> None:
            rows = _said(module, out)
            places = torch.randperm(len(rows), generator=generator)[:PLACES].to(rows.device)
            layer.seen.append((places, rows[places][:, torch.from_numpy(layer.outputs).to(rows.device)]))

        return left

    modules = {source.get_submodule(path): layer for path, layer in layers.items()}
    handles = [module.register_forward_hook(hook(layer)) for module, layer in modules.items()]
    trunk, proposed = trunk_of(source), dict[str, Any]()
    ends_there = bool(trunk) and modules.keys() <= {module for part in trunk for module in part.modules()}
    try:
        with mode(source, training=False), proposals_of(source, proposed):
            run = partial(detections, source, images)
            run_until(trunk[-1], run) if ends_there else run()
    finally:
        for handle in handles:
            handle.remove()
    return proposed


def _cut_readers(
    child: nn.Module, origins: Mapping[str, str], rewrite: Rewrite, topology: Topology
) -> dict[str, _Layer]:
    """The child's layers that read cut channels, by path; without those of a forward of their own, as one that
    standardises its weights, whose outputs are no product of these."""
    chosen = {name: checked(topology, name, units) for name, units in rewrite.keep.items()}
    gone = leaving(topology, chosen)
    found = {}
    for path, module in child.named_modules():
        weight = f"{origins.get(path)}.weight"
        is_product = isinstance(module, nn.Linear | nn.Conv2d) and type(module).forward in PRODUCTS
        if is_product and getattr(module, "groups", 1) == 1 and (weight, 1) in gone:
            outputs = module.weight.shape[0] + len(gone.get((weight, 0), ()))
            found[path] = _Layer(module, np.delete(np.arange(outputs), gone.get((weight, 0), [])))
    return found


@contextmanager
def _with_attributes_of(parent: nn.Module, rewrite: Rewrite) -> Iterator[None]:
    """Lets the parent have the attributes that the rewrite sets, input size and regions, for a while."""
    owners = {name: parent.get_submodule(name.rpartition(".")[0]) for name in rewrite.attributes}
    before = {name: named(parent, name) for name in rewrite.attributes}
    try:
        for name, value in rewrite.attributes.items():
            set_attribute(parent, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owners[name], name.rpartition(".")[2], value)
