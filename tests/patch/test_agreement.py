"""Which detections may be missing from an accelerated detector without being a difference."""

import pytest
import torch
from torch import Tensor, nn

from jdkd.patch.agreement import TOLERANCE, Reference


class Finds(nn.Module):
    """Finds boxes of some scores, each where its place in the list says, or where it is told."""

    def __init__(self, *scores: float, places: tuple[int, ...] | None = None, **limits: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scores, self.places = torch.tensor(scores), torch.tensor(places or range(len(scores)))
        vars(self).update(limits)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        boxes = 20.0 * self.places[:, None] + torch.tensor([0.0, 0.0, 10.0, 10.0])
        return [{"boxes": boxes, "labels": torch.ones_like(self.places), "scores": self.scores} for _ in images]


def reason(plain: Finds, other: Finds) -> str | None:
    return Reference(plain.eval(), [torch.zeros(3, 8, 8)]).difference(other.eval(), TOLERANCE).reason


LIMITS = {"detections_per_img": 3, "score_thresh": 0.05}


@pytest.mark.parametrize("limits", [LIMITS, {}], ids=["known", "unknown"])
def test_what_is_lost_or_added_is_a_difference_though_the_best_agrees(limits):
    assert reason(Finds(0.9, 0.5, 0.3, **limits), Finds(0.9, 0.5, 0.3)) is None
    for plain, other in (((0.9, 0.5, 0.3), (0.9,)), ((0.9,), (0.9, 0.5, 0.3)), ((0.9,), ())):
        assert "detections agree" in reason(Finds(*plain, **limits), Finds(*other)), (plain, other)


def test_what_lies_at_the_threshold_may_be_missing():
    assert reason(Finds(0.9, 0.0505, **LIMITS), Finds(0.9)) is None
    assert reason(Finds(0.9, 0.0515, **LIMITS), Finds(0.9)) == "only 2 of 3 detections agree"


def test_of_near_ties_at_the_most_that_is_kept_either_may_be():
    plain = Finds(0.9, 0.5, 0.3002, **LIMITS)
    assert reason(plain, Finds(0.9, 0.5, 0.3, places=(0, 1, 7))) is None
    assert reason(plain, Finds(0.9, 0.31, 0.3, places=(0, 7, 2))) == "only 4 of 6 detections agree"


def test_detections_in_bfloat16_are_compared():
    plain, other = Finds(0.9, 0.5), Finds(0.9, 0.25)
    for each in (plain, other):
        each.scores = each.scores.bfloat16()
    assert reason(plain, plain) is None and "detections agree" in reason(plain, other)
