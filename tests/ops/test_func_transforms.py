"""The operators under ``torch.func`` and forward-mode differentiation: the numbers of plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from jdkd import functional
from jdkd.errors import InputError
from jdkd.nn import PearsonTap
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, packed_weights
from jdkd.ops.pearson import Settings
from jdkd.ops.pearson_loss import _compared_now
from jdkd.reference import pearson as reference

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch's forward mode
torch.manual_seed(0)
LEVEL, OTHER, IMAGE, WEIGHT = (torch.randn(size) for size in ((2, 4, 5, 5), (2, 4, 5, 5), (2, 4, 5, 5), (8, 6, 3, 3)))
MASK = torch.ones(2, 5, 5, dtype=torch.bool).tril()
ROWS = Channels(3, torch.tensor([1, 7, 0]))


def tapped(student: Tensor) -> Tensor:
    (features,), loss = PearsonTap()([student], [OTHER])
    return loss + features.square().mean()


CALLS = {
    "loss": (lambda a: functional.pkd_loss(a, OTHER, 6.0), LEVEL),
    "teacher": (lambda a: functional.pkd_loss(LEVEL, a, statistics="instance"), OTHER),
    "masked": (lambda a: functional.pkd_loss(a, OTHER, mask=MASK, zero_variance="skip"), LEVEL),
    "tap": (tapped, LEVEL),
    "dist": (lambda a: functional.dist_loss(a.mean((2, 3)), OTHER.mean((2, 3))), LEVEL),
    "leading": (lambda a: functional.elastic_conv2d(IMAGE, a, in_channels=4, out_channels=5).square().mean(), WEIGHT),
    "listed": (
        lambda a: functional.elastic_conv2d(IMAGE, a, in_channels=[0, 2, 3, 5], out_channels=[7, 0]).square().mean(),
        WEIGHT,
    ),
    "pointwise": (
        lambda a: functional.elastic_pointwise_conv2d(IMAGE, a[:, :, 0, 0], out_channels=5).square().mean(), WEIGHT
    ),
    "statistics": (lambda a: functional.elastic_pointwise_conv2d_stats(IMAGE, a[:, :, 0, 0])[2].sum(), WEIGHT),
    "levels": (
        lambda a: functional.elastic_conv2d_levels([IMAGE], a, in_channels=4, out_channels=[7, 0])[0].square().mean(),
        WEIGHT,
    ),
    "packed": (lambda a: packed_weights([a], [Part(ROWS, Channels(4))], torch.float32)[0].square().mean(), WEIGHT),
}  # fmt: skip


def gradient(run, at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(run(at), at)[0]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_transforms_give_what_autograd_gives(name):
    run, at = CALLS[name]
    expected, direction = gradient(run, at), at.roll(1, -1)
    close(grad(run)(at), expected)
    close(jacrev(run)(at), expected)
    slope = (expected * direction).sum()
    close(jvp(run, (at,), (direction,))[1], slope)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(run(forward_ad.make_dual(at, direction))).tangent, slope)
    batch = torch.stack([at, at - 2 * direction])
    close(vmap(run)(batch), torch.stack([run(one) for one in batch]))
    close(vmap(grad(run))(batch), torch.stack([gradient(run, one) for one in batch]))


def test_a_hessian_is_that_of_the_published_formula():
    small, other = LEVEL[:1, :2, :2, :2].double(), OTHER[:1, :2, :2, :2].double()
    ours = hessian(lambda a: functional.pkd_loss(a, other))(small)
    torch.testing.assert_close(ours, hessian(lambda a: reference.pkd_loss([a], [other]))(small))


@pytest.mark.parametrize("options", [{}, {"instance": True}, {"skip_constant": True}, {"masked": True}], ids=str)
def test_the_plain_loss_is_the_closed_form(options):
    masks = [MASK[:, None]] if (options := dict(options)).pop("masked", False) else []
    student, teacher = LEVEL.clone(), OTHER.clone()
    student[:, 1] = 0.5  # a constant channel
    settings = Settings((2.0,), **options)
    found = []
    for run in (
        lambda s, t: _compared_now([s], [t], settings, masks)[0],
        lambda s, t: reference.plain_loss([s], [t], *settings[:4], masks)[0],
    ):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = run(s, t)
        found.append((loss, *torch.autograd.grad(loss, (s, t))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())


def test_what_no_transform_can_follow_is_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"group is a process group, which torch\.export and torch\.func cannot"):
        grad(lambda a: _compared_now([a], [OTHER], Settings((1.0,), group=object()))[0])(LEVEL)
    with pytest.raises(InputError, match=r"grad_mode='main_grad' adds to weight\.grad itself"):
        grad(lambda a: packed_weights([a], [Part(ROWS, None)], torch.float32, "main_grad")[0].sum())(WEIGHT)
