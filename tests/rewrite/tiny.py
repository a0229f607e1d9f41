"""A network that anyone may have written, put on disk where only its import path is known."""

SOURCE = '''
import warnings

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels, dilation=1):
        super().__init__()
        self.spread = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.deep = nn.Conv2d(2 * channels, 2 * channels, 3, padding=dilation, dilation=dilation, groups=2 * channels)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.join = nn.Conv2d(2 * channels, channels, 1)
        self.after = nn.GroupNorm(4, channels)

    def forward(self, x):
        return x + self.after(self.join(torch.relu(self.norm(self.deep(self.spread(x))))))


class Named(nn.Module):
    """Residual blocks under names of their own."""

    def __init__(self, channels):
        super().__init__()
        for letter in "abc":
            self.add_module(letter, Block(channels))

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


class Net(nn.Module):
    def __init__(self, width=16, classes=3, dilations=(1, 1, 2, 1)):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(width, dilation) for dilation in dilations))
        self.named = Named(width)
        self.first, self.second = nn.Linear(width, 12), nn.Linear(width, 12)
        self.second.weight = self.first.weight
        self.out = nn.Linear(12, classes)
        self.scale = 1.5
        self.size = (32, 48)
        self.anchors = [torch.arange(4.0) + 1, {"more": torch.full((1,), 0.25)}]
        self.register_buffer("table", torch.linspace(0, 1, 12), persistent=False)
        self.register_buffer("offset", torch.zeros(classes))
        self.stem.weight.requires_grad_(False)

    def forward(self, x):
        x = self.named(self.blocks(self.stem(x))).mean((2, 3))
        x = torch.relu(self.first(x) + self.second(x))
        return self.out(x + self.table) * self.scale + self.offset + self.anchors[0].sum() * self.anchors[1]["more"]


def net(**arguments):
    return Net(**arguments)


def peeks():
    """Computes with its weights while it is built."""
    made = Net()
    made.sizes = list(made(torch.zeros(2, 3, 8, 8)).shape)
    made.largest = float(made.stem.weight.max()) > 0
    return made


KEPT = Net()


def kept():
    return KEPT


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 8, 2, bidirectional=True), nn.Linear(16, 4)
        self.gains = nn.ParameterList([torch.ones(4), torch.ones(4)])
        self.first = [self.gains[0]]

    def forward(self, x):
        return self.out(self.lstm(x.flatten(2).permute(2, 0, 1))[0]) * self.first[0] + self.gains[1]


def recurrent():
    return Recurrent()


def parametrized():
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)),
    )


def wrapped():
    return nn.DataParallel(Net())


def lazy():
    return nn.LazyConv2d(4, 3)


def scripted():
    with warnings.catch_warnings():  # torch wants it no more
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Conv2d(3, 4, 3))


class Counting(Net):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def derived():
    """Keeps a tensor that it computed of its weights."""
    made = Net()
    made.doubled = [2 * made.out.weight.detach()]
    return made


def raising(width=3):
    raise RuntimeError("no such file: anchors.txt")


def list_of_one():
    return [Net()]


def mask_rcnn_r101():
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return MaskRCNN(resnet_fpn_backbone(backbone_name="resnet101", weights=None, norm_layer=nn.BatchNorm2d), 91)


number = 3
'''
