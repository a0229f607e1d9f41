"""See :func:`read`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from jdkd.detect.input_size import input_transform
from jdkd.detect.regions import AFTER_NMS
from jdkd.errors import InputError, said
from jdkd.graph import Topology, trace
from jdkd.nn.necks import neck_of
from jdkd.rewrite import verify

SIZE = 128, 160  # of the example, in pixels: small, as what is coupled does not depend on it
REGIONS, DETECTIONS = 64, 2  # that a second stage and its masks are run on, for the same reason


def read(
    model: nn.Module,
    *,
    size: tuple[int, int] = SIZE,
    check: bool = False,
    like: Topology | None = None,
) -> Topology:
    """What is coupled to what in a detector, read off one forward of a drawn image; see :func:`jdkd.graph.trace`.

    A detector that resizes its input sees the example as it is.

    Args:
        model: any detector that takes a list of images ``[3, H, W]``.
        size: height and width of the example, in pixels.
        check: whether every group is cut once and compared, see :func:`jdkd.rewrite.verify`.
        like: what was checked of a detector that this one was rewritten from; it is trusted.

    Returns:
        The topology; ``followed`` has the channels of each level of the pyramid.

    Raises:
        InputError: it is no module, the size is none, or the detector does not run on such a list.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"read takes a torch.nn.Module, got a {type(model).__name__}.")
    if not isinstance(size, tuple | list) or len(size) != 2 or any(type(s) is not int or s < 1 for s in size):
        raise InputError(f"size must be height and width in whole pixels of at least 1, got {size!r:.80}.")
    example = [torch.rand(3, *size, generator=torch.Generator().manual_seed(0)).to(**_kind(model))]
    with few_regions(model, *size):
        try:
            topology = trace(model, example, follow=neck_of(model))
        except InputError:
            raise
        except Exception as error:  # whatever a model says of an input that it does not take
            raise InputError(
                f"{type(model).__name__} does not run on a list of one image [3, {size[0]}, {size[1]}] "
                f"({said(error)}); give a detector that does, or wrap it with jdkd.detect.adopt."
            ) from error
        if check:
            topology = verify(model, topology, example)
    return topology if like is None else topology.trusting(like)


@contextmanager
def few_regions(model: nn.Module, height: int, width: int) -> Iterator[None]:
    """For a while torchvision's transform leaves an image of this size as it is, and heads run on few regions."""
    changed: list[tuple[object, str, object]] = []

    def change(owner: object, name: str, value: object) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    transform = input_transform(model)
    try:
        if transform is not None and transform.fixed_size is None:
            change(transform, "min_size", (min(height, width),))
            change(transform, "max_size", max(height, width))
        for module in model.modules():
            if isinstance(module, RegionProposalNetwork):
                change(module, AFTER_NMS, {"training": REGIONS, "testing": REGIONS})
            elif isinstance(module, RoIHeads):
                change(module, "detections_per_img", min(DETECTIONS, module.detections_per_img))
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _kind(model: nn.Module) -> dict[str, Any]:
    """Where a model's numbers lie, and of what precision they are."""
    first: Tensor | None = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
    return {} if first is None else {"device": first.device, "dtype": first.dtype}
