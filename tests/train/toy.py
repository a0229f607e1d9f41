"""A model small enough to know every gradient of, trained on the scenes' batches."""

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """Three weights, a bias and a batch norm; the losses of the tests use them directly."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]]))
        self.bias = nn.Parameter(torch.tensor([0.5]))
        self.norm = nn.BatchNorm2d(2)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([0.7, -0.4]))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        brightness = torch.stack([image.mean() for image in images]).mean()
        noise = torch.rand(())  # as the sampling of regions draws
        return {
            "loss_fit": ((self.weight - brightness - noise) ** 2).mean(),
            "loss_bias": self.bias.abs().sum(),
        }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
