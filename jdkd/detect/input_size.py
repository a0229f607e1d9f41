"""See :func:`require_visible`."""

from collections.abc import Iterable

from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from jdkd.errors import ModelError
from jdkd.nn.unwrapping import unwrapped


def input_transform(model: nn.Module) -> GeneralizedRCNNTransform | None:
    """The torchvision transform of a detector or of the one inside it; None without one."""
    return next((module for module in model.modules() if isinstance(module, GeneralizedRCNNTransform)), None)


def require_visible(model: nn.Module, sizes: Iterable[tuple[str, int, int]]) -> None:
    """Refuses images of which a detector's transform would leave no pixel: so long that the short side is resized to 0.

    Args:
        model: a detector; without a torchvision transform everything passes.
        sizes: (name, height, width) of every image.

    Raises:
        ModelError: names the first of them and says how many there are.
    """
    transform = input_transform(model)
    if transform is None or transform.fixed_size is not None:
        return
    least, most = min(transform.min_size), transform.max_size
    gone = [
        (name, height, width)
        for name, height, width in sizes
        if min(least / min(height, width), most / max(height, width)) * min(height, width) < 1
    ]
    if gone:
        name, height, width = gone[0]
        raise ModelError(
            f"{name} is {height}x{width} (height x width), of which {type(unwrapped(model)).__name__} leaves no pixel "
            f"on the short side when it resizes the long one to max_size {most} ({len(gone)} such image(s)); raise "
            f"max_size to {-(-max(height, width) // min(height, width))} or more, or crop or leave out such images"
        )
