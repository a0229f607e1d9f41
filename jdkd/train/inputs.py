"""What a detector, or any other model, is given of a batch, and the targets that it trains on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.data import batches
from jdkd.detect.contract import extra_targets, require_learner
from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped


def with_targets_of(model: nn.Module, dataset: Any) -> Any:
    """The data set with what the detector trains on in its targets.

    Args:
        model: a detector.
        dataset: a :class:`jdkd.data.coco.CocoDetectionDataset`; one of another type is taken as it is.

    Raises:
        InputError: it needs masks and the annotations have none, or it needs keypoints.
    """
    wanted = extra_targets(model)
    if not hasattr(dataset, "with_masks"):
        return dataset
    if "keypoints" in wanted:
        raise InputError(
            f"a {type(unwrapped(model)).__name__} trains on keypoints, and those of annotations are not read; train a "
            "detector of boxes or masks (the boxes of this one can be scored)"
        )
    return dataset.with_masks() if "masks" in wanted else dataset


def data_for(model: nn.Module, dataset: Any, *, batch_size: int, seed: int, device: torch.device | str = "cpu") -> Any:
    """As :func:`with_targets_of`, once the detector has been seen to learn from a batch of it, of two images at most.

    Args:
        model: a detector, on ``device``.
        dataset: a :class:`jdkd.data.coco.CocoDetectionDataset`.
        batch_size, seed: of the training that is to come.
        device: where.

    Raises:
        InputError: it does not train, or not on such data.
    """
    dataset = with_targets_of(model, dataset)
    tried = batches(dataset, batch_size=min(2, batch_size), steps=1, seed=seed, device=device)
    require_learner(model, *next(tried))
    return dataset


def images_of(batch: Any) -> Tensor | list[Tensor]:
    """The images of ``(images, targets)``, or of a batch that is nothing but images.

    Raises:
        InputError: there are none.
    """
    if isinstance(batch, Tensor) and batch.dim() == 4:
        return batch
    if isinstance(batch, str) or not isinstance(batch, Sequence) or not batch:
        got = f"a tensor {list(batch.shape)}" if isinstance(batch, Tensor) else f"{batch!r:.60}"
        raise InputError(
            f"a batch is or holds {got}, where images are expected; give (images, targets), a list of images "
            "[3, H, W], or a tensor [N, 3, H, W]"
        )
    if isinstance(batch[0], Tensor) and batch[0].dim() == 3:
        return list(batch)
    return images_of(batch[0])


def images_on(model: nn.Module, batch: Any) -> list[Tensor]:
    """The images of a batch as a detector is given them: a list of ``[3, H, W]`` on its device."""
    device = next((tensor.device for tensor in model.parameters()), None)
    return [image if device is None else image.to(device) for image in images_of(batch)]


def stacked(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """``[N, 3, H, W]``, for a model that takes a batch.

    Raises:
        InputError: they are of several sizes.
    """
    if len({image.shape for image in images}) > 1:
        raise InputError(
            f"a {type(model).__name__} has nothing that brings images to one size, and a batch has "
            f"{', '.join(str(list(image.shape)) for image in images[:4])}; give tensors [N, 3, H, W]"
        )
    return torch.stack(list(images))
