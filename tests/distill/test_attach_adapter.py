"""attach(adapter=True) and attach(align=...): what stands between both, in somebody else's training loop."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from jdkd.distill import attach
from jdkd.distill.adapter import Adapters
from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.reference.pearson import pkd_loss
from tests.detectors import detector, small_spec
from tests.distill.frameworks import HuggingFace, OpenMMLab, Processor
from tests.distill.pyramids import Detector, batch
from tests.train.toy import values


@pytest.fixture
def narrow() -> nn.Module:
    return detector(small_spec(fpn=8)).train()


def test_its_parameters_are_handed_to_the_optimiser_and_are_trained(narrow, teacher, images, targets):
    optimizer = torch.optim.SGD(narrow.parameters(), lr=1e-2)
    with attach(narrow, teacher, adapter=True) as handle:
        found = handle.calibrate([images])
        optimizer.add_param_group({"params": handle.adapters.parameters()})  # the documented line
        assert [before for before, _ in found.values()] == [None] * 4 and list(found) == [4, 8, 16, 32]
        begun = values(handle.adapters)
        losses = narrow(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        assert losses["loss_pkd"].requires_grad and losses["loss_pkd"].item() > 0
        assert not any(torch.equal(weight, begun[name]) for name, weight in handle.adapters.named_parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("how", [{"adapter": True}, {"align": "linear"}, {"align": "permute"}])
def test_it_is_in_no_state_no_checkpoint_and_no_copy_of_the_student(how, teacher, images, targets):
    student = detector(small_spec()).train()
    names = list(student.state_dict()), [name for name, _ in student.named_parameters()]
    modules = [name for name, _ in student.named_modules()]
    with attach(student, teacher, **how) as handle:
        handle.calibrate([images])
        student(images, targets)
        assert isinstance(handle.adapters, Adapters) == (how != {"align": "permute"})
        assert (list(student.state_dict()), [name for name, _ in student.named_parameters()]) == names
        assert [name for name, _ in student.named_modules()] == modules
        file = io.BytesIO()
        torch.save(student, file)
        file.seek(0)
        own = {id(tensor) for tensor in (*handle.adapters.parameters(), *handle.adapters.buffers())}
        for copied in (
            copy.deepcopy(student),
            pickle.loads(pickle.dumps(student)),
            torch.load(file, weights_only=False),
        ):
            assert list(copied.state_dict()) == names[0]
            assert copied(images, targets).keys() == student(images, targets).keys() - {"loss_pkd"}
            assert own.isdisjoint(map(id, copied.parameters()))
        detector(small_spec()).load_state_dict(student.state_dict(), strict=True)


@pytest.mark.parametrize("how", [{"adapter": True}, {"align": "linear"}, {"align": "permute"}])
def test_its_own_state_brings_a_resumed_training_back(how):
    student, teacher = Detector().train(), Detector(seed=1)
    with attach(student, teacher, **how) as handle:
        handle.calibrate([batch(4)])
        kept, loss = handle.adapters.state_dict(), student(batch(2))["loss_pkd"].item()
    with attach(student, teacher, **how) as handle:
        handle.calibrate([batch(4, seed=5)])  # other images
        handle.adapters.load_state_dict(kept)
        assert student(batch(2))["loss_pkd"].item() == pytest.approx(loss, rel=1e-6)


def test_a_teacher_made_and_adapters_fitted_in_inference_mode_teach():
    student = Detector().train()
    with torch.inference_mode():
        teacher = Detector(9, seed=1)
    with attach(student, teacher, adapter=True) as handle:
        with torch.inference_mode():
            handle.calibrate([batch(4)])
        student(batch(2))["loss_pkd"].backward()
        assert all(parameter.grad is not None for parameter in (*student.parameters(), *handle.adapters.parameters()))


def test_there_is_none_before_it_was_fitted():
    student, teacher = Detector().train(), Detector(9, seed=1)
    with attach(student, teacher, adapter=True) as handle:
        with pytest.raises(
            InputError, match=r"no adapters between student and teacher; call calibrate\(batches\) first"
        ):
            handle.adapters.parameters()
        with pytest.raises(InputError, match=r"adapter is asked for and there is none yet; call calibrate"):
            student(batch(2))
    with attach(student, Detector(seed=1)) as handle:
        handle.calibrate([batch(4)])
        with pytest.raises(InputError, match="attach with adapter=True, or with align"):
            handle.adapters.parameters()


def test_a_teacher_of_other_widths_and_another_size_is_resized_and_adapted(teacher, images, targets):
    """The pair of mmrazor#620: height, width and channels all differ."""
    student = detector(small_spec(fpn=8, min_size=48)).train()
    with attach(student, teacher, adapter=True, own_size=True, loss_weight=3.0) as handle:
        handle.calibrate([(images, targets)])
        seen, taught = [], []
        hooks = [
            student.backbone.register_forward_hook(lambda _, inputs, levels: seen.append(levels)),
            teacher.backbone.register_forward_hook(lambda _, inputs, levels: taught.append(levels)),
        ]
        losses = student(images, targets)
        for hook in hooks:
            hook.remove()
        assert [level.shape[1] for level in seen[0].values()] == [8] * 5
        assert [level.shape[1] for level in taught[0].values()] == [16] * 5
        assert taught[0]["0"].shape[2:] > seen[0]["0"].shape[2:]
        losses["loss_pkd"].backward()
        assert 0 < losses["loss_pkd"].item() < 3.0 * 4
        assert student.backbone.body.conv1.weight.grad.abs().sum() > 0


def test_a_student_of_any_interface_is_calibrated_as_it_is_called():
    photographs = [255 * image for image in batch(4, size=32)]
    given = Processor()(photographs)
    student, teacher = HuggingFace().train(), HuggingFace(1)
    with attach(student, teacher, adapter=True) as handle:
        found = handle.calibrate([dict(given)])  # a mapping holds what it is called with
        assert list(found) == [4, 8] and torch.isfinite(student(**given, labels=[]).loss)
    student, teacher = OpenMMLab().train(), OpenMMLab(seed=1)
    tensor = student.data_preprocessor(photographs)
    with attach(student, teacher, align="linear") as handle:
        assert list(handle.calibrate([tensor], call=student)) == [4, 8]
        assert handle.calibrate([{"images": tensor}], call=lambda given: student(given["images"])).keys() == {4, 8}
        assert student(tensor)["loss_pkd"] > 0
        with pytest.raises(
            InputError, match=r"student \(OpenMMLab\) does not run up to its neck on that batch \(.*nothing"
        ):
            handle.calibrate([{"none": tensor}], call=lambda given: student(given["nothing"]))
        with pytest.raises(InputError, match=r"does not run up to its neck on a list of images"):
            handle.calibrate([tensor])


@pytest.mark.parametrize("handed_over", [True, False])
def test_adapters_that_no_optimiser_was_given_are_said_once(handed_over, recwarn):
    student, teacher = Detector().train(), Detector(9, seed=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    with attach(student, teacher, adapter=True) as handle:
        handle.calibrate([batch(4)])
        if handed_over:
            optimizer.add_param_group({"params": handle.adapters.parameters()})
        for _ in range(202):
            sum(student(batch(1, size=16)).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    said = [str(warning.message) for warning in recwarn if warning.category is Notice]
    assert len(said) == (0 if handed_over else 1)
    assert handed_over or ("optimizer.add_param_group({" in said[0] and "in 100 steps" in said[0])


def test_at_a_weight_of_zero_neither_the_adapters_nor_the_teacher_run():
    student, teacher = Detector().train(), Detector(9, seed=1)
    with attach(student, teacher, adapter=True, loss_weight=0.0) as handle:
        handle.calibrate([batch(4)])
        teacher.backbone.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
        assert student(batch(2))["loss_pkd"].item() == 0
        student.eval()(batch(2))
        assert all(parameter.grad is None for parameter in handle.adapters.parameters())


def test_the_loss_is_that_of_the_adapted_levels():
    student, teacher = Detector().train(), Detector(9, seed=1)
    with attach(student, teacher, adapter=True, loss_weight=2.0) as handle:
        handle.calibrate([batch(4)])
        loss = student(batch(2))["loss_pkd"]
        stacked = torch.stack(batch(2))
        with torch.no_grad():
            levels = student.backbone(stacked).values()
        ours = [adapter(level) for adapter, level in zip(handle.adapters, levels, strict=True)]
    expected = pkd_loss(ours, [level.detach() for level in teacher.backbone(stacked).values()], 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
