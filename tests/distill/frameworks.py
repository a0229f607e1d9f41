"""Detectors that behave as other frameworks' do, which this project does not depend on."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BGR_MEAN, BGR_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)


class Levels(nn.Module):
    """Two levels of 4 channels, at stride 4 and 8; keeps the images that it was given."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fine, self.coarse = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        self.images = x
        fine = self.fine(x)
        return [fine, self.coarse(fine)]


def head_loss(levels: list[Tensor]) -> Tensor:
    return sum(level.square().mean() for level in levels)


def padded(images: list[Tensor], multiple: int = 8) -> Tensor:
    """``[N, C, H, W]``, zeros to the right and below."""
    height, width = (-(-max(image.shape[d] for image in images) // multiple) * multiple for d in (1, 2))
    return torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])


class Plain(nn.Module):
    """Says nothing of normalisation, and is called with a batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.backbone = Levels(seed)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"loss_box": head_loss(self.backbone(inputs))}


class Preprocessor(nn.Module):
    """As mmengine's: images of 0..255, stacked after they were normalised."""

    def __init__(self, mean: Any, std: Any, bgr_to_rgb: bool = False) -> None:
        super().__init__()
        self._channel_conversion, self._enable_normalize = bgr_to_rgb, mean is not None
        if mean is not None:
            self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), False)
            self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), False)

    def forward(self, images: list[Tensor]) -> Tensor:
        if self._channel_conversion:
            images = [image[[2, 1, 0]] for image in images]
        return padded([(image - self.mean) / self.std if self._enable_normalize else image for image in images])


class OpenMMLab(Plain):
    """Called with what its preprocessor made of the images."""

    def __init__(self, mean: Any = RGB_MEAN, std: Any = RGB_STD, bgr_to_rgb: bool = True, seed: int = 0) -> None:
        super().__init__(seed)
        self.data_preprocessor = Preprocessor(mean, std, bgr_to_rgb)


class Detectron(nn.Module):
    """Normalises in its forward, by buffers for images of 0..255."""

    def __init__(
        self, mean: Any = BGR_MEAN, std: Any = BGR_STD, input_format: str | None = "BGR", seed: int = 0
    ) -> None:
        super().__init__()
        self.backbone, self.input_format = Levels(seed), input_format
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1), False)

    def preprocess_image(self, images: list[Tensor]) -> Tensor:
        return padded([(image - self.pixel_mean) / self.pixel_std for image in images])

    def forward(self, batched_inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        images = self.preprocess_image([entry["image"] for entry in batched_inputs])
        return {"loss_box": head_loss(self.backbone(images))}


class Processor:
    """As Hugging Face's image processors."""

    def __init__(self, mean: Any = (0.5, 0.4, 0.3), std: Any = (0.2, 0.25, 0.3), **flags: Any) -> None:
        self.image_mean, self.image_std = list(mean), list(std)
        self.do_rescale, self.rescale_factor, self.do_normalize, self.do_flip_channel_order = True, 1 / 255, True, False
        vars(self).update(flags)

    def __call__(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Of images ``[3, H, W]`` in 0..255."""
        images = [image.flip(0) if self.do_flip_channel_order else image for image in images]
        images = [image * self.rescale_factor if self.do_rescale else image for image in images]
        if self.do_normalize:
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.image_mean, self.image_std))
            images = [(image - mean) / std for image in images]
        mask = padded([torch.ones(1, *image.shape[1:], dtype=torch.long) for image in images])[:, 0]
        return {"pixel_values": padded(images), "pixel_mask": mask}


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dict and a dataclass in one; what is None is no entry."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) is not None:
                self[entry.name] = getattr(self, entry.name)

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise Exception("You cannot use ``update`` on a ModelOutput instance.")

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        make, _, *rest = super().__reduce__()
        return make, tuple(getattr(self, entry.name) for entry in fields(self)), *rest


@dataclass
class BackboneOutput(ModelOutput):
    feature_maps: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class DetectionOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


class MaskedLevels(Levels):
    """A backbone that is called with the padding mask too, and returns an output object."""

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> BackboneOutput:
        self.mask = pixel_mask
        levels = super().forward(pixel_values)
        return BackboneOutput(feature_maps=tuple(levels), hidden_states=(pixel_values, *levels))


class HuggingFaceBase(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.backbone = MaskedLevels(seed)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        if pixel_mask is None:
            pixel_mask = torch.ones(pixel_values[:, 0].shape, dtype=torch.long)
        return self.backbone(pixel_values, pixel_mask).feature_maps


class HuggingFace(nn.Module):
    """Its backbone is in ``model``; it returns an output object with the total loss, if it has labels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model = HuggingFaceBase(seed)

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: Any = None, return_dict: bool = True
    ) -> Any:
        levels = self.model(pixel_values, pixel_mask)
        self.levels = levels
        loss, logits = None if labels is None else head_loss(levels), levels[-1].flatten(2)
        return DetectionOutput(loss=loss, logits=logits) if return_dict else (loss, logits)


class Layer(nn.Module):
    """One of a sequence that says in ``f`` which others it reads, as Ultralytics' do."""

    def __init__(self, sources: int | list[int], *shape: int) -> None:
        super().__init__()
        self.f, self.conv = sources, nn.Conv2d(*shape)

    def forward(self, x: Tensor) -> Tensor:
        self.images = x
        return F.silu(self.conv(x), inplace=True)


class Detect(nn.Module):
    """A head that is called with a list of levels, writes into it, and returns another thing in each mode."""

    def __init__(self, sources: list[int], widths: list[int]) -> None:
        super().__init__()
        self.f, self.cv = sources, nn.ModuleList(nn.Conv2d(width, 9, 1) for width in widths)
        self.ran = 0

    def forward(self, x: list[Tensor]) -> Any:
        self.ran += 1
        self.given = list(x)
        for place, conv in enumerate(self.cv):
            x[place] = conv(x[place])
        return x if self.training else (torch.cat([level.flatten(2) for level in x], 2), x)


class Ultralytics(nn.Module):
    """Called with a batch, a dict, it returns losses that are summed and a log of them; with images, a list.

    The log is a vector, as in earlier versions, or has names.
    """

    def __init__(
        self, widths: tuple[int, ...] = (6, 8), seed: int = 0, vector: bool = True, named: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = [Layer(-1, 3, widths[0], 4, 4), Layer(-1, widths[0], widths[1], 2, 2), Detect([0, 1], [*widths])]
        self.model, self.vector, self.named = nn.Sequential(*layers), vector, named

    def forward(self, x: Any) -> Any:
        return self.loss(x) if isinstance(x, dict) else self.predict(x)

    def predict(self, x: Tensor) -> Any:
        outputs: list[Tensor] = []
        for layer in self.model:
            x = layer([outputs[source] for source in layer.f] if isinstance(layer.f, list) else x)
            outputs.append(x)
        return x

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        levels = self.forward(batch["img"])
        levels = levels if isinstance(levels, list) else levels[1]
        losses = torch.stack([level[:, part::3].square().mean() for part in range(3) for level in levels[:1]])
        total = losses * len(batch["img"])
        log = dict(zip(("box", "cls", "dfl"), losses.detach(), strict=True)) if self.named else losses.detach()
        return (total if self.vector else total.sum()), log
