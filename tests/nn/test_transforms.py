"""Elastic models under torch.func, autocast, torch.export, CUDA graphs and distributed training."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from jdkd.errors import InputError
from jdkd.nn import ElasticBatchNorm2d, Subnet, export, set_subnet
from tests.nn.elastic_models import SMALL, images, randomised, supernet

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:DeprecationWarning")  # by jvp
LEADING = Subnet({"stream": 5, "stage.0.inner": 3}, {"stage.0.conv1": 3})
SUBNETS = {"leading": LEADING, "listed": Subnet(**SMALL)}
subnets = pytest.mark.parametrize("subnet", SUBNETS.values(), ids=SUBNETS)
STEPS = (*SUBNETS.values(), Subnet({"stream": 7}, depths={"stage": 1}), Subnet(depths={"stage": 2}))


def _functional(subnet: Subnet, training: bool = False):
    """A model of one subnet, its parameters, and the model as a function of these and of images."""
    net = supernet().train(training)
    set_subnet(net, subnet)
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    return net, parameters, lambda parameters, x: functional_call(net, parameters, (x,))


def _gradients(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the parameters, zero where one took no part."""
    net.zero_grad()
    net(x).square().sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in net.named_parameters()
    }


@subnets
def test_grad_of_a_functional_call_is_that_of_the_model(subnet):
    net, parameters, call = _functional(subnet)
    found = grad(lambda parameters: call(parameters, images()).square().sum())(parameters)
    torch.testing.assert_close(found, _gradients(net, images()))


@subnets
def test_vmap_runs_over_images_and_over_an_ensemble(subnet):
    _, parameters, call = _functional(subnet)
    several = torch.stack([images(), images() * 2, images() - 1])
    together = vmap(call, (None, 0))(parameters, several)
    torch.testing.assert_close(together, torch.stack([call(parameters, x) for x in several]), rtol=1e-4, atol=1e-4)
    ensemble = [parameters, {name: 1.1 * parameter for name, parameter in parameters.items()}]
    stacked = {name: torch.stack([member[name] for member in ensemble]) for name in parameters}
    together = vmap(call, (0, None))(stacked, images())
    each = torch.stack([call(member, images()) for member in ensemble])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-4)


def test_gradients_of_single_images_add_up():
    _, parameters, call = _functional(LEADING)

    def loss(parameters, x):
        return call(parameters, x).square().sum()

    each = vmap(grad(lambda parameters, x: loss(parameters, x[None])), (None, 0))(parameters, images())
    summed = {name: gradient.sum(0) for name, gradient in each.items()}
    torch.testing.assert_close(summed, grad(loss)(parameters, images()), rtol=1e-4, atol=1e-4)


@subnets
def test_jvp_over_images_is_the_derivative(subnet):
    net, parameters, call = _functional(subnet)
    parameters = {name: parameter.double() for name, parameter in parameters.items()}
    net.double()
    x, step = images().double(), 1e-6
    direction = torch.ones_like(x)
    _, tangent = jvp(lambda x: call(parameters, x), (x,), (direction,))
    difference = (call(parameters, x + step) - call(parameters, x - step)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-4, atol=1e-6)


def test_jvp_over_listed_weights_is_the_derivative():
    net, parameters, call = _functional(SUBNETS["listed"])
    parameters = {name: parameter.double() for name, parameter in parameters.items()}
    net.double()
    x, step = images().double(), 1e-6

    def shifted(by: float):
        return call({name: parameter * (1 + by) for name, parameter in parameters.items()}, x)

    _, tangent = jvp(lambda parameters: call(parameters, x), (parameters,), (parameters,))
    torch.testing.assert_close(tangent, (shifted(step) - shifted(-step)) / (2 * step), rtol=1e-4, atol=1e-6)


@subnets
def test_statistics_that_a_transform_cannot_write_are_refused_as_torchs_are(subnet):
    _, parameters, call = _functional(subnet, training=True)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        grad(lambda parameters: call(parameters, images()).square().sum())(parameters)


scatters = pytest.mark.filterwarnings("ignore:.*batching rule for aten..index_copy_:UserWarning")  # in gradients


@scatters
@subnets
def test_an_ensemble_in_training_moves_the_statistics_of_every_member(subnet):
    members = [supernet(seed).train() for seed in range(3)]
    for member in members:
        set_subnet(member, subnet)
    parameters, buffers = stack_module_state(members)
    x = images()
    together = vmap(lambda *state: functional_call(members[0], state, (x,)))(parameters, buffers)
    together.square().sum().backward()
    for i, member in enumerate(members):
        y = member(x)
        torch.testing.assert_close(together[i], y, rtol=1e-4, atol=1e-4)
        found = {name: value[i] for name, value in buffers.items()}
        torch.testing.assert_close(found, dict(member.named_buffers()), rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        for name, parameter in member.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameters[name].grad[i], parameter.grad, rtol=1e-3, atol=1e-3)


@scatters
@pytest.mark.parametrize("members_last", [False, True])
@pytest.mark.parametrize("name", [None, "mine"], ids=["shared", "own"])
def test_widths_of_an_ensemble_take_turns_before_one_backward(name, members_last):
    own = {"statistics": "own", "subnets": ["mine"]}
    norms = [randomised(ElasticBatchNorm2d(8, **own), seed).train() for seed in range(3)]
    _activate(norms, 8, name)
    parameters, buffers = stack_module_state(norms)
    if members_last:  # in memory
        buffers = {key: value.movedim(0, -1).contiguous().movedim(-1, 0) for key, value in buffers.items()}
    losses = [0.0, 0.0]
    for channels in (8, 5, [6, 1, 2], 8, 3):
        _activate(norms, channels, name)
        x = torch.randn(3, 2, norms[0].active_channels, 5, 5)
        together = vmap(lambda *args: functional_call(norms[0], args[:2], args[2:]))(parameters, buffers, x)
        each = torch.stack([norm(x[i]) for i, norm in enumerate(norms)])
        torch.testing.assert_close(together, each)
        losses = [loss + y.pow(3).sum() for loss, y in zip(losses, (together, each), strict=True)]
    sum(losses).backward()
    for i, norm in enumerate(norms):
        torch.testing.assert_close({key: value[i] for key, value in buffers.items()}, dict(norm.named_buffers()))
        for key, parameter in norm.named_parameters():
            torch.testing.assert_close(parameters[key].grad[i], parameter.grad, rtol=1e-4, atol=1e-4)


def _activate(norms: list[ElasticBatchNorm2d], channels, name: str | None) -> None:
    for norm in norms:
        norm.set_active(channels, name)


@subnets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_as_close_as_that_of_the_export(subnet, dtype):
    net = supernet()
    set_subnet(net, subnet)
    exact, plain = net(images()), export(net)
    with torch.autocast("cpu", dtype):
        y, other = net(images()), plain(images())
    assert y.dtype == other.dtype == dtype
    error, allowed = ((each.float() - exact).abs().max() for each in (y, other))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()
    y.float().square().sum().backward()
    found = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert found and all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found)


@subnets
def test_a_fixed_subnet_is_exported_by_torch(subnet):
    net = supernet()
    set_subnet(net, subnet)
    for model in (net, export(net)):
        program = torch.export.export(model, (images(),))
        torch.testing.assert_close(program.module()(images()), net(images()), rtol=1e-5, atol=1e-5)


def test_synchronised_normalisations_are_refused_by_name():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(supernet()))
    with pytest.raises(InputError, match="bn, of the groups stream, is a SyncBatchNorm; build it as an elastic layer"):
        set_subnet(net, LEADING)


@pytest.mark.gpu
@subnets
def test_a_fixed_subnet_is_captured_in_a_cuda_graph(subnet):
    net = supernet().cuda()
    set_subnet(net, subnet)
    x = images().cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _gradients(net, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    net.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        y = net(x)
        y.square().sum().backward()
    captured = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    x.copy_(2 * images())
    graph.replay()
    found = y.clone(), {name: gradient.clone() for name, gradient in captured.items()}
    expected = _gradients(net, x)
    torch.testing.assert_close(found[0], net(x))
    torch.testing.assert_close(found[1], {name: expected[name] for name in captured})
