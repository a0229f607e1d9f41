"""The trace against declarations made by hand, and against detectors that torchvision ships."""

import pytest
import torch

from jdkd.detect import channel_groups
from jdkd.graph import trace
from tests.detectors import detector, small_spec

IMAGE = [torch.rand(3, 60, 80)]


def places(group):
    """(tensor, dimension, repeat) of every slot."""
    return {(slot.tensor, slot.dim, slot.repeat) for slot in group.slots}


@pytest.mark.parametrize("options", [{}, {"block": "bottleneck"}, {"norm": "frozen"}])
def test_the_trace_of_our_detector_equals_what_its_builder_declares(options):
    model = detector(small_spec(**options))
    traced = {frozenset(places(group)): group for group in trace(model, IMAGE).groups}
    declared = channel_groups(model.spec)
    assert len(traced) == len(declared)
    for group in declared.values():
        expected = {(*producer, 1) for producer in group.producers} | set(group.consumers)
        found = traced[frozenset(expected)]
        assert found.units == group.size and all(slot.offset == 0 for slot in found.slots)
