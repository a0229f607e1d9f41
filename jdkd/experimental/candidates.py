"""Many pruned candidates of a model over one batch, where what they share runs once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from jdkd.errors import InputError
from jdkd.experimental.masked import Edit, Swap, edits, swapped
from jdkd.experimental.output_cache import OutputCache, flatten, unflatten
from jdkd.nn.coupling import ElasticGroups
from jdkd.nn.unwrapping import unwrapped
from jdkd.ops.active_channels import ChannelsLike


@dataclass(frozen=True)
class PrunedCandidate:
    """A pruned candidate of a model.

    Args:
        keep: active channels of groups, by name, as :func:`masked` takes them.
        skip: paths of blocks that do not run.
    """

    keep: Mapping[str, ChannelsLike] = field(default_factory=dict)
    skip: Collection[str] = ()


def score_candidates(
    model: nn.Module,
    candidates: Sequence[PrunedCandidate | Mapping[str, ChannelsLike]],
    batch: Any,
    groups: ElasticGroups | None = None,
    *,
    score: Callable[[Any], Any] | None = None,
    share: bool = True,
) -> list[Any]:
    """Runs many pruned candidates of a model over one batch, without gradients; what they share runs once.

    Results are those of :func:`masked`, one candidate after the other. The newest output of every module is cached, in
    all about as much memory as a training forward keeps. A module returns its cached output where its active channels
    are those of an earlier candidate and its inputs are known to be the same. Candidates that begin alike run one after
    another, for modules that run in the order of their registration.

    Not cached are modules that write into their inputs or return a view of them, those whose output was written into
    since, and those that contain a module with a hook. A model whose output cannot be pickled shares nothing.

    Args:
        model: a plain model in evaluation mode, as :func:`masked` takes it. What wraps it does not run, such as a graph
            of ``torch.compile``.
        candidates: channels to keep by group, or :class:`PrunedCandidate` where blocks are skipped too.
        batch: what the model is called with; a tuple holds several arguments. It may not be written in place.
        groups: which channels are coupled, as :func:`masked` takes them.
        score: makes a result of an output, so that outputs need not be kept; runs outside the candidate. What it is
            given is its own.
        share: False runs everything for every candidate. It is for modules that draw at random or keep a state in
            evaluation, that read what is neither an argument nor inside them, or whose outputs are written behind
            PyTorch's back (``.data``, ``.numpy()``, DLPack, a replayed CUDA graph, a kernel that writes into anything
            but new ``torch.empty`` memory).

    Returns:
        ``score(output)``, or the output, of every candidate in the order given.

    Raises:
        InputError: if a candidate does not fit the model, or writes into the batch, or the model is in training mode;
            names candidate, module, group and values. The model is what it was, after any exception.
    """
    model = unwrapped(model)
    for path, module in model.named_modules():
        if module.training:
            raise InputError(
                f"score_candidates: {path or 'the model'}, a {type(module).__name__}, is in training mode; call "
                "model.eval()"
            )
    plans = []
    if isinstance(candidates, PrunedCandidate | Mapping | str) or not isinstance(candidates, Iterable):
        raise InputError(f"score_candidates: candidates={candidates!r} is no list of candidates; give [{{...}}, ...]")
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, PrunedCandidate | Mapping):
            raise InputError(
                f"score_candidates: candidate {number} is {candidate!r}; give channels by group, {{group: channels}}, "
                "or a PrunedCandidate"
            )
        keep, skip = (candidate.keep, candidate.skip) if isinstance(candidate, PrunedCandidate) else (candidate, ())
        try:
            plans.append(edits(model, keep, groups, skip))
        except InputError as error:
            raise InputError(f"score_candidates: candidate {number}: {error}") from None
    results: list[Any] = [None] * len(plans)
    cache = OutputCache(model) if share else None
    with torch.inference_mode(False), torch.no_grad():
        inputs = tree_map(_versioned, batch if isinstance(batch, tuple) else (batch,))
        given = _tensors_of(inputs)
        versions = [tensor._version for tensor in given]
        for number, swaps in _in_order(model, plans):
            parts = [(edit.module, edit.key) for edit in plans[number]]
            with swapped(swaps), cache.of(parts) if cache else contextlib.nullcontext():
                output = model(*tree_map(lambda value: value, inputs))  # in containers of its own
            if cache:
                if flatten(output) is None:
                    cache.clear()
                output = _own(output)
            result = output if score is None else score(output)
            results[number] = result if score is None or not cache else _own(result)
            if versions != [tensor._version for tensor in given]:
                raise InputError(
                    f"score_candidates: candidate {number} or its score wrote into the batch in place, so that the "
                    "next would see another; let the model copy what it writes, as in x = x.clone()"
                )
            del output, result  # before memory is needed
    return results


def _own(value: Any) -> Any:
    """The same in memory of its own: a later candidate may be given the same tensors, and write into them."""
    made = flatten(value)
    if made is None:
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
    structure, tensors = made
    copies = {id(tensor): tensor.clone() for tensor in tensors}
    return unflatten(structure, [copies[id(tensor)] for tensor in tensors])


def _tensors_of(inputs: tuple) -> list[Tensor]:
    made = flatten(inputs)
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)] if made is None else made[1]


def _versioned(value: Any) -> Any:
    """A tensor that was made in inference mode does not count what is written into it, and a copy does."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _in_order(model: nn.Module, plans: Sequence[Sequence[Edit]]) -> Iterator[tuple[int, list[Swap]]]:
    """Candidates with their parts, so that neighbours begin alike; a part that serves several is made once."""
    places = {module: place for place, module in enumerate(model.modules())}
    kinds: dict[Any, int] = {}
    ranks = []
    for plan in plans:
        rank = sorted((places[edit.site], kinds.setdefault(edit.key, len(kinds))) for edit in plan)
        ranks.append((*rank, (len(places), 0)))  # of two that begin alike, first the one that differs from then on
    uses = Counter(edit.key for plan in plans for edit in plan)
    made: dict[Any, list[Swap]] = {}
    for number in sorted(range(len(plans)), key=ranks.__getitem__):
        swaps = []
        for edit in plans[number]:
            if edit.key not in made:
                made[edit.key] = edit.swaps()
            swaps += made[edit.key]
            uses[edit.key] -= 1
            if not uses[edit.key]:
                del made[edit.key]
        yield number, swaps
