"""How many regions the first stage of a two-stage detector proposes to its second."""

from typing import Any

from torch import nn
from torchvision.models.detection.rpn import RegionProposalNetwork

from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped

BEFORE_NMS, AFTER_NMS = "_pre_nms_top_n", "_post_nms_top_n"  # of a level and of an image, {"training", "testing"}


def region_count(model: nn.Module) -> int | None:
    """How many regions of an image go to the second stage in evaluation, at most; None without a torchvision RPN."""
    rpn = _proposer(model)
    return None if rpn is None else int(rpn[1]._post_nms_top_n["testing"])


def region_attributes(model: nn.Module, count: int) -> dict[str, Any]:
    """The attributes by which a detector proposes so many regions, for :class:`jdkd.rewrite.Rewrite`.

    Training sees as many as before: it is the deployed detector that saves their time.

    Args:
        model: a detector with a :func:`region_count`.
        count: regions of an image in evaluation, at most; those of a level before NMS follow in proportion.

    Raises:
        InputError: it has none, or ``count`` is no positive whole number.
    """
    if not isinstance(count, int) or count < 1:
        raise InputError(f"regions is how many regions are proposed, a positive whole number, got {count!r}.")
    rpn = _proposer(model)
    if rpn is None:
        raise InputError(
            f"this {type(unwrapped(model)).__name__} has no region proposal network of torchvision's, so {count} "
            "regions cannot be asked of it; leave regions out."
        )
    path, module = rpn
    share = count / module._post_nms_top_n["testing"]
    counts = {name: dict(getattr(module, name)) for name in (BEFORE_NMS, AFTER_NMS)}
    return {f"{path}.{name}": now | {"testing": max(1, round(share * now["testing"]))} for name, now in counts.items()}


def _proposer(model: nn.Module) -> tuple[str, RegionProposalNetwork] | None:
    """Path and module of the only region proposal network in a detector, without its wrappers."""
    found = [(path, each) for path, each in unwrapped(model).named_modules() if isinstance(each, RegionProposalNetwork)]
    return found[0] if len(found) == 1 else None
