"""ResNet with free widths and depths, under torchvision's parameter names (He et al., CVPR 2016)."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from jdkd.detect.spec import DetectorSpec

STAGES = ("layer1", "layer2", "layer3", "layer4")


class Block(nn.Module):
    """A residual block: two 3x3 convolutions (basic), or 1x1, 3x3, 1x1 (bottleneck, stride in the 3x3).

    Args:
        in_channels: channels of the residual stream that comes in.
        inner: output channels of every convolution but the last.
        out_channels: channels of the residual stream that goes out.
        stride: of the block. A 1x1 convolution joins the shortcut where the stride or the stream's width
            changes.
        norm: class of the normalisations.
    """

    def __init__(self, in_channels: int, inner: tuple[int, ...], out_channels: int, stride: int, norm: type[nn.Module]):
        super().__init__()
        kernels = (3, 3) if len(inner) == 1 else (1, 3, 1)
        strides = (stride, 1) if len(inner) == 1 else (1, stride, 1)
        widths = (in_channels, *inner, out_channels)
        self.conv3 = self.bn3 = None
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            conv = nn.Conv2d(widths[i], widths[i + 1], kernel, stride=step, padding=kernel // 2, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", norm(widths[i + 1]))
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:  # [N, in, H, W] -> [N, out, H / stride, W / stride]
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        if self.conv3 is not None:
            x = self.bn3(self.conv3(F.relu(x, inplace=True)))
        return F.relu(x + shortcut, inplace=True)


class ResNet(nn.Module):
    """The trunk: stem and four stages."""

    def __init__(self, spec: DetectorSpec):
        super().__init__()
        norm = FrozenBatchNorm2d if spec.norm == "frozen" else nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, spec.stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(spec.stem)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = spec.stem
        for number, (name, stage) in enumerate(zip(STAGES, spec.stages, strict=True)):
            blocks = []
            for i, inner in enumerate(stage.blocks):
                stride = 2 if i == 0 and number > 0 else 1
                blocks.append(Block(channels, inner, stage.width, stride, norm))
                channels = stage.width
            setattr(self, name, nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # [N, 3, H, W] -> strides 4, 8, 16, 32
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        levels = OrderedDict()  # stages by name: torch.jit.script knows no getattr
        levels["0"] = x = self.layer1(x)
        levels["1"] = x = self.layer2(x)
        levels["2"] = x = self.layer3(x)
        levels["3"] = self.layer4(x)
        return levels


class Backbone(nn.Module):
    """ResNet and FPN (Lin et al., CVPR 2017): an image batch in, P2-P6 out, keyed as torchvision keys them.

    Attributes:
        strides: pixels of the image per cell of each level.
    """

    def __init__(self, spec: DetectorSpec):
        super().__init__()
        self.body = ResNet(spec)
        widths = [stage.width for stage in spec.stages]
        self.fpn = FeaturePyramidNetwork(widths, spec.fpn, extra_blocks=LastLevelMaxPool())
        self.out_channels = spec.fpn
        self.strides = dict(zip(("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64), strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # [N, 3, H, W] -> {"0", "1", "2", "3", "pool"}
        return self.fpn(self.body(x))
