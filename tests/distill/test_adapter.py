"""The 1x1 convolutions between a student's channels and its teacher's, and the squared error through them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.distill import Distiller, FeatureDistiller, correlations
from jdkd.distill.adapter import Adapters
from jdkd.distill.regression import Regression
from jdkd.errors import InputError
from jdkd.reference.pearson import pkd_loss
from jdkd.train import TrainConfig, fit
from tests.detectors import detector, small_spec
from tests.distill.pyramids import PyramidDetector, batch
from tests.train.scenes import write_scenes
from tests.train.toy import same, values

LEVELS = {"0": 4, "1": 8}
KEYS = "0123"


@pytest.fixture
def narrow() -> nn.Module:
    """A student of half its teacher's channels and another input size."""
    return detector(small_spec(fpn=8, min_size=48)).train()


def adapted(student: nn.Module, teacher: nn.Module, images: list[Tensor], **options) -> FeatureDistiller:
    distiller = FeatureDistiller(student, teacher, adapter=True, **options)
    distiller.calibrate([images])
    return distiller


def solved(ours: Tensor, theirs: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """The ridge regression by its textbook form: one more row a channel, whose target is the prior's."""
    x, y = (side.transpose(0, 1).flatten(1).double() for side in (ours, theirs))  # [C, M]
    means = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    x, y = x - means[0], y - means[1]
    strength = (x.square().sum() / x.shape[1]).sqrt() * torch.eye(len(x), dtype=x.dtype)
    rows, targets = torch.cat((x, strength), 1), torch.cat((y, prior.double() @ strength), 1)
    weights = torch.linalg.lstsq(rows.mT, targets.mT).solution.mT
    return weights, (means[1] - weights @ means[0])[:, 0]


def test_the_fit_is_the_least_squares_over_all_batches_together():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 8, 5, 4, generator=generator) + 1000 * count for count in (1, 3, 2)]
    prior = torch.randn(5, 3, generator=generator)
    regression = Regression(prior)
    for values_of in batches:
        regression.add(values_of[:, :3], values_of[:, 3:])
    together = torch.cat(batches)
    weights, offsets = regression.solved()
    expected = solved(together[:, :3], together[:, 3:], prior)
    torch.testing.assert_close(weights, expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(offsets, expected[1], rtol=1e-6, atol=1e-6)
    predicted = torch.einsum("tc,nchw->tnhw", weights, together[:, :3].double()).flatten(1)
    theirs = together[:, 3:].double().transpose(0, 1).flatten(1)
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(predicted, theirs, strict=True)])
    assert regression.distance() == pytest.approx((1 - r).mean().item(), abs=1e-9)


@pytest.mark.parametrize(("width", "expected"), [(3, torch.eye(3)), (5, torch.zeros(5, 3))])
def test_what_a_level_does_not_show_is_0_or_the_identity_between_equal_widths(width, expected):
    student, teacher = PyramidDetector(3, {"a": 4, "b": 64}), PyramidDetector(width, {"a": 4, "b": 64}, seed=1)
    distiller = adapted(student, teacher, batch(1, 64))  # 1x1 at stride 64
    assert torch.equal(distiller.adapters[1].weight[:, :, 0, 0], expected)
    assert not torch.allclose(distiller.adapters[0].weight[:, :, 0, 0], expected, atol=0.1)


def test_a_student_that_is_constant_is_solved_too():
    regression = Regression(torch.zeros(2, 3))
    regression.add(torch.ones(2, 3, 4, 4), torch.randn(2, 2, 4, 4))
    assert torch.equal(regression.solved()[0], torch.zeros(2, 3).double()) and regression.distance() == 1


def test_least_squares_starts_closer_than_any_selection_of_channels():
    student, teacher, images = PyramidDetector(3, LEVELS), PyramidDetector(6, LEVELS, seed=1), batch()
    distiller = FeatureDistiller(student, teacher, loss_weight=1.0, adapter=True)
    fitted = distiller.calibrate([images, batch(seed=3)])
    known = {stride: r.after for stride, r in fitted.items()}
    assert known == pytest.approx({4: 1, 8: 1}, abs=0.02), "three colours make every channel of the teacher"
    for channels in ([0, 1, 2], [5, 3, 4]):
        assert min(correlations(student, teacher, [images], channels).values()) > 0.1
    with distiller:
        student.train()(images)
        assert distiller.loss().item() == pytest.approx(0, abs=0.02)


def test_batches_are_looked_at_in_evaluation_at_the_teachers_size_and_nothing_stays(narrow, teacher, images, targets):
    teacher.train()
    before = values(narrow), values(teacher)
    shapes = []
    teacher.backbone.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(inputs[0].shape)))
    distiller = FeatureDistiller(narrow, teacher, own_size=True, adapter=True)
    fitted = distiller.calibrate([(images, targets)])
    assert list(fitted) == [4, 8, 16, 32] and all(0 < r.after < 1 for r in fitted.values())
    assert shapes == [(2, 3, 96, 96)]
    assert narrow.training and teacher.training
    assert same(before[0], values(narrow)) and same(before[1], values(teacher))
    assert [tuple(adapter.weight.shape) for adapter in distiller.adapters] == [(16, 8, 1, 1)] * 4
    assert all(adapter.bias is None and adapter.weight.dtype == torch.float32 for adapter in distiller.adapters)


def test_both_gradients_reach_the_student_and_the_heads_read_the_necks_own_levels(narrow, teacher, images, targets):
    distiller = adapted(narrow, teacher, images, own_size=True, loss_weight=2.0)
    narrow.transform.min_size = (64,)  # so that plain interpolation is not needed for the reference

    def gradients(hooked: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        narrow.zero_grad()
        distiller.adapters.zero_grad()
        neck, heads = [], []
        hooks = [
            narrow.backbone.register_forward_hook(lambda _, inputs, output: neck.append(output)),
            narrow.rpn.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[1])),
        ]
        if hooked:
            with distiller:
                terms = narrow(images, targets)
                loss = distiller.loss()
            assert all(heads[0][key] is neck[0][key] for key in KEYS)
        else:
            terms = narrow(images, targets)
            taught = teacher.backbone(teacher.transform(images)[0].tensors)
            ours = [adapter(neck[0][key]) for adapter, key in zip(distiller.adapters, KEYS, strict=True)]
            loss = pkd_loss(ours, [taught[key].detach() for key in KEYS], 2.0)
        for hook in hooks:
            hook.remove()
        (sum(terms.values()) + loss).backward()
        named = [*narrow.named_parameters(), *distiller.adapters.named_parameters()]
        return {name: parameter.grad.clone() for name, parameter in named}

    expected, found = gradients(hooked=False), gradients(hooked=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert all(found[f"{level}.weight"].abs().sum() > 0 for level in range(4))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_pyramid_that_is_detached_is_refused_although_the_adapters_would_learn(narrow, teacher, images, targets):
    distiller = adapted(narrow, teacher, images)
    narrow.backbone.requires_grad_(False)
    with distiller:
        narrow(images, targets)
        with pytest.raises(InputError, match=r"pyramid of the student .* depends on no parameter that is trained"):
            distiller.loss()


def test_under_autocast_the_adapters_stay_in_single_precision(narrow, teacher, images, targets):
    distiller, losses = adapted(narrow, teacher, images), []
    kinds = []
    distiller.adapters[0].register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
    for enabled in (False, True):
        torch.manual_seed(0)
        with distiller, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            narrow(images, targets)
            losses.append(distiller.loss().item())
    assert kinds == [torch.float32] * 2 and losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_adapters_are_fitted_before_they_are_used_and_to_the_levels_they_meet(narrow, teacher, images, targets):
    with FeatureDistiller(narrow, teacher, adapter=True), pytest.raises(InputError, match=r"call calibrate\(batch"):
        narrow(images, targets)
    with pytest.raises(InputError, match="given 0 batches and needs at least 1"):
        FeatureDistiller(narrow, teacher, adapter=True).calibrate([])
    distiller = FeatureDistiller(detector(small_spec(fpn=24)).train(), teacher, adapter=True)
    distiller.adapters = adapted(narrow, teacher, images).adapters
    with distiller, pytest.raises(InputError, match=r"fitted to \[\(8, 16\), .*; call calibrate\(batches\) anew"):
        distiller.runner.student(images, targets)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def trained(scenes, teacher, folder, *, steps_until: int | None = None, resume: bool = False):
    """A narrow student after six steps with adapters, or an interrupted one."""
    student = detector(small_spec(fpn=8, min_size=48))
    if resume:  # what a resumed process has in memory does not matter
        nn.init.normal_(student.backbone.body.conv1.weight)

    def stop(step: int, total: int, losses: dict) -> None:
        if step == steps_until:
            raise KeyboardInterrupt

    with Distiller(student, teacher, feature_weight=2.0, own_size=True, adapter=True, reuse=True) as distiller:
        distiller.calibrate([[scenes[index][0].float() / 255 for index in range(4)]])
        begun = values(distiller.adapters)

        def losses(images, targets, step):
            yield student(images, targets) | distiller.losses()

        config = TrainConfig(steps=6, batch_size=4, lr=3e-3, flip=0.5)
        how = {"losses": losses, "auxiliary": distiller.adapters, "folder": folder, "resume": resume, "progress": stop}
        try:
            fit(student, scenes, config, device="cpu", **how)
        except KeyboardInterrupt:
            assert steps_until
    return student, distiller.adapters, begun


def test_they_are_trained_along_resumed_bit_for_bit_and_no_part_of_the_student(scenes, teacher, tmp_path):
    student, adapters, begun = trained(scenes, teacher, tmp_path / "whole")
    assert not any(torch.equal(weight, begun[name]) for name, weight in adapters.named_parameters())
    assert student.state_dict().keys() == detector(small_spec(fpn=8, min_size=48)).state_dict().keys()
    trained(scenes, teacher, tmp_path / "halves", steps_until=3)
    again, resumed, _ = trained(scenes, teacher, tmp_path / "halves", resume=True)
    assert same(values(student), values(again)) and same(values(adapters), values(resumed))


def test_the_squared_error_goes_through_the_same_sizes_and_adapters(narrow, teacher, images, targets):
    narrow.transform.min_size = (64,)
    pyramids = []
    narrow.backbone.register_forward_hook(lambda _, inputs, output: pyramids.append(output))
    distiller = Distiller(narrow, teacher, feature_weight=3.0, own_size=True, adapter=True, imitation="mse")
    distiller.calibrate([images])
    pyramids.clear()
    with distiller:
        narrow(images, targets)
        terms = distiller.losses()
    theirs = teacher.backbone(teacher.transform(images)[0].tensors)
    pairs = zip(distiller.adapters, KEYS, strict=True)
    expected = sum(F.mse_loss(adapter(pyramids[0][key]), theirs[key]) / 2 for adapter, key in pairs)
    assert terms.keys() == {"loss_mse"} and terms["loss_mse"].item() == pytest.approx(3 * expected.item(), rel=1e-4)
    terms["loss_mse"].backward()
    assert narrow.backbone.body.conv1.weight.grad.abs().sum() > 0
    assert all(adapter.bias.grad.abs().sum() > 0 for adapter in distiller.adapters), "scales and offsets count"


def test_the_squared_error_needs_no_adapter_where_widths_agree(student, teacher, images, targets):
    with FeatureDistiller(student, teacher, imitation="mse", loss_weight=1.0, levels=[8]) as distiller:
        student(images, targets)
        loss = distiller.loss()
    assert loss.item() == pytest.approx(distiller.level_losses[8].item()) and loss > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imitation": "l2"}, "imitation is 'l2'; choose pearson, mse or cwd"),
        ({"adapter": True, "channels": [0]}, "adapter and channels are both given; .* leave channels out"),
        ({"imitation": "mse", "statistics": "instance"}, "'mse', which takes no statistics; leave that out"),
        ({"imitation": "mse", "level_weights": [1.0]}, "'mse', which takes no level_weights"),
    ],
)
def test_what_does_not_go_together_is_named(student, teacher, options, message):
    with pytest.raises(InputError, match=message):
        FeatureDistiller(student, teacher, **options)


def test_without_features_there_is_nothing_to_adapt(student, teacher):
    distiller = Distiller(student, teacher, feature_weight=0, head_weight=1, adapter=True)
    assert distiller.calibrate([batch()]) == {} and distiller.adapters is None
    assert isinstance(adapted(student, teacher, batch()).adapters, Adapters)
