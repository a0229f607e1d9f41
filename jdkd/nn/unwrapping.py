"""The model inside torch's own wrappers, and whether one is compiled."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel``, ``AveragedModel`` and ``torch.compile``, however
    they are nested; a model that none of them wraps as it is.
    """
    while True:
        wraps = isinstance(model, DistributedDataParallel | DataParallel | AveragedModel)
        inner = model.module if wraps else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` wraps this very module, or was called on it in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
