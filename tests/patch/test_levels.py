"""Heads that run once over a canvas of levels return what they return level by level."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.patch.levels import Layout, OverCanvas, OverLevels, are_levels, layers_over, reach
from jdkd.patch.overrides import Overrides

SIZES = [(9, 14), (5, 7), (3, 4), (2, 2), (1, 1)]


def levels(channels: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, channels, *size) for size in SIZES]


class Head(nn.Module):
    """A tower and two predictions, level by level; one in code that no canvas passes."""

    def __init__(self, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(4, 4, 3, padding=1), *([norm(2, 4)] if norm else []), nn.ReLU(inplace=True)]
        self.tower = nn.Sequential(*layers)
        self.classes, self.boxes = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        classes, boxes = [], []
        for level in levels:
            seen = self.tower(level)
            classes.append(self.classes(seen).permute(0, 2, 3, 1).reshape(len(level), -1, 3))
            boxes.append(self.boxes(F.relu(seen - 0.1)))
        return torch.cat(classes, 1), boxes


class InPlace(Head):
    """Rectifies a level in place, where later levels have not been yet."""

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.classes(F.relu(self.tower[0](level), inplace=True)) for level in levels]


def put(head: nn.Module) -> tuple[Overrides, list[OverCanvas]]:
    overrides, layers = Overrides(), [head.get_submodule(name) for name in layers_over(head)]
    overrides.put(OverLevels(head, max(map(reach, layers))))
    over = [OverCanvas(layer) for layer in layers]
    for each in over:
        overrides.put(each)
    return overrides, over


def calls_of(conv: nn.Module) -> list[int]:
    calls: list[int] = []
    vars(conv)["_conv_forward"] = lambda x, w, b: calls.append(1) or type(conv)._conv_forward(conv, x, w, b)
    return calls


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_returns_the_same_and_runs_once(memory_format):
    head, given = Head().eval(), [level.contiguous(memory_format=memory_format) for level in levels()]
    with torch.no_grad():
        classes, boxes = head(given)
        overrides, _ = put(head)
        calls = {name: calls_of(head.get_submodule(name)) for name in ("tower.0", "tower.2", "classes", "boxes")}
        ours, our_boxes = head(given)
        torch.testing.assert_close(ours, classes)
        torch.testing.assert_close(our_boxes, boxes)
        assert {name: len(each) for name, each in calls.items()} == {
            "tower.0": 1,
            "tower.2": 1,
            "classes": 1,
            "boxes": len(SIZES),  # what is subtracted before it is no part of a canvas
        }
        other = [level[..., :3] for level in given[:2]]
        torch.testing.assert_close(head(other)[0], _plain(overrides, head, other)[0])


def _plain(overrides: Overrides, head: nn.Module, given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    overrides.remove()
    return head(given)


def test_a_group_norm_ends_the_canvas_and_stays_right():
    head, given = Head(nn.GroupNorm).eval(), levels()
    with torch.no_grad():
        expected = head(given)
        put(head)
        torch.testing.assert_close(head(given), expected)


def test_one_level_or_a_dictionary_runs_as_before():
    assert not are_levels(levels()[:1]) and not are_levels(dict(enumerate(levels())))
    assert not are_levels([torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 2, 2)])
    head, given = Head().eval(), levels()[:1]
    with torch.no_grad():
        expected = head(given)
        put(head)
        torch.testing.assert_close(head(given), expected)


def test_code_that_writes_into_its_levels_is_caught_by_comparing():
    head, given = InPlace().eval(), levels()
    with torch.no_grad():
        expected = head(given)
        put(head)
        ours = head(given)
    assert any(not torch.allclose(one, other, atol=1e-3) for one, other in zip(ours, expected, strict=True))


def test_a_head_that_raises_leaves_nothing_behind():
    head, given = Head().eval(), levels()
    put(head)
    head.boxes = nn.Conv2d(5, 4, 1)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="channels"):
                head(given)
        assert head.classes(given[0]).shape == (2, 3, 9, 14)


@pytest.mark.parametrize(
    ("layer", "far"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), 1),
        (nn.Conv2d(4, 4, 5, padding=4, dilation=2), 4),
        (nn.Conv2d(4, 4, 1), 0),
        (nn.Conv2d(4, 4, 3, padding="same"), 1),
        (nn.Conv2d(4, 4, 3), None),  # the size changes
        (nn.Conv2d(4, 4, 3, padding=1, stride=2), None),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), None),  # the border is not zero
        (nn.GroupNorm(2, 4), None),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), 1),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)), None),  # a second look past a gap that was filled
    ],
)
def test_how_far_a_layer_looks(layer, far):
    assert reach(layer.eval()) == far


def test_levels_on_a_canvas_are_apart_by_the_gap():
    for gap in (1, 3):
        layout = Layout(SIZES, gap, torch.device("cpu"))
        taken = torch.zeros(layout.size, dtype=torch.int)
        for number, place in enumerate(layout.places(), 1):
            assert (taken[place] == 0).all()
            taken[place] = number
        assert torch.equal(taken == 0, layout.between)
        around = F.max_pool2d(taken[None].float(), 2 * gap + 1, 1, gap)[0].int()
        near = -F.max_pool2d(-torch.where(taken == 0, 99, taken)[None].float(), 2 * gap + 1, 1, gap)[0].int()
        inside = taken > 0
        assert (around[inside] == taken[inside]).all() and (near[inside] == taken[inside]).all()
