"""What is public is this list: what is taken off it breaks somebody's program, and is said in the CHANGELOG."""

import importlib
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import jdkd
from tests import public_use

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    "data": "CocoDetectionDataset Split batches in_order read_image resolve_split resolve_splits write_digit_scenes",
    "detect": (
        "FAMILIES LoadReport adapt_classes adopt detector fix_roi_scales frozen_like import_detector load "
        "load_weights narrowed open_model parameter_count read remake_predictors resized save swap_features swapped "
        "weights_file with_frozen_norms with_norms"
    ),
    "distill": (
        "DistillConfig DistillationHandle Distilled Distiller FeatureDistiller HeadDistiller Normalisation attach "
        "can_distil_heads comparable correlations distill explained pyramids"
    ),
    "errors": "InputError ModelError",
    "export": "Exported exported open_exported",
    "functional": (
        "dist_loss elastic_conv2d elastic_conv2d_levels elastic_pointwise_conv2d elastic_pointwise_conv2d_stats "
        "pearson_tap pkd_loss"
    ),
    "graph": "BlockList ChannelGroup Declaration Frozen Slot Topology report trace",
    "latency": (
        "Cost Grid Latency LatencyReport LatencyTable ModelLatency QUICK REPORTED Ratio Schedule StageProfile "
        "Work bootstrap_ratio fuse_for_inference measure measure_grid measure_quick measure_table percentile "
        "profile_cost profile_stages"
    ),
    "morph": (
        "Morph add_block can_shorten change_regions change_resolution channel_importance cut_to grow rearrange "
        "remove_block repair shorten"
    ),
    "nn": (
        "ChannelSlot DISTLoss ElasticBatchNorm2d ElasticBlock ElasticConv2d ElasticFrozenBatchNorm2d "
        "ElasticGroupNorm ElasticGroups ElasticLinear PKDLoss PearsonTap Subnet as_elastic as_elastic_block "
        "as_plain checkpoint export set_subnet"
    ),
    "notices": "Notice",
    "patch": "Acceleration Difference FusedPKDLoss INGREDIENTS TOLERANCE Trial accelerate openmmlab restore",
    "pool": (
        "CALIBRATION_BATCHES PHASES Phase PoolTrainConfig ScoredTeacher Space Spread Subnet Supernet Teacher "
        "TeacherPool calibrate grow_base load_pool measure_spread read_phases save_pool teacher_from_json "
        "teacher_to_json train_pool"
    ),
    "report": "Mirrors Outcome read_outcome result_table summary verdict write_report",
    "rewrite": (
        "Architecture Rewrite arrange build describe elastic_groups load_architecture make_elastic make_plain "
        "mask prune save_architecture verify widen"
    ),
    "search": "Archive Candidate Cycle Method Plan Proposal SearchConfig pareto_front plan search",
    "train": "DivergenceError FitReport Scores TrainConfig calibrate_bn evaluate fit",
}
NAMES = [(package, name) for package, names in PUBLIC.items() for name in names.split()]


def public(package: str, name: str) -> object:
    return getattr(importlib.import_module(f"jdkd.{package}"), name)


def functions_of(thing: object) -> list:
    """A function, or what a class is built by and its public methods."""
    if inspect.isfunction(thing):
        return [thing]
    members = vars(thing).items() if inspect.isclass(thing) and thing.__module__.startswith("jdkd") else ()
    found = [member for name, member in members if not name.startswith("_") or name in ("__init__", "__call__")]
    found = [member.fget if isinstance(member, property) else getattr(member, "__func__", member) for member in found]
    return [each for each in found if inspect.isfunction(each) and each.__module__.startswith("jdkd")]


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_gives_what_the_list_says(package):
    module = importlib.import_module(f"jdkd.{package}")
    assert sorted(getattr(module, "__all__", PUBLIC[package].split())) == sorted(PUBLIC[package].split())
    assert getattr(jdkd, package) is module and module.__doc__
    assert all(hasattr(module, name) for name in PUBLIC[package].split())


def test_what_is_public_says_what_it_is_and_of_what_types():
    assert len(NAMES) > 150
    for package, name in NAMES:
        thing = public(package, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), f"{package}.{name} has no docstring"
        for function in functions_of(thing):
            signature = inspect.signature(function)
            told = [each.annotation for key, each in signature.parameters.items() if key not in ("self", "cls")]
            told += [signature.return_annotation] * (function.__name__ != "__init__")
            assert inspect.Parameter.empty not in told, f"{package}.{name}: {function.__qualname__} lacks a type"


def test_the_site_documents_just_these_packages():
    documented = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(f"jdkd.{package}" for package in PUBLIC)


def test_mypy_checks_every_module_that_defines_what_is_public():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    (checked,) = ({*each["module"]} for each in told if isinstance(each["module"], list))
    defining = {getattr(public(*each), "__module__", None) for each in NAMES} | {f"jdkd.{name}" for name in PUBLIC}
    defining = {name for name in defining if name and name.startswith("jdkd")}
    assert all(importlib.util.find_spec(name) for name in checked), "a module that is no more"
    assert defining <= checked, sorted(defining - checked)


def test_a_program_that_uses_what_is_public_runs():
    """mypy reads the same program, strictly; so it takes the package's types from the marker."""
    assert (ROOT / "jdkd" / "py.typed").read_text() == ""
    public_use.main()
