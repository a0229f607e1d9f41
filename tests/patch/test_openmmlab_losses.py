"""jdkd.patch against registries that behave as OpenMMLab's do."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch

from jdkd.errors import InputError
from jdkd.functional import pkd_loss
from tests.openmmlab import installed

Install = Callable[..., ModuleType]


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Install]:
    """Puts stubs of the named packages on the path, and imports jdkd.patch."""
    with ExitStack() as stack:

        def install(*packages: str) -> ModuleType:
            stack.enter_context(installed(tmp_path, *packages))
            return importlib.import_module("jdkd.patch")

        yield install


def models(package: str) -> object:
    return importlib.import_module(f"{package}.registry").MODELS


def test_importing_it_is_enough_for_a_config(install):
    install("mmengine", "mmrazor")
    for package in ("mmengine", "mmrazor"):
        loss = models(package).build({"type": "FusedPKDLoss", "loss_weight": 6, "resize_stu": False})
        assert isinstance(loss, torch.nn.Module) and (loss.loss_weight, loss.resize_stu) == (6, False)
    importlib.import_module("mmrazor.models")
    assert models("mmrazor").get("PKDLoss").theirs, "nothing of theirs is overwritten unasked"


def test_is_called_by_their_names_and_gives_the_pearson_loss(install):
    loss = install("mmengine").FusedPKDLoss(loss_weight=2.0)
    parameters = inspect.signature(loss.forward).parameters
    assert list(parameters)[:2] == ["preds_S", "preds_T"], "mmrazor looks the names up in the signature"
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    expected = 2 * pkd_loss(student, teacher)
    assert loss(preds_S=student, preds_T=teacher) == loss(student, teacher) == expected
    assert loss([student, teacher], (student, teacher)) < 1e-5
    assert inspect.signature(type(loss)).parameters["loss_weight"].default == 1.0
    assert inspect.signature(type(loss)).parameters["resize_stu"].default is True


def test_takes_the_place_of_theirs_when_asked_to(install):
    patch = install("mmengine", "mmrazor")
    assert patch.openmmlab(force=True) is patch.FusedPKDLoss
    importlib.import_module("mmrazor.models")
    assert models("mmrazor").get("PKDLoss") is patch.FusedPKDLoss
    assert models("mmengine").get("PKDLoss") is None
    assert patch.openmmlab(force=True) is patch.openmmlab(), "again changes nothing"


def test_takes_the_place_of_theirs_in_another_registry(install):
    patch = install("mmengine")
    patch.openmmlab(force=True, registry=models("mmengine"))
    assert models("mmengine").get("PKDLoss") is patch.FusedPKDLoss


def test_a_name_that_another_class_has_is_left_to_it(install):
    patch = install("mmengine")
    models("mmengine").module_dict["FusedPKDLoss"] = dict
    with pytest.raises(KeyError, match="FusedPKDLoss is already registered"):
        patch.openmmlab()


def test_without_the_frameworks_the_import_works_and_the_call_says_what_is_missing(install):
    patch = install()
    with pytest.raises(InputError, match=r"mmengine\.registry cannot be imported .*; install it"):
        patch.openmmlab()


def test_without_mmrazor_there_is_nothing_to_replace(install):
    patch = install("mmengine")
    with pytest.raises(InputError, match=r"mmrazor\.registry cannot be imported .* or give the registry"):
        patch.openmmlab(force=True)
