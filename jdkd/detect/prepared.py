"""See :class:`Prepared`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class Prepared:
    """A detector without its transform: it runs on batches that were resized and normalised beforehand.

    Args:
        model: a detector with torchvision's transform; it is left as it was.
        batches: as the transform returns them.
    """

    def __init__(self, model: nn.Module, batches: Sequence[ImageList]) -> None:
        self.batches = batches
        self._stand_in = _StandIn().eval()
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, "transform": self._stand_in}  # the caller's model keeps its own

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[list[Tensor]]) -> Prepared | None:
        """Prepares batches of images ``[3, H, W]`` in 0..1, channels-last; None for a detector without transform."""
        transform = getattr(model, "transform", None)
        if not isinstance(transform, GeneralizedRCNNTransform):
            return None
        return cls(model, [_channels_last(transform(batch)[0]) for batch in batches])

    def run(self, index: int) -> list[dict[str, Tensor]]:
        """What the detector finds on a batch, in pixels of the prepared images."""
        self._stand_in.batch = self.batches[index]
        return self._model(list(self.batches[index].tensors))


class _StandIn(nn.Module):
    """Hands out one prepared batch in a transform's place, leaves the detections alone."""

    batch: ImageList

    def forward(self, images: list[Tensor], targets: None = None) -> tuple[ImageList, None]:
        return self.batch, None

    def postprocess(self, result: list[dict[str, Tensor]], *sizes: object) -> list[dict[str, Tensor]]:
        return result


def _channels_last(batch: ImageList) -> ImageList:
    """The same batch in the memory format of a deployable model."""
    return ImageList(batch.tensors.contiguous(memory_format=torch.channels_last), batch.image_sizes)
