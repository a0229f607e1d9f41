"""See :func:`narrowed`."""

from __future__ import annotations

import math

import torch
from torch import nn

from jdkd.detect.reading import read
from jdkd.errors import InputError
from jdkd.rewrite import Rewrite


def narrowed(model: nn.Module, width: float) -> nn.Module:
    """A copy of a detector that keeps the first share of all channels that can be cut, to be trained.

    Weights that read fewer channels grow by the root of the ratio, so that what comes out has the variance that it had
    (He et al., ICCV 2015).

    Args:
        model: any detector that carries its ``architecture``.
        width: the share; how it is rounded says :meth:`jdkd.graph.ChannelGroup.shrunk`.

    Raises:
        InputError: the share is not in 0..1, or the detector does not run on a list of images.
    """
    if not 0 < width <= 1:
        raise InputError(f"width is {width:g}, the share of the channels to keep; give one in 0..1.")
    topology = read(model)
    keep = {}
    for group in topology.groups:
        if (kept := group.shrunk(width)) < group.units:
            keep[group.name] = range(kept)
    child = Rewrite(keep=keep).apply(model, topology)
    before, after = dict(model.named_parameters()), dict(child.named_parameters())
    read_in = {
        (slot.tensor, slot.dim)
        for group in topology.groups
        for slot in group.slots
        if group.name in keep and slot.role == "in"
    }
    with torch.no_grad():
        for name, dim in sorted(each for each in read_in if each[0] in after):
            after[name].mul_(math.sqrt(before[name].shape[dim] / after[name].shape[dim]))
    return child
