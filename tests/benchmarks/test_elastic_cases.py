"""The cases of the elastic layers: they are what the project's detectors run, and what is timed agrees."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import conv_shapes, goals, harness
from benchmarks.cases import elastic_conv, elastic_levels, elastic_pointwise, pack, subnet_change, supernet_step
from benchmarks.cost import host_seconds
from benchmarks.graphs import Graphs

SMALL = (5, 6)  # what stands for the images of the cases, in pixels


@pytest.fixture
def small(monkeypatch):
    """Every shape on a small image."""
    shapes = {label: dataclasses.replace(shape, size=SMALL) for label, shape in conv_shapes.distinct().items()}
    for case in (elastic_conv, elastic_pointwise):
        monkeypatch.setattr(case, "distinct", lambda: shapes)


def assert_agree(case, *left_out):
    torch.manual_seed(0)
    inputs = case.make()
    assert harness._nbytes(inputs) > 0
    exact = case.exact(inputs)
    for name, provider in case.providers.items():
        if name not in left_out:
            harness.check_agreement(case, name, provider(inputs), exact)
            if case.restore:  # what was added to starts again
                case.restore(inputs)
                harness.check_agreement(case, name, provider(inputs), exact)


def test_shapes_are_those_of_the_detectors():
    shapes = dict(conv_shapes.distinct())
    places = {call.shape for name in conv_shapes.BACKBONES for call in conv_shapes.calls(name)}
    p7 = shapes.pop(conv_shapes.P7)
    assert p7.size == (7, 11) and dataclasses.replace(p7, size=shapes[conv_shapes.P6].size) in places
    assert len(shapes) == 42 and set(shapes.values()) == places, "two shapes under one label"
    assert [len(conv_shapes.calls(name)) for name in conv_shapes.BACKBONES] == [76, 127]
    p3 = shapes[elastic_conv.P3]
    assert (p3.in_channels, p3.out_channels, p3.kernel, p3.size, p3.bias) == (256, 256, 3, (100, 168), True)


def test_the_image_and_the_predictions_stay_whole():
    whole = {label for label, shape in conv_shapes.distinct().items() if not all(shape.elastic)}
    predictions = {f"P{level} rpn 1x1 256->{channels}" for level in range(2, 7) for channels in (3, 12)}
    assert whole == {"stem 7x7 3->64 /2", *predictions}
    assert conv_shapes.distinct()["P6 rpn 1x1 256->12"].active(0.25) == (64, 12)


def test_all_cases_are_every_shape_batch_width_choice_and_mode():
    found = [(case.label, case.mode) for case in elastic_conv.cases("cpu", full=True)]
    choices = [f"x{width}{listed}" for width in ("0.75", "0.5", "0.25") for listed in ("", " listed")]
    expected = itertools.product(conv_shapes.distinct(), ["x1", *choices], (1, 2, 8), elastic_conv.MODES)
    assert sorted(found) == sorted((f"{label} {choice} N={images}", mode) for label, choice, images, mode in expected)
    assert len(found) == 43 * 7 * 3 * 2


@pytest.mark.parametrize("mode", elastic_conv.MODES)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("label", ["P6 rpn 3x3 256->256", "stem 7x7 3->64 /2", "P5 rpn 1x1 256->3"])
def test_convolutions_agree(label, listed, mode, small):
    assert_agree(elastic_conv.case(label, 0.5, listed, torch.float32, mode, "cpu"))
    assert_agree(elastic_conv.case(label, 1.0, False, torch.bfloat16, mode, "cpu"))


def test_the_graphs_of_torch_compile_are_counted(small, monkeypatch):
    graphs = []
    monkeypatch.setattr(Graphs, "compile", lambda _, graph, inputs: graphs.append(graph) or graph)
    case = elastic_conv.case("P6 rpn 3x3 256->256", 0.5, False, torch.float32, "forward", "cpu", compiled=True)
    assert case.providers["torch.compile"].note is None
    assert_agree(case)
    assert case.providers["torch.compile"].note == f"{len(graphs)} graphs compiled for 4 widths"
    assert len(graphs) > 1, "widths are sizes of the weight, and another size is another graph"


@pytest.mark.parametrize("mode", elastic_levels.MODES)
def test_convolutions_of_all_levels_agree(mode, monkeypatch):
    levels = [dataclasses.replace(shape, size=SMALL) for shape in elastic_levels.head()]
    assert [shape.size[0] for shape in elastic_levels.head()] == [200, 100, 50, 25, 13, 7]
    monkeypatch.setattr(elastic_levels, "head", lambda: levels)
    for pyramid in elastic_levels.PYRAMIDS:
        assert_agree(elastic_levels.case(pyramid, 0.5, torch.float32, mode, "cpu"))


@pytest.mark.parametrize("layout", pack.LAYOUTS)
def test_packed_weights_and_gradients_agree(layout, monkeypatch):
    few = conv_shapes.backbone("resnet50")[:8]
    monkeypatch.setattr(pack, "backbone", lambda name: few)
    for mode in ("forward", "first forward+backward", "forward+backward", "unpack"):
        assert_agree(pack.case(0.5, torch.float32, layout, mode, "cpu"))
    assert_agree(pack.case(0.25, torch.bfloat16, layout, "forward+backward", "cpu", listed=True))


def test_weight_handling_is_that_of_all_convolutions_of_the_backbone():
    shapes = conv_shapes.backbone("resnet50")
    assert len(shapes) == 53 and sum(s.in_channels * s.out_channels * s.kernel**2 for s in shapes) == 23_454_912
    name, count = pack.NETWORKS["37.9M of ResNet-101"]
    shapes = conv_shapes.backbone(name)[:count]
    assert sum(s.in_channels * s.out_channels * s.kernel**2 for s in shapes) == 37_938_368


@pytest.mark.parametrize("mode", elastic_pointwise.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_and_several_agree(mode, dtype, small):
    assert_agree(elastic_pointwise.case(elastic_pointwise.LAYERS[1], 0.5, dtype, mode, "cpu"), "torch.compile")


@pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning")  # by dynamo
def test_changes_of_subnet_are_counted(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(Graphs, "compile", lambda _, graph, inputs: graph)
    monkeypatch.setattr(subnet_change, "CHANGES", 2)
    case = subnet_change.case(supernet_step.R18, (32, 32), torch.float32, "cpu", width=0.125)
    assert_agree(case)
    counts = {name: provider.counts for name, provider in case.providers.items()}
    assert case.providers["jdkd torch.compile"].graphs.count > 0
    nothing = {"graphs_compiled": 0}
    assert counts == {"slice_contiguous": None, **dict.fromkeys(("jdkd", "jdkd packed", "jdkd torch.compile"), nothing)}


def test_kernels_that_triton_compiles_are_counted():
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook
    with subnet_change.kernels_compiled() as kernels:
        knobs.runtime.jit_post_compile_hook(key="", repr="conv", already_compiled=False)
    assert kernels == ["conv"] and knobs.runtime.jit_post_compile_hook is before


def test_subnets_are_the_whole_one_and_others_of_leading_and_listed_channels():
    whole, *others = subnet_change.subnets(supernet_step.Network(supernet_step.R18))
    assert sorted(count for _, count in whole.channels) == [64, 64, 128, 128, 256, 256, 512, 512]
    assert len(others) == 1 + subnet_change.CHANGES and len({subnet.id for subnet in others}) == len(others)
    listed = [any(not isinstance(channels, int) for _, channels in subnet.channels) for subnet in others]
    assert listed[0] and {False, True} == set(listed[1:]) and not any(listed[1::2])


@pytest.fixture(scope="module")
def training_step():
    case = supernet_step.case(supernet_step.R18, (32, 32), torch.float32, "cpu", width=0.125)
    torch.manual_seed(0)
    return case, case.make()


def test_the_gradients_of_a_training_step_agree(training_step):
    case, inputs = training_step
    exact = case.exact(inputs)
    for name, provider in case.providers.items():
        found = [output.clone() for output in provider(inputs)]
        harness.check_agreement(case, name, found, exact)
        assert all(map(torch.equal, found, provider(inputs))), "a call starts from other weights than the last"


def test_a_step_trains_four_subnets_of_their_own(training_step):
    case, inputs = training_step
    losses = case.exact(inputs)[: len(supernet_step.SUBNETS)]
    assert len({loss.item() for loss in losses}) == len(losses) == 4
    weights = [*inputs.nets["jdkd"].model.parameters()]
    assert len(case.exact(inputs)) == 4 + len(weights)


def test_the_inputs_of_a_training_step_are_weighed(training_step):
    _, inputs = training_step
    nets = [[*net.model.parameters(), *net.model.buffers()] for net in inputs.nets.values()]
    weights = sum(tensor.nbytes for net in nets for tensor in net)
    momenta = sum(parameter.nbytes for net in inputs.nets.values() for parameter in net.model.parameters())
    assert harness._nbytes(inputs) == inputs.images.nbytes + weights + momenta


def test_a_layer_that_ignored_its_width_would_be_seen(training_step, monkeypatch):
    case, inputs = training_step
    exact = case.exact(inputs)
    net = inputs.nets["jdkd"]
    wrong = dataclasses.replace(net, activate=lambda number: net.activate(0))
    monkeypatch.setitem(inputs.nets, "jdkd", wrong)
    with pytest.raises(harness.Disagreement):
        harness.check_agreement(case, "jdkd", case.providers["jdkd"](inputs), exact)


@pytest.mark.parametrize(
    "module", [elastic_conv, elastic_levels, pack, elastic_pointwise, supernet_step, subnet_change], ids=str
)
def test_every_goal_is_a_case_that_runs_unasked(module):
    found = {device: [*module.cases(device)] for device in goals.DEVICES}
    for given in goals.GOALS[module.NAME]:
        for goal in given.goals() if isinstance(given, goals.Overall) else [given]:
            fits = [
                case
                for case in found[goal.device]
                if (case.label, case.mode, str(case.dtype)[6:], case.layout)
                == (goal.case, goal.mode, goal.dtype, goal.layout)
            ]
            assert len(fits) == 1 and {goal.ours, getattr(goal, "theirs", goal.ours)} <= set(fits[0].providers), goal


def test_every_kernel_has_goals_on_a_gpu():
    asked = {op for op, found in goals.GOALS.items() if any(goal.device == "cuda" for goal in found)}
    assert asked == {path.stem for path in Path(pack.__file__).parent.glob("[a-z]*.py")}


def test_the_first_rows_of_a_cpu_are_the_goals_of_the_convolution():
    labels = [case.label for case, _ in zip(elastic_conv.cases("cpu"), range(2), strict=False)]
    assert labels == [goal.case for goal in goals.GOALS["elastic_conv"] if goal.device == "cpu"]


def test_what_waits_is_called_anew_for_every_round():
    asked = []

    def provider(given):
        asked.append(given)
        return [torch.full((1,), float(len(asked)))]

    calls, outputs = harness._called(provider, [1, 2])
    outputs[0][0].fill_(float("nan"))
    calls.replay()
    assert asked == [1, 2, 1, 2] and [found.item() for (found,) in outputs] == [3, 4]


def test_host_time_stops_when_its_seconds_are_over():
    asked = []
    host_seconds(lambda given: asked.append(given), 0, "cpu", calls=100, seconds=0)
    assert len(asked) == 1
