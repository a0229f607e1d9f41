"""Channel-wise distillation, against its definition."""

import pytest
import torch

from jdkd.distill import Distiller, FeatureDistiller
from jdkd.distill.imitation import ChannelWiseDivergence
from jdkd.errors import InputError
from tests.distill.pyramids import Detector, batch


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_is_the_divergence_of_what_each_channel_says_of_positions(tau):
    torch.manual_seed(0)
    levels = [(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)), (torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2))]
    expected = []
    for ours, theirs in levels:
        total = 0.0
        for image in range(2):
            for channel in range(3):
                s, t = ((x[image, channel].double() / tau).flatten().exp() for x in (ours, theirs))
                s, t = s / s.sum(), t / t.sum()
                total += float((t * (t / s).log()).sum())
        expected.append(2.0 * tau**2 * total / 6)
    same, loss, losses = ChannelWiseDivergence(2.0, tau)(*(list(side) for side in zip(*levels, strict=True)))
    assert losses.tolist() == pytest.approx(expected, rel=1e-5) and loss.item() == pytest.approx(
        sum(expected), rel=1e-5
    )
    assert all(one is other for one, (other, _) in zip(same, levels, strict=True))


def test_says_nothing_of_a_teacher_that_is_only_brighter():
    level = torch.randn(1, 2, 3, 3)
    assert ChannelWiseDivergence(1.0)([level], [level + 100])[1].item() == pytest.approx(0, abs=1e-4)


def test_teaches_under_its_own_name(student, teacher, images, targets):
    with Distiller(student, teacher, imitation="cwd", feature_weight=1.0, own_size=True) as distiller:
        student(images, targets)
        losses, parts = distiller.losses(), distiller.parts()
    assert [*losses] == ["loss_cwd"] and losses["loss_cwd"].requires_grad
    assert [*parts] == [f"loss_cwd of stride {stride}" for stride in (4, 8, 16, 32)]
    assert sum(parts.values()).item() == pytest.approx(losses["loss_cwd"].item(), rel=1e-5)


def test_an_adapter_of_the_squared_error_knows_offsets():
    student, teacher = Detector().train(), Detector()
    teacher.backbone.register_forward_hook(
        lambda _, inputs, levels: {name: 2 * level + 3 for name, level in levels.items()}
    )
    with FeatureDistiller(student, teacher, imitation="mse", loss_weight=1.0, adapter=True) as distiller:
        distiller.calibrate([batch(6)])
        student(batch(2, seed=1))
        assert distiller.loss().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"imitation": "cwd", "statistics": "instance"}, "'cwd', which takes no statistics; .* take 'pearson'"),
        ({"imitation": "mse", "tau": 2.0}, "'mse', which takes no tau; leave that out, or take 'cwd'"),
        ({"tau": 2.0}, "'pearson', which takes no tau"),
        ({"imitation": "cwd", "tau": 0.0}, "tau is 0.0, a temperature"),
        ({"imitation": "cwd", "tau": "1"}, "tau is '1', a temperature"),
    ],
)
def test_what_is_not_for_it_is_refused(student, teacher, options, words):
    with pytest.raises(InputError, match=words):
        FeatureDistiller(student, teacher, **options)
