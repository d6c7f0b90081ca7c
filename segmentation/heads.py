"""Decode heads and the FPN neck of semantic segmentation, with the parameter names of the released weights.

All take the maps of a backbone, `(B, C_i, H / s_i, W / s_i)` at strides s_i of 4, 8, 16 and 32. The heads return logits
`(B, classes, H / s, W / s)`, which the segmentor resizes; s is 16 in `FCNHead`, 4 in the others.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.1  # probability that a head drops a whole channel in training
POOL_SCALES = (1, 2, 3, 6)  # parts per side of the grids of UPerNet's pyramid pooling


class ConvBNReLU(nn.Module):
    """Convolution without a bias, BatchNorm and ReLU; `(B, in_channels, H, W)` -> `(B, out_channels, H, W)`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class DecodeHead(nn.Module):
    """Base class of the heads: dropout, then a 1x1 convolution of features of width `channels` to the classes."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the features to classify, `(B, channels, H / s, W / s)`."""
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.conv_seg(self.dropout(self.features(maps)))


class AveragePool(nn.Module):
    """Averages over a grid of `bins` x `bins` parts of a map, `(B, C, H, W)` -> `(B, C, bins, bins)`.

    Equal to torch's `AdaptiveAvgPool2d`, as a matrix product: its gradient is deterministic on GPUs, and an exported
    model serves all sizes.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # half precision would round the weights
            with torch.autocast(x.device.type, enabled=False):
                return self(x)
        rows, columns = self.weights(x.shape[2], x.device), self.weights(x.shape[3], x.device)
        weights = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (bins ** 2, H * W)
        pooled = weights @ x.float().flatten(2).transpose(1, 2)  # (B, bins ** 2, C); torch.jit's exporter knows no mT
        return pooled.transpose(1, 2).unflatten(2, (self.bins, self.bins)).to(x.dtype)

    def weights(self, side: int, device: torch.device) -> Tensor:
        """Return the float32 weight of each place of a side in each bin, `(bins, side)`."""
        bins = torch.arange(self.bins, device=device)[:, None]
        places = torch.arange(side, device=device)
        first, end = bins * side // self.bins, ((bins + 1) * side + self.bins - 1) // self.bins
        return ((places >= first) & (places < end)).float() / (end - first)


class UPerHead(DecodeHead):
    """Pyramid pooling of the coarsest map, and a feature pyramid of all maps (https://arxiv.org/abs/1807.10221)."""

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 512):
        super().__init__(channels, num_classes)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AveragePool(scale), ConvBNReLU(in_channels[-1], channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvBNReLU(in_channels[-1] + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBNReLU(width, channels, 1) for width in in_channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvBNReLU(channels, channels, 3) for _ in in_channels[:-1])
        self.fpn_bottleneck = ConvBNReLU(len(in_channels) * channels, channels, 3)

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        pyramid = [self._pool(maps[-1])]
        for lateral in reversed(laterals):
            pyramid.insert(0, lateral + resize(pyramid[0], lateral))
        levels = [conv(x) for conv, x in zip(self.fpn_convs, pyramid[:-1], strict=True)] + [pyramid[-1]]
        return self.fpn_bottleneck(torch.cat([resize(level, levels[0]) for level in levels], dim=1))

    def _pool(self, x: Tensor) -> Tensor:
        """Add averages over grids of several sizes, for global context; `(B, C, h, w)` -> `(B, channels, h, w)`."""
        pooled = [resize(module(x), x) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class FCNHead(DecodeHead):
    """A 3x3 convolution of the map at stride 16: the auxiliary head in training (https://arxiv.org/abs/1411.4038)."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256):
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(ConvBNReLU(in_channels, channels, 3))

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        return self.convs(maps[2])


class FPN(nn.Module):
    """A feature pyramid: maps of the same width, each with the coarser ones added (https://arxiv.org/abs/1612.03144)."""

    def __init__(self, in_channels: Sequence[int], channels: int = 256):
        super().__init__()
        self.channels = channels
        self.lateral_convs = nn.ModuleList(_named_conv(width, channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList(_named_conv(channels, channels, 3) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        pyramid = [laterals.pop()]
        for lateral in reversed(laterals):
            pyramid.insert(0, lateral + F.interpolate(pyramid[0], size=lateral.shape[2:], mode="nearest"))
        return [conv(x) for conv, x in zip(self.fpn_convs, pyramid, strict=True)]


def _named_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    """Return a convolution with the parameter names `conv.weight` and `conv.bias` of the released weights."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    # The original never called the neck's `init_weights`, so the initialisation of its convolutions stayed.
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return nn.Sequential(OrderedDict(conv=conv))


class FPNHead(DecodeHead):
    """Semantic FPN: upsamples each level to the finest in steps of two, and adds them (https://arxiv.org/abs/1901.02446)."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 128):
        super().__init__(channels, num_classes)
        self.scale_heads = nn.ModuleList(self._scale_head(in_channels, channels, doublings) for doublings in range(4))

    @staticmethod
    def _scale_head(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
        """Return convolutions that are each followed by upsampling by two, or one convolution without it."""
        layers = nn.Sequential()
        for _ in range(max(1, doublings)):
            layers.append(ConvBNReLU(channels if layers else in_channels, channels, 3))
            if doublings:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        return layers

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        finest, *coarser = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        return sum((resize(x, finest) for x in coarser), finest)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map `(B, C, h, w)` to the height and width of another by bilinear interpolation."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
