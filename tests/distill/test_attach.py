"""attach(): a teacher in somebody else's training loop, and nothing of it left behind."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from jdkd.distill import attach
from jdkd.distill.neck import Pyramid, levels_of
from jdkd.errors import InputError
from jdkd.functional import pkd_loss
from jdkd.notices import Notice
from tests.detectors import detector, small_spec
from tests.distill.pyramids import PyramidDetector

SIZE = {"min_size": 64, "max_size": 96}


def retinanet(seed: int = 0) -> nn.Module:
    """A stock RetinaNet: levels of stride 8 to 128."""
    torch.manual_seed(seed)
    top = LastLevelP6P7(256, 256)
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": top, "trainable_layers": 5}
    return RetinaNet(resnet_fpn_backbone(backbone_name="resnet18", weights=None, **levels), num_classes=4, **SIZE)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return x, self.second(x)


class Neck(nn.Module):
    """Returns its levels as ``kind`` makes them."""

    def __init__(self, kind: Callable[[list[Tensor]], Pyramid]) -> None:
        super().__init__()
        self.kind, self.lateral = kind, nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])

    def forward(self, stages: tuple[Tensor, ...]) -> Pyramid:
        return self.kind([lateral(x) for lateral, x in zip(self.lateral, stages, strict=True)])


class Necked(nn.Module):
    """Backbone, neck and head side by side, as OpenMMLab's detectors have them."""

    def __init__(self, kind: Callable[[list[Tensor]], Pyramid], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone, self.neck, self.head = Stages(), Neck(kind), nn.Conv2d(8, 1, 1)
        self.heads_ran = 0

    def levels(self, inputs: Tensor) -> list[Tensor]:
        return list(levels_of(self.neck(self.backbone(inputs))).values())

    def forward(self, inputs: Tensor, data_samples: object = None, mode: str = "tensor") -> dict[str, Tensor]:
        levels = self.levels(inputs)
        self.heads_ran += 1
        return {"loss_head": sum(self.head(level).square().mean() for level in levels)}


def max_pooled(levels: list[Tensor]) -> Tensor:
    return nn.functional.max_pool2d(levels[0], 3, 1, 1)


def everything_of(module: nn.Module) -> list[object]:
    """Modes, hooks and other attributes of a module and all that is in it."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in part.__dict__.items()}
        for part in module.modules()
    ]


def step(student: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    student.zero_grad()
    losses = student(images, targets)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("family", ["faster r-cnn", "retinanet"])
def test_adds_the_pearson_loss_of_the_levels_with_common_strides(family, student, teacher, images, targets):
    if family == "retinanet":
        student, teacher = retinanet(), retinanet(seed=1)
    own = step(student, images, targets)
    seen = []
    hook = student.backbone.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with attach(student, teacher, loss_weight=6.0) as handle:
        losses = step(student, images, targets)
    hook.remove()
    batch, ours = seen[0]
    theirs = teacher.eval().backbone(batch)
    common = [key for key in ours if key != "pool"]
    expected = [6 * pkd_loss(ours[key], theirs[key]) for key in common]
    assert losses.keys() == own.keys() | {"loss_pkd"}
    assert losses["loss_pkd"].item() == pytest.approx(sum(expected).item(), rel=1e-4)
    assert list(handle.losses) == ([8, 16, 32, 64, 128] if family == "retinanet" else [4, 8, 16, 32])
    for level, value in zip(handle.losses.values(), expected, strict=True):
        assert not level.requires_grad and level.item() == pytest.approx(value.item(), rel=1e-4)


def test_a_dense_student_learns_from_a_two_stage_teacher_at_the_strides_both_have(images, targets):
    teacher = detector(small_spec(fpn=256))
    student = retinanet().train()
    with attach(student, teacher) as handle:
        with pytest.warns(Notice) as said:
            step(student, images, targets)
        assert list(handle.losses) == [8, 16, 32]
    assert sorted(str(notice.message).split(" are")[0] for notice in said) == [
        "the student's levels of stride [64, 128]",
        "the teacher's levels of stride [4]",
    ]
    with attach(student, teacher, levels=[16], level_weights=[0.5]) as handle:
        losses = step(student, images, targets)
        assert list(handle.losses) == [16]
        assert losses["loss_pkd"].item() == pytest.approx(handle.losses[16].item())


def test_leaves_no_trace(student, teacher, images, targets):
    teacher.train().backbone.eval()
    teacher.rpn.requires_grad_(False)
    step(student, images, targets)
    before = [everything_of(student), everything_of(teacher)]
    frozen = [parameter.requires_grad for parameter in teacher.parameters()]
    handle = attach(student, teacher)
    assert [everything_of(student), everything_of(teacher)] != before
    handle.remove()
    handle.remove()
    assert [everything_of(student), everything_of(teacher)] == before
    assert [parameter.requires_grad for parameter in teacher.parameters()] == frozen
    with attach(student, teacher), pytest.raises(TypeError):
        student(images, 3)
    assert [everything_of(student), everything_of(teacher)] == before


def test_the_students_state_is_what_it_was(images, targets):
    student, teacher = retinanet().train(), retinanet(seed=1)
    names = list(student.state_dict()), [name for name, _ in student.named_parameters()]
    statistics = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with attach(student, teacher):
        step(student, images, targets)
        assert (list(student.state_dict()), [name for name, _ in student.named_parameters()]) == names
        retinanet().load_state_dict(student.state_dict(), strict=True)
        assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_nothing_runs_and_nothing_changes_in_evaluation_mode(student, teacher, images):
    calls = []
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    student.eval()
    alone = student(images)
    with attach(student, teacher) as handle:
        attached = student(images)
    assert not calls and not handle.losses
    for before, after in zip(alone, attached, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("build", [retinanet, lambda: detector(small_spec())], ids=["retinanet", "faster r-cnn"])
def test_at_weight_zero_gradients_are_bit_for_bit_those_of_no_distillation(build, teacher, images, targets):
    student = build().train()
    student.backbone.eval()
    step(student, images, targets)
    alone = [parameter.grad for parameter in student.parameters()]
    teacher.backbone.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    with attach(student, teacher, loss_weight=0.0) as handle:
        losses = step(student, images, targets)
        assert losses["loss_pkd"].item() == 0 and losses["loss_pkd"].dtype == torch.float32
        assert handle.loss_weight == 0
    for before, parameter in zip(alone, student.parameters(), strict=True):
        assert before is parameter.grad is None or torch.equal(before, parameter.grad)


def test_the_weight_may_change_between_steps(student, teacher, images, targets):
    student.backbone.eval()
    with attach(student, teacher, loss_weight=2.0) as handle:
        first = step(student, images, targets)["loss_pkd"]
        handle.loss_weight = 5.0
        assert step(student, images, targets)["loss_pkd"].item() == pytest.approx(2.5 * first.item(), rel=1e-5)


def test_a_transform_of_torch_func_has_the_gradients_of_autograd():
    student, teacher = Necked(list), Necked(list, seed=1)
    x = torch.rand(2, 3, 32, 32)
    with attach(student, teacher, student_normalisation="same"):

        def total(parameters: dict[str, Tensor]) -> Tensor:
            return sum(torch.func.functional_call(student, parameters, (x,)).values())

        found = torch.func.grad(total)({name: each.detach() for name, each in student.named_parameters()})
        sum(student(x).values()).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_running_average_of_the_student_has_no_teacher(student, teacher, images, targets):
    with attach(student, teacher):
        average, restored = copy.deepcopy(student), pickle.loads(pickle.dumps(student))
        losses = step(student, images, targets)
        for own in (average, restored):
            assert step(own, images, targets).keys() == losses.keys() - {"loss_pkd"}
            assert torch.equal(own.backbone.body.conv1.weight, student.backbone.body.conv1.weight)


@pytest.mark.parametrize(
    ("kind", "strides"),
    [(tuple, [4, 8]), (list, [4, 8]), (lambda levels: {"p2": levels[0], "p3": levels[1]}, [4, 8]), (max_pooled, [4])],
    ids=["tuple", "list", "dict", "tensor"],
)
def test_a_neck_beside_the_backbone_is_found_and_the_teachers_heads_do_not_run(kind, strides):
    student, teacher, x, seen = Necked(kind), Necked(kind, seed=1), torch.randn(2, 3, 32, 48), []
    expected = pkd_loss(student.levels(x), teacher.levels(x), loss_weight=3.0)
    with attach(student, teacher, loss_weight=3.0) as handle:
        student.neck.register_forward_hook(lambda _, inputs, levels: seen.append(levels))
        losses = student(inputs=x, mode="loss")
    assert list(handle.losses) == strides and teacher.heads_ran == 0 and student.heads_ran == 1
    assert losses["loss_pkd"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert type(seen[0]) is type(student.neck(student.backbone(x)))


@pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by dynamo, where a graph ends
@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_student_is_distilled_all_the_same(compiled_first):
    student, teacher, x = Necked(tuple), Necked(tuple, seed=1), torch.randn(2, 3, 32, 48)
    torch.compiler.reset()
    with attach(student, teacher):
        expected = student(x)["loss_pkd"]
        wanted = torch.autograd.grad(expected, student.neck.parameters())
    compiled = torch.compile(student, backend="aot_eager") if compiled_first else student
    with attach(compiled, teacher) as handle:
        if not compiled_first:
            compiled = torch.compile(student, backend="aot_eager")
        loss = compiled(x)["loss_pkd"]
        assert list(handle.losses) == [4, 8] and teacher.heads_ran == 0
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student.neck.parameters()), wanted)


def test_a_neck_may_be_named(images, targets):
    student, teacher = retinanet().train(), retinanet(seed=1)
    calls = []
    teacher.backbone.body.register_forward_hook(lambda *_: calls.append("body"))
    with attach(student, teacher) as handle:
        whole = step(student, images, targets)["loss_pkd"].item()
    with attach(student, teacher, neck="backbone.fpn") as handle:
        inner = step(student, images, targets)["loss_pkd"].item()
        assert list(handle.losses) == [8, 16, 32, 64, 128]
    assert inner == pytest.approx(whole, rel=1e-4) and calls == ["body", "body"]
    with attach(student, teacher, neck="backbone.fpn", teacher_neck="backbone"):
        assert step(student, images, targets)["loss_pkd"].item() == pytest.approx(whole, rel=1e-4)


def test_a_missing_neck_is_named(student, teacher):
    bare = nn.Sequential(nn.Conv2d(3, 8, 1))
    with pytest.raises(InputError, match=r"student \(Sequential\) has no submodule neck or backbone; .* children: 0"):
        attach(bare, teacher)
    with pytest.raises(InputError, match=r"teacher \(Sequential\) has no submodule .* with teacher_neck"):
        attach(student, bare)
    with pytest.raises(InputError, match=r"student \(FasterRCNN\) has no submodule fpn; .*transform, backbone, rpn"):
        attach(student, teacher, neck="fpn")


def test_what_cannot_be_distilled_is_refused(student, teacher, images, targets):
    with pytest.raises(InputError, match=r"one and the same FasterRCNN; .*copy\.deepcopy"):
        attach(student, student)
    with pytest.raises(InputError, match=r"share the parameter .*copy\.deepcopy"):
        attach(student, copy.copy(student))
    handle = attach(student, teacher)
    with pytest.raises(InputError, match="already has a teacher attached; remove"):
        attach(student, teacher)
    handle.remove()
    with attach(student, PyramidDetector(16, {"a": 2}), neck="backbone", teacher_normalisation="same"):
        with pytest.raises(InputError, match=r"levels of stride \[4, 8, 16, 32\] and the teacher of stride \[2\]"):
            student(images, targets)
    pyramid, images = PyramidDetector(4, {"a": 4}), list(torch.rand(2, 3, 32, 32))
    with attach(pyramid, PyramidDetector(4, {"a": 4}, seed=1)):
        pyramid.forward = lambda images: pyramid.backbone(torch.stack(images))["a"]
        with pytest.raises(InputError, match=r"returned a Tensor in training mode, .* dict of losses"):
            pyramid(images)
        pyramid.forward = lambda images: pyramid.backbone(images)
        with pytest.raises(InputError, match=r"Pyramid was given a list, .* tensor \[N, 3, H, W\]"):
            pyramid(images)
    with pytest.raises(InputError, match="takes no option momentum; choose from level_weights"):
        attach(student, teacher, momentum=0.9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_holds_under_autocast_and_loss_scaling(dtype, student, teacher, images, targets):
    student.backbone.eval()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def autocast_step(scale: float) -> tuple[float, Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(0)
        student.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            losses = student(images, targets)
        scaler.scale(sum(losses.values())).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale, "no gradient overflowed"
        assert losses["loss_pkd"].dtype == torch.float32
        return losses["loss_pkd"].item(), torch.cat([parameter.grad.flatten() for parameter in parameters])

    with attach(student, teacher):
        exact = step(student, images, targets)["loss_pkd"].item()
        plain, gradient = autocast_step(1.0)
        scaled, unscaled = autocast_step(2.0**8)
    assert plain == scaled == pytest.approx(exact, rel=0.02)
    assert torch.cosine_similarity(unscaled, gradient, dim=0) > 0.9999


def test_needs_torch_alone():
    program = """
import sys
for name in ("torchvision", "pycocotools", "safetensors", "PIL", "matplotlib", "rich", "tyro", "numpy"):
    sys.modules[name] = None
import torch
from jdkd.distill import attach

class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Conv2d(3, 4, 4, 4)
    def forward(self, images):
        return {"loss": self.backbone(images).square().mean()}

student = Detector().train()
with attach(student, Detector()) as handle:
    student(torch.rand(2, 3, 16, 16))["loss"].backward()
print(list(handle.losses))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[4]"
