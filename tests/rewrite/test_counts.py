"""How many regions are proposed is part of an architecture, though torchvision keeps it in private mappings."""

import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.graph import trace
from jdkd.notices import Notice
from jdkd.rewrite import Architecture, Rewrite, build, describe

ATTRIBUTE = "_post_nms_top_n"
FEWER = {"training": 2000, "testing": 250}


class Proposing(nn.Module):
    """Counts as torchvision's region proposal network does, and by a table of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 1)
        self._post_nms_top_n = {"training": 2000, "testing": 1000}
        self._pre_nms_top_n, self.table = torch.tensor([5, 6]), {"testing": 3}

    def forward(self, x):
        return self.conv(x)


def proposing() -> nn.Module:
    return Proposing()


BUILDER = f"{__name__}:proposing"


def test_counts_are_described_built_and_the_rewrites_own():
    model, x = proposing(), torch.rand(1, 3, 4, 4)
    rewrite = Rewrite(attributes={ATTRIBUTE: FEWER})
    children = [rewrite.apply(model, trace(model, x)) for _ in range(2)]
    known = describe(children[0], BUILDER)
    assert known.attributes == {ATTRIBUTE: FEWER}
    made = build(known)
    for one in (children[0], made):
        one._post_nms_top_n["testing"] = 7
    assert children[1]._post_nms_top_n == build(known)._post_nms_top_n == FEWER == rewrite.attributes[ATTRIBUTE]
    assert made.architecture.attributes == {ATTRIBUTE: FEWER}, "it is what it was made of"


def test_counts_of_another_make_are_named_and_not_described():
    model = proposing()
    model._pre_nms_top_n = torch.tensor([5, 7])
    with pytest.warns(Notice, match="_pre_nms_top_n of the Proposing is not what .*:proposing makes"):
        assert not describe(model, BUILDER).attributes


@pytest.mark.parametrize("wrong", [250, {"testing": 250}, FEWER | {"testing": 0}, FEWER | {"testing": 2.5}, [1, 2]])
def test_what_counts_no_regions_is_refused(wrong):
    model = proposing()
    for ask in (
        lambda: build(Architecture(BUILDER, attributes={ATTRIBUTE: wrong})),
        lambda: Rewrite(attributes={ATTRIBUTE: wrong}).apply(model, trace(model, torch.rand(1, 3, 4, 4))),
    ):
        with pytest.raises(InputError, match=r"attributes sets '_post_nms_top_n' to .* how many regions are proposed"):
            ask()
    with pytest.raises(InputError, match="attributes sets 'table', and the builder makes a dict"):
        build(Architecture(BUILDER, attributes={"table": {"testing": 4}}))
