"""What a student returns keeps its type, and holds the teacher's loss where a trainer looks for it."""

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import Tensor, nn

from jdkd.distill import FeatureDistiller, attach
from jdkd.errors import InputError
from jdkd.functional import pearson_tap, pkd_loss
from tests.distill.frameworks import BackboneOutput, DetectionOutput, HuggingFace, Levels, Ultralytics, head_loss


class Returning(nn.Module):
    """Returns its levels' loss as ``kind`` makes it."""

    def __init__(self, kind: object, seed: int = 0) -> None:
        super().__init__()
        self.backbone, self.kind = Levels(seed), kind

    def forward(self, x: Tensor) -> object:
        return self.kind(head_loss(self.backbone(x)))


def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def expected(student: nn.Module, teacher: nn.Module) -> Tensor:
    return pkd_loss(student.backbone(images()), teacher.backbone(images()), 6.0)


def test_an_output_object_keeps_its_type_and_its_total_loss_has_the_teachers():
    student, teacher = HuggingFace().train(), HuggingFace(1)
    alone = student(images(), labels=[])
    with attach(student, teacher) as handle:
        outputs = student(pixel_values=images(), labels=[])
    levels = (model.model.backbone(images(), None).feature_maps for model in (student, teacher))
    added = pkd_loss(*levels, 6.0)
    torch.testing.assert_close(sum(handle.losses.values()), added.detach())
    assert type(outputs) is DetectionOutput and list(outputs) == list(alone) == ["loss", "logits"]
    torch.testing.assert_close(outputs.loss, alone.loss + added)
    assert outputs["loss"] is outputs.loss is outputs[0], "entry, attribute and place are in step"
    weight = student.model.backbone.fine.weight
    (wanted,) = torch.autograd.grad(alone.loss + added, weight)
    outputs["loss"].backward()
    torch.testing.assert_close(weight.grad, wanted)
    assert torch.equal(outputs.logits, alone.logits)


def test_the_heads_get_the_tapped_levels_in_an_output_object_of_the_same_type():
    student, teacher, seen = HuggingFace().train(), HuggingFace(1), []
    with attach(student, teacher) as handle:
        student(images(), labels=[])
        hooks = student.model.backbone._forward_hooks
        student.model.backbone.register_forward_hook(lambda module, given, output: seen.append(output))
        student(images(), labels=[])
        assert len(hooks) == 3 and list(handle.losses) == [4, 8]
    output = seen[0]
    assert type(output) is BackboneOutput and type(output.feature_maps) is tuple
    assert all("PearsonLoss" in level.grad_fn.name() for level in output.feature_maps)
    assert output["feature_maps"] is output.feature_maps and output.feature_maps[0] is output.hidden_states[1]


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_mappings_with_a_total_and_mappings_of_losses(kind):
    teacher = Returning(dict, seed=1)
    total = Returning(lambda loss: kind({"loss": loss, "logits": torch.zeros(2, 5)})).train()
    with attach(total, teacher):
        outputs = total(images())
    assert type(outputs) is kind and list(outputs) == ["loss", "logits"]
    torch.testing.assert_close(outputs["loss"], head_loss(total.backbone(images())) + expected(total, teacher))
    several = Returning(lambda loss: kind({"loss_cls": [loss, loss], "loss_box": loss, "acc": 0.5})).train()
    with attach(several, teacher):
        outputs = several(images())
    assert type(outputs) is kind and list(outputs) == ["loss_cls", "loss_box", "acc", "loss_pkd"]
    torch.testing.assert_close(outputs["loss_pkd"], expected(several, teacher))


def test_a_dict_that_a_student_keeps_is_not_written_to():
    kept = {}
    student = Returning(lambda loss: kept.update(loss=loss) or kept).train()
    with attach(student, Returning(dict, seed=1)):
        outputs = student(images())
    assert outputs["loss"] > kept["loss"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda loss: loss, "returned a Tensor in training mode"),
        (lambda loss: (loss.expand(3), {}), "returned a tuple in training mode"),
        (lambda loss: (loss.expand(3), loss.expand(3)), "returned a tuple in training mode"),
        (lambda loss: (loss.expand(2), {"box": loss, "cls": loss}), "returned a tuple in training mode"),
        (lambda loss: (loss.expand(2), {"boxes": loss.detach()}), "returned a tuple in training mode"),
        (lambda loss: (loss.detach(), {}), "returned a tuple in training mode"),
        (lambda loss: (loss,), "returned a tuple in training mode"),
        (lambda loss: (), "returned a tuple in training mode"),
        (lambda loss: [loss], "returned a list in training mode"),
        (lambda loss: None, "returned a NoneType in training mode"),
        (
            lambda loss: {"logits": loss.expand(2, 5)},
            r"returned a tensor \[2, 5\] as logits and no loss .* give it targets",
        ),
        (lambda loss: DetectionOutput(logits=loss.expand(2, 5)), "as logits and no loss in training mode"),
        (lambda loss: {"loss": None, "boxes": "none"}, "returned a NoneType as loss"),
        (lambda loss: {"loss": loss.expand(3)}, r"returned a tensor \[3\] as its loss, and attach adds to a scalar"),
        (lambda loss: {"loss": {"box": loss}}, "returned a dict as its loss"),
        (lambda loss: {"loss_pkd": loss}, "returned a loss loss_pkd of its own"),
    ],
)
def test_what_holds_no_losses_is_refused(kind, message):
    student = Returning(kind).train()
    with attach(student, Returning(dict, seed=1)), pytest.raises(InputError, match=message):
        student(images())


def test_a_student_without_labels_is_refused():
    student = HuggingFace().train()
    with (
        attach(student, HuggingFace(1)),
        pytest.raises(InputError, match=r"no loss in training mode.* give it targets"),
    ):
        student(images())


def test_a_tuple_keeps_its_kind_and_its_first_entry_has_the_teachers_loss():
    student, teacher = HuggingFace().train(), HuggingFace(1)
    alone = student(images(), labels=[], return_dict=False)
    with attach(student, teacher) as handle:
        outputs = student(images(), labels=[], return_dict=False)
    assert type(outputs) is tuple and torch.equal(outputs[1], alone[1])
    torch.testing.assert_close(outputs[0], alone[0] + sum(handle.losses.values()))
    named = namedtuple("Named", "total log")
    student = Returning(lambda loss: named(loss, "log")).train()
    with attach(student, Returning(dict, 1)):
        outputs = student(images())
    assert type(outputs) is named and outputs.log == "log"
    torch.testing.assert_close(
        outputs.total, head_loss(student.backbone(images())) + expected(student, Returning(dict, 1))
    )


@pytest.mark.parametrize(("vector", "named"), [(True, False), (True, True), (False, False)])
def test_a_sequence_of_layers_is_distilled_in_front_of_its_head_and_its_log_is_left_alone(vector, named):
    student, teacher = Ultralytics(vector=vector, named=named).train(), Ultralytics(seed=1)
    batch = {"img": images(), "cls": torch.zeros(3, 1), "batch_idx": torch.zeros(3)}
    alone = student(batch)
    with attach(student, teacher, loss_weight=2.0) as handle:
        loss, items = student(batch)
        assert student.eval()(images())[0].shape[1] == 9, "predicting goes on as ever"
    levels = [[], []]
    for model, found in zip((student, teacher), levels, strict=True):
        model.predict(images())
        found += model.model[-1].given
    added = pkd_loss(*levels, 2.0)
    assert list(handle.losses) == [4, 8] and teacher.model[-1].ran == 1, "by this test alone"
    assert loss.shape == ((4,) if vector else ())
    torch.testing.assert_close(items, alone[1], rtol=0, atol=0)
    torch.testing.assert_close(loss.sum(), alone[0].sum() + added)
    loss.sum().backward()
    assert student.model[0].conv.weight.grad.abs().sum() > 0
    assert all("PearsonLoss" in level.grad_fn.name() for level in _given(student, teacher, batch))


def _given(student: nn.Module, teacher: nn.Module, batch: dict) -> list[Tensor]:
    """What the student's head gets."""
    with attach(student.train(), teacher):
        student(batch)
    return student.model[-1].given


def test_a_head_that_is_called_with_the_levels_may_be_named_and_adapted():
    student, teacher = Ultralytics((4, 6)).train(), Ultralytics((8, 12), seed=1)
    batch = {"img": images()}
    with attach(student, teacher, neck="model.2:input", adapter=True) as handle:
        found = handle.calibrate([batch])
        assert list(found) == [4, 8] and [a.out_channels for a in handle.adapters] == [8, 12]
        student(batch)[0].sum().backward()
        assert handle.adapters[0].weight.grad.abs().sum() > 0
    with attach(student, Returning(dict, 1), adapter=True, teacher_normalisation="same") as handle:
        assert list(handle.calibrate([batch])) == [4, 8]
    with pytest.raises(InputError, match=r"no submodule model.7; .* or a head that is called with it, 'head:input'"):
        attach(student, teacher, neck="model.7:input")


def test_the_tap_takes_output_objects_too():
    levels, others = (Levels(seed)(images()) for seed in (0, 1))
    output = BackboneOutput(feature_maps=tuple(levels), hidden_states=(images(), *levels))
    features, loss = pearson_tap(output, BackboneOutput(feature_maps=tuple(others)))
    torch.testing.assert_close(loss, pkd_loss(levels, others))
    torch.testing.assert_close(pkd_loss(output, others), loss)
    assert type(features) is BackboneOutput and type(features.feature_maps) is tuple
    assert features["feature_maps"] is features.feature_maps and features.hidden_states[1] is levels[0]
    assert all("PearsonLoss" in level.grad_fn.name() for level in features.feature_maps)


class Wrapped(Levels):
    """Returns its levels as ``kind`` makes them."""

    def __init__(self, kind: object, seed: int = 0) -> None:
        super().__init__(seed)
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        return self.kind(super().forward(x))


def with_neck(kind: object, seed: int = 0) -> nn.Module:
    model = Returning(lambda loss: {"loss_box": loss}, seed)
    model.backbone = Wrapped(kind, seed)
    return model


@pytest.mark.parametrize("kind", [iter, lambda levels: (level for level in levels)])
def test_a_neck_that_returns_levels_one_by_one_is_distilled_and_its_heads_get_them_all(kind):
    student, teacher = with_neck(kind).train(), with_neck(kind, 1)
    alone = student(images())["loss_box"]
    with attach(student, teacher):
        losses = student(images())
    torch.testing.assert_close(losses["loss_box"], alone)
    torch.testing.assert_close(losses["loss_pkd"], expected(with_neck(list), with_neck(list, 1)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda levels: dict(enumerate(levels)).values(), "neck returned a dict_values, in which there is no level"),
        (
            lambda levels: [level.flatten(2) for level in levels],
            r"neck returned tensors \[2, 4, 24\] of",
        ),
    ],
)
def test_a_neck_without_a_level_is_described(kind, message):
    for ours, theirs, who in ((kind, list, "student"), (list, kind, "teacher")):
        student = with_neck(ours).train()
        with attach(student, with_neck(theirs, 1)), pytest.raises(InputError, match=f"the {who}'s {message}"):
            student(images())


def test_a_teacher_that_does_not_run_at_the_students_size_is_named_with_its_reason():
    teacher = Returning(dict, 1)
    teacher.backbone.coarse = nn.Conv2d(4, 4, 9)
    student = Returning(dict).train()
    with (
        attach(student, teacher),
        pytest.raises(InputError, match=r"Levels does not run on .*24\].*Kernel size.*min_si"),
    ):
        student(images())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_an_exported_teacher_is_refused_and_the_one_inside_it_is_not():
    class Exportable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(3, 4, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)

    teacher = Exportable()
    student, exported = Returning(lambda loss: {"loss": loss}), torch.export.export(teacher, (images(),)).module()
    distiller = FeatureDistiller(student, exported)
    for _ in range(2):
        with pytest.raises(InputError, match=r"is an exported program, .* pass the model that it was exported from"):
            attach(student, exported)
        with pytest.raises(InputError, match="is an exported program"):
            distiller.__enter__()
    with pytest.raises(InputError, match=r"the teacher is a scripted or traced module, .* that it was made from"):
        attach(student, torch.jit.script(teacher))
    student.train()(images())  # as it was, with no teacher attached
    with attach(student, teacher):
        pass
