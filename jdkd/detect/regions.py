"""How many regions the first stage of a two-stage detector proposes to its second."""

from typing import Any

from torch import nn
from torchvision.models.detection.rpn import RegionProposalNetwork

from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite.building import COUNTS, are_counts

AFTER_NMS = COUNTS[1]
ASKED = RegionProposalNetwork.pre_nms_top_n, RegionProposalNetwork.post_nms_top_n  # what reads them


def region_count(model: nn.Module) -> int | None:
    """How many regions of an image go to the second stage in evaluation, at most.

    Returns:
        None without a region proposal network of torchvision's, with several, or where a subclass of it has a count of
        its own making, which its attributes do not change.
    """
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
    if type(count) is not int or count < 1:
        raise InputError(f"regions is how many regions are proposed, a positive whole number, got {count!r}.")
    rpn = _proposer(model)
    if rpn is None:
        raise InputError(
            f"this {type(unwrapped(model)).__name__} has no region proposal network of torchvision's, several, or one "
            f"that counts by itself, so {count} regions cannot be asked of it; leave regions out."
        )
    path, module = rpn
    share = count / module._post_nms_top_n["testing"]
    counts = {name: dict(getattr(module, name)) for name in COUNTS}
    return {f"{path}.{name}": now | {"testing": max(1, round(share * now["testing"]))} for name, now in counts.items()}


def _proposer(model: nn.Module) -> tuple[str, RegionProposalNetwork] | None:
    """Path and module of the only region proposal network in a detector, if it proposes as many as its attributes say;
    without the detector's wrappers."""
    found = [(path, each) for path, each in unwrapped(model).named_modules() if isinstance(each, RegionProposalNetwork)]
    return found[0] if len(found) == 1 and _is_counted(found[0][1]) else None


def _is_counted(rpn: RegionProposalNetwork) -> bool:
    asked = type(rpn).pre_nms_top_n, type(rpn).post_nms_top_n
    return asked == ASKED and all(are_counts(name, vars(rpn).get(name)) for name in COUNTS)
