"""Exported programs train as the modules do: what ``torch.export`` keeps has the gradient of what it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jdkd import functional
from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.nn import DISTLoss, PearsonTap, PKDLoss
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, packed_weights


class Step(nn.Module):
    """A layer, a head and a loss."""

    def __init__(self, loss: nn.Module, *options: Tensor) -> None:
        super().__init__()
        self.layer, self.head, self.loss, self.options = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), loss, options

    def forward(self, x: Tensor, teacher: Tensor) -> Tensor:
        features = self.layer(x)
        if isinstance(self.loss, DISTLoss):
            return self.loss(features.mean((2, 3)), teacher.mean((2, 3)))
        found = self.loss([features], [teacher], *self.options)
        if isinstance(self.loss, PearsonTap):
            (features,), found = found
        return found + self.head(features).square().mean()


def gradients(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    module(*inputs).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


def assert_trains_alike(module: nn.Module, program: torch.export.ExportedProgram, *inputs: Tensor) -> None:
    expected, found = gradients(module, *inputs), gradients(program.module(), *inputs)
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


MASK = torch.ones(2, 6, 6, dtype=torch.bool).tril()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, in run_decompositions
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "step",
    [
        lambda: Step(PKDLoss(6.0)),
        lambda: Step(PKDLoss(statistics="instance"), MASK),
        lambda: Step(PearsonTap(zero_variance="skip")),
        lambda: Step(DISTLoss()),
    ],
    ids=["loss", "instance, masked", "tap", "dist"],
)
def test_a_loss_keeps_its_gradient(step, strict):
    torch.manual_seed(0)
    module, inputs = step(), (torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 6))
    program = torch.export.export(module, inputs, strict=strict)
    assert_trains_alike(module, program, *inputs)
    assert_trains_alike(module, program.run_decompositions(), *inputs)


def test_teachers_and_mixed_dtypes_have_gradients_too():
    class Both(nn.Module):
        def forward(self, student, teacher):
            return PKDLoss()(student, teacher)

    student, teacher = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(2, 3, 5, 5)
    program = torch.export.export(Both(), (student, teacher)).module()
    student.requires_grad_(), teacher.requires_grad_()
    found, expected = (torch.autograd.grad(run(student, teacher), (student, teacher)) for run in (program, Both()))
    assert [gradient.dtype for gradient in found] == [torch.float64, torch.float32]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


CONVOLUTIONS = {
    "leading": lambda x, w: functional.elastic_conv2d(x, w, in_channels=4, out_channels=5),
    "listed": lambda x, w: functional.elastic_conv2d(x, w, in_channels=[0, 2, 3, 5], out_channels=[1, 7, 0]),
    "pointwise": lambda x, w: functional.elastic_pointwise_conv2d(
        x, w[:, :, :1, :1], out_channels=5, shift=torch.ones(5), activation="relu"
    ),
    "statistics": lambda x, w: torch.cat(functional.elastic_pointwise_conv2d_stats(x, w[:, :, :1, :1])[1:]),
    "levels": lambda x, w: torch.cat(
        [y.flatten() for y in functional.elastic_conv2d_levels([x, x[..., :3]], w, in_channels=4, out_channels=[7, 0])]
    ),
    "packed": lambda x, w: torch.conv2d(x, packed_weights([w], [Part(Channels(5), Channels(4))], torch.float32)[0]),
}


class Layer(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.weight, self.run = nn.Parameter(torch.randn(8, 6, 3, 3)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_elastic_convolution_keeps_its_gradient(name, strict):
    torch.manual_seed(0)
    layer, x = Layer(CONVOLUTIONS[name]), torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    assert_trains_alike(layer, torch.export.export(layer, (x,), strict=strict), x)


def test_a_kernel_that_is_asked_for_is_exported_as_aten():
    layer, x = Layer(CONVOLUTIONS["leading"]), torch.randn(2, 4, 5, 5)
    with use_backend("triton"):
        program = torch.export.export(layer, (x,))
    assert "jdkd" not in str(program.graph)
    assert_trains_alike(layer, program, x)


def test_gradients_in_place_are_refused():
    def run(x, w):
        return torch.conv2d(x, packed_weights([w], [Part(Channels(5), Channels(4))], torch.float32, "main_grad")[0])

    with pytest.raises(InputError, match=r"torch\.export and torch\.func do not allow; use 'autograd'"):
        torch.export.export(Layer(run), (torch.randn(2, 4, 5, 5),), strict=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["listed", "packed"])
def test_a_traced_script_keeps_its_gradient_too(name):
    torch.manual_seed(0)
    step, inputs = Step(PKDLoss(6.0)), (torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 6))
    layer, x = Layer(CONVOLUTIONS[name]), torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    for module, given in ((step, inputs), (layer, (x,))):
        expected, found = gradients(module, *given), gradients(torch.jit.trace(module, given), *given)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
