"""The cases of the Pearson loss: what is timed computes the loss, and the figures beside the time are what they say."""

import itertools

import pytest
import torch

from benchmarks import harness, host
from benchmarks.cases import pearson
from benchmarks.cost import cost
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.reference import pearson as reference

SIZE = ("P6", 2)


def case_with_ours(mode, dtype=torch.float32, layout="NCHW"):
    """A case whose own forms run on the reference backend, which is everywhere."""
    case = pearson.case(*SIZE, dtype, layout, mode, "cpu")
    tapped = mode == "tap"
    step = pearson.step(pearson_tap if tapped else pkd_loss, pearson.LOSS_SCALES.get(dtype, 1.0), tapped)
    return case, {**case.providers, "jdkd reference": pearson.on_backend("reference", step)}


@pytest.mark.parametrize("mode", pearson.MODES)
@pytest.mark.parametrize("dtype", pearson.DTYPES, ids=str)
@pytest.mark.parametrize("layout", pearson.LAYOUTS)
def test_all_providers_agree(mode, dtype, layout):
    torch.manual_seed(0)
    case, providers = case_with_ours(mode, dtype, layout)
    inputs = case.make()
    assert harness._nbytes(inputs) > 0
    for name, provider in providers.items():
        harness.check_agreement(case, name, provider(inputs), case.exact(inputs))


@pytest.mark.parametrize("provider", ["eager", "jdkd reference"])
def test_the_tap_adds_the_gradients_of_loss_and_heads(provider):
    case, providers = case_with_ours("tap")
    inputs = case.make()
    _, *sums = providers[provider](inputs)
    without = inputs._replace(heads=[])
    _, *own = pearson.step(reference.pkd_loss)(without)
    for both, loss, head in zip(sums, own, inputs.heads, strict=True):
        torch.testing.assert_close(both, loss + head, rtol=1e-4, atol=1e-9)
        assert 0.2 < head.norm() / loss.norm() < 5, "an error in either must show in the sum"


def test_the_backward_runs_on_the_backend_that_is_timed(monkeypatch):
    from jdkd.ops import pearson as op

    def refuse(*given):
        raise AssertionError("another backend was picked")

    monkeypatch.setattr(op, "_BACKWARD", {**dict.fromkeys(op._BACKWARD, refuse), "reference": reference.pearson_bwd})
    case, providers = case_with_ours("tap")
    assert providers["jdkd reference"](case.make())


def test_least_bytes_count_the_passes_of_a_mode():
    level = 2 * pearson.CHANNELS * 13 * 21 * 2  # bytes of one side
    passes = {
        mode: pearson.case(*SIZE, torch.bfloat16, "NCHW", mode, "cpu").least_bytes / level for mode in pearson.MODES
    }
    assert passes == {"forward": 2, "forward+backward": 3, "tap": 6}


def test_eager_keeps_four_features_for_the_backward_and_ours_a_table():
    case, providers = case_with_ours("forward+backward")
    inputs = case.make()
    feature = inputs.students[0].nbytes
    kept = {}
    for name in ("eager", "jdkd reference"):
        providers[name](inputs)
        kept[name] = cost(providers[name], inputs, "cpu").kept_bytes / feature
    assert kept["eager"] == pytest.approx(4, rel=0.05) and kept["jdkd reference"] < 0.1


def test_every_goal_has_a_case_that_a_gpu_check_runs(monkeypatch):
    monkeypatch.setattr(pearson, "compiled", lambda autotuned=False: {})
    labels = [str(case) for case in pearson.cases("cuda")]
    for wanted in ("N=16 bfloat16 NCHW forward", "N=16 bfloat16 NCHW forward+backward", "N=16 bfloat16 NCHW tap"):
        assert f"pearson P3-P7 {wanted}" in labels[:5]
    assert "pearson P3-P7 N=2 bfloat16 NCHW forward+backward" in labels[:5]
    assert len(labels) < 16, "they must fit two minutes"


def test_all_cases_are_every_size_batch_dtype_layout_and_mode(monkeypatch):
    monkeypatch.setattr(pearson, "compiled", lambda autotuned=False: {})
    names = (*pearson.SIZES, *pearson.PYRAMIDS)
    found = {str(case) for case in pearson.cases("cpu", full=True)}
    expected = itertools.product(names, ("float32", "bfloat16", "float16"), pearson.LAYOUTS, pearson.MODES)
    assert {f"pearson {name} N=1 {dtype} {layout} {mode}" for name, dtype, layout, mode in expected} <= found


def test_host_time_of_every_layer_is_measured():
    found = host.measure("reference", "cpu", rounds=2)
    assert list(found) == list(host.layers("reference"))
    assert min(microseconds for both in found.values() for microseconds in both) > 0


def test_the_undispatched_layers_pass_no_operator_and_leave_them_as_they_were():
    before = torch.ops.jdkd.pearson_fwd
    with host.undispatched("reference"):
        assert torch.ops.jdkd.pearson_fwd is reference.pearson_fwd
        assert torch.ops.jdkd.pearson_bwd is reference.pearson_bwd
    assert torch.ops.jdkd.pearson_fwd is before
