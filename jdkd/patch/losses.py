"""The losses under the names by which other training frameworks look theirs up.

Importing ``jdkd.patch`` registers :class:`FusedPKDLoss` with OpenMMLab where mmengine is installed, so that one line of
a config is enough::

    custom_imports = dict(imports=["jdkd.patch"])
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jdkd.errors import InputError
from jdkd.nn import PKDLoss
from jdkd.reference.pearson import Features

PUBLIC_NAME = "PKDLoss"  # mmrazor's class


class FusedPKDLoss(PKDLoss):
    """:class:`jdkd.nn.PKDLoss` as configs of mmrazor call it; built as their ``PKDLoss(loss_weight, resize_stu)``.

    The numbers are theirs too, save that levels which do not pair up are an error instead of left out.
    """

    def forward(  # type: ignore[override]  # by the names that configs call it with
        self, preds_S: Features, preds_T: Features, mask: Tensor | Sequence[Tensor] | None = None
    ) -> Any:
        """See :func:`jdkd.functional.pkd_loss`."""
        return super().forward(preds_S, preds_T, mask)


def openmmlab(*, force: bool = False, registry: Any = None) -> type[FusedPKDLoss]:
    """Registers the loss as ``FusedPKDLoss``, and if asked in place of the public ``PKDLoss``.

    The name of its own goes into mmengine's ``MODELS``, where every OpenMMLab project looks in the end:
    ``type="FusedPKDLoss"``, without a scope. May be called again. Both projects: https://github.com/open-mmlab.

    Args:
        force: let configs that say ``type="PKDLoss"`` get this loss.
        registry: the ``MODELS`` registry in which ``force`` replaces the name; by default mmrazor's. Its own
            modules are imported first, as they would refuse to register a name that is taken.

    Returns:
        The registered class.

    Raises:
        InputError: mmengine, or the registry whose name would be replaced, cannot be imported.
    """
    _register(_models_of("mmengine", "install it"), FusedPKDLoss.__name__)
    if force:
        if registry is None:
            registry = _models_of("mmrazor", f"install it, or give the registry whose {PUBLIC_NAME} is meant")
        registry.import_from_location()
        _register(registry, PUBLIC_NAME, force=True)
    return FusedPKDLoss


def _models_of(package: str, remedy: str) -> Any:
    try:
        return importlib.import_module(f"{package}.registry").MODELS
    except (ImportError, AssertionError) as error:  # they assert the versions of one another
        raise InputError(f"{package}.registry cannot be imported ({error}); {remedy}") from error


def _register(registry: Any, name: str, *, force: bool = False) -> None:
    if registry.module_dict.get(name) is not FusedPKDLoss:
        registry.register_module(name=name, module=FusedPKDLoss, force=force)


with contextlib.suppress(InputError):
    openmmlab()
