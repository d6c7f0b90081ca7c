"""Twins-PCPVT and Twins-SVT: layers, the backbone `Twins`, and entry points.

Papers: Twins (Chu et al., NeurIPS 2021, https://arxiv.org/abs/2104.13840) and, for the positional
encoding generator, CPVT (Chu et al., ICLR 2023, https://arxiv.org/abs/2102.10882).

A network has four stages of strides 4, 8, 16 and 32. Tokens are channels-last, `(B, H, W, C)`, from the
first patch embedding to the head, so that convolutions, norms and linear layers use the same memory layout.
Parameter names are those of the released weights; `models/weights.py` reads the other formats.

    from timm import create_model
    import models
    model = create_model("alt_gvt_small", pretrained=True)
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_model_deprecations
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from .cpu import Linear, Mlp

MIN_INPUT_SIZE = 32  # side length in pixels: the stride of the last stage
WINDOW_PADDINGS = ("mask", "zero")


class TwinsError(ValueError):
    """Weights, images or arguments that do not fit the models of this package. The message has the remedy."""


def conv_channels_last(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to channels-last tokens: `(B, H, W, C)` -> `(B, H', W', C')`, without a copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _cat(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate tensors; a single one is returned without a copy."""
    return torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]


def _is_known_multiple(side: int, window: int) -> bool:
    """Return True if a side is a multiple of the window. In a graph compiled for many sizes this is unknown: False."""
    if not torch.compiler.is_compiling():
        return side % window == 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(side % window == 0)


class PatchEmbed(nn.Module):
    """Patch embedding with patches of side p, `(B, H, W, C_in)` -> `(B, H // p, W // p, C)`."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(conv_channels_last(self.proj, x))


class PositionalEncodingGenerator(nn.Module):
    """PEG of CPVT: depthwise 3x3 convolution with a residual, `(B, H, W, C)` -> the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + conv_channels_last(self.proj[0], x)


class LocallyGroupedAttention(nn.Module):
    """LSA of Twins-SVT: attention inside windows of `window_size` x `window_size` tokens.

    If a side of the map is not a multiple of the window, the last windows extend beyond the right or lower border.
    With `window_padding="mask"` the padding takes no part in attention: these windows are just smaller. With `"zero"`
    it takes part as zero vectors. Without padding both are the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        window_padding: str = "mask",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.window_padding = window_padding
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, dim * 3)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, H, W, C)` to the same shape."""
        _, H, W, _ = x.shape
        size = self.window_size
        if _is_known_multiple(H, size) and _is_known_multiple(W, size):
            x = self.attend(x)
        elif torch.compiler.is_compiling():
            x = self.attend_by_index(x)
        elif self.window_padding == "zero":
            x = self.attend(F.pad(x, (0, 0, 0, -W % size, 0, -H % size)))[:, :H, :W]
        else:
            # Differs from the original: its mask is wrong where only one side is padded.
            bands = [
                _cat([self.attend(part) for part in self.split(band, dim=2)], dim=2) for band in self.split(x, dim=1)
            ]
            x = _cat(bands, dim=1)
        return self.proj_drop(x)

    def split(self, x: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Split a map into the whole windows and the rest, without empty parts."""
        remainder = x.shape[dim] % self.window_size
        parts = x.split([x.shape[dim] - remainder, remainder], dim=dim)
        return [part for part in parts if part.shape[dim] > 0]

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend inside windows of a map `(B, H, W, C)`, whose sides are multiples of the window or smaller than it."""
        B, H, W, C = x.shape
        height, width = min(H, self.window_size), min(W, self.window_size)
        rows, cols = H // height, W // width
        # Rearranging into windows before the projection to q, k and v moves a third of the memory.
        x = x.reshape(B, rows, height, cols, width, C).transpose(2, 3).reshape(-1, height * width, C)
        x = self.attend_windows(x).reshape(B, rows, cols, height, width, C)
        return x.transpose(2, 3).reshape(B, H, W, C)

    def attend_by_index(self, x: torch.Tensor) -> torch.Tensor:
        """Attend inside windows of a map `(B, H, W, C)`, in a single compiled graph for all sizes."""
        B, H, W, C = x.shape
        size, device = self.window_size, x.device
        rows, cols = (H + size - 1) // size, (W + size - 1) // size
        place = torch.arange(rows * cols * size**2, device=device)  # index of a token, in the order of windows
        window, token = place // size**2, place % size**2
        band = window // cols
        row, col = band * size + token // size, (window - band * cols) * size + token % size
        inside = (row < H) & (col < W)
        x = x.reshape(B, H * W, C).index_select(1, row.clamp(max=H - 1) * W + col.clamp(max=W - 1))
        if self.window_padding == "zero":
            x, real = x * inside[:, None], None
        else:
            real = inside.repeat(B).view(-1, 1, 1, size**2)
        x = self.attend_windows(x.view(-1, size**2, C), real).view(B, -1, C)
        place = torch.arange(H * W, device=device)  # index of a token, in the order of rows
        row = place // W
        col = place - row * W
        place = (row // size * cols + col // size) * size**2 + row % size * size + col % size
        return x.index_select(1, place).view(B, H, W, C)

    def attend_windows(self, x: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        """Attend inside windows.

        Args:
            x: Tokens `(windows, tokens, C)`.
            real: Mask `(windows, 1, 1, tokens)`, False for padding; None if all tokens take part.
        """
        _, tokens, C = x.shape
        qkv = self.qkv(x).view(-1, tokens, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (windows, heads, tokens, C / heads) each
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=real, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).reshape(-1, tokens, C))


class GlobalSubsampledAttention(nn.Module):
    """GSA of Twins, the spatial-reduction attention of PVT: keys and values come from a subsampled map.

    The map is subsampled by a convolution with kernel and stride `sr_ratio`. With `sr_ratio=1` this is plain attention.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.attn_drop = attn_drop
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, dim * 2)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, H, W, C)` to the same shape."""
        B, H, W, C = x.shape
        head_dim = C // self.num_heads
        q = self.q(x).reshape(B, H * W, self.num_heads, head_dim).transpose(1, 2)  # (B, heads, H * W, C / heads)
        if self.sr_ratio > 1:
            x = self.norm(conv_channels_last(self.sr, x))  # (B, H // sr, W // sr, C)
        # (B, keys, 2, heads, C / heads) -> two of (B, heads, keys, C / heads)
        k, v = self.kv(x).reshape(B, -1, 2, self.num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = x.transpose(1, 2).reshape(B, H, W, C)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    """Pre-norm transformer block, `(B, H, W, C)` -> the same shape. `attn` is LSA or GSA."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, proj_drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Twins(nn.Module):
    """The Twins backbone with an optional classification head.

    Input: ImageNet-normalised RGB images `(B, in_chans, H, W)`, with any H and W of at least 32 pixels.
    Output: logits `(B, num_classes)`, or tokens `(B, H // 32, W // 32, C)` without pooling and head.

    Args:
        in_chans: Number of channels of the input images.
        num_classes: Number of classes; 0 to omit the head.
        global_pool: `"avg"` for average pooling, or `""` to disable pooling.
        embed_dims: Number of channels of each stage.
        num_heads: Number of attention heads of each stage.
        mlp_ratios: Ratio of the hidden width of the MLP to the number of channels, for each stage.
        depths: Number of blocks of each stage.
        sr_ratios: Stride of the subsampling in GSA, for each stage.
        window_size: Side length of the LSA windows in tokens; blocks alternate LSA and GSA (Twins-SVT). None to use
            GSA in all blocks (Twins-PCPVT).
        window_padding: `"mask"` or `"zero"`, see `LocallyGroupedAttention`.
        stage_norm: True to normalise the output of each stage (`norm_list` of the dense SVT models).
        drop_rate: Dropout rate before the head.
        proj_drop_rate: Dropout rate after the projections of attention and MLP.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_path_rate: Stochastic depth rate of the last block; the rate grows linearly from 0 over all blocks.
        img_size: Side length of the images, or height and width. It is only checked; the network takes any size.

    Raises:
        TwinsError: If `window_padding` or `global_pool` is unknown, if the number of channels is not a multiple of the
            number of heads, or if a side of `img_size` is less than 32 pixels.
    """

    output_fmt = "NHWC"  # layout of `forward_features`, read by timm

    def __init__(  # noqa: PLR0913  the hyperparameters of a network
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        depths: Sequence[int] = (2, 2, 10, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int | None = None,
        window_padding: str = "mask",
        stage_norm: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        if window_padding not in WINDOW_PADDINGS:
            raise TwinsError(f"window_padding {window_padding!r} is unknown; use one of {WINDOW_PADDINGS}")
        for dim, heads in zip(embed_dims, num_heads, strict=True):
            if dim % heads:
                raise TwinsError(f"{heads} attention heads do not divide an embedding of {dim} channels")
        if img_size is not None:
            _check_image_size(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        self.num_classes = num_classes
        self.global_pool = _check_pool(global_pool)
        self.embed_dims = tuple(embed_dims)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False

        def make_attention(stage: int, index: int) -> nn.Module:
            """Return LSA at even indices if there are windows, GSA otherwise."""
            dim, heads, drops = embed_dims[stage], num_heads[stage], (attn_drop_rate, proj_drop_rate)
            if window_size is not None and index % 2 == 0:
                return LocallyGroupedAttention(dim, heads, window_size, window_padding, *drops)
            return GlobalSubsampledAttention(dim, heads, sr_ratios[stage], *drops)

        in_dims = (in_chans, *embed_dims[:-1])
        patch_sizes = (4, *[2] * (len(depths) - 1))
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.patch_embeds = nn.ModuleList(map(PatchEmbed, in_dims, embed_dims, patch_sizes))
        self.pos_block = nn.ModuleList(map(PositionalEncodingGenerator, embed_dims))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                Block(dim, make_attention(stage, index), mlp_ratios[stage], proj_drop_rate, next(drop_paths))
                for index in range(depths[stage])
            )
            for stage, dim in enumerate(embed_dims)
        )
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        if stage_norm:
            self.norm_list = nn.ModuleList(map(norm_layer, embed_dims))
        self.stage_norm = stage_norm
        self.norm = norm_layer(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": 4 * 2**i} for i, dim in enumerate(embed_dims)
        ]
        self.apply(_init_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `(B, in_chans, H, W)` to normalised tokens `(B, H // 32, W // 32, C)`."""
        x = self._to_channels_last(x)
        for stage in range(len(self.blocks)):
            x = self._forward_stage(x, stage)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map tokens `(B, H, W, C)` to logits `(B, num_classes)`, or to pooled features `(B, C)` if `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the outputs of chosen stages, as timm's models do.

        Args:
            x: Images `(B, in_chans, H, W)`.
            indices: Number of last stages, or a sequence of stages; None for all stages.
            norm: True to apply the final norm to the output of the last stage.
            stop_early: True to skip the stages after the last chosen one.
            output_fmt: Layout of the maps, `"NCHW"` or `"NHWC"`.
            intermediates_only: True to return only the list of maps.

        Returns:
            `(tokens, maps)`, or only the maps. If the last stage was computed, the tokens are those of
            `forward_features`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise TwinsError(f"output_fmt {output_fmt!r} is unknown; use 'NCHW' or 'NHWC'")
        wanted, last_wanted = feature_take_indices(len(self.blocks), indices)
        last = len(self.blocks) - 1
        intermediates = []
        x = self._to_channels_last(x)
        for stage in range(last_wanted + 1 if stop_early else last + 1):
            x = self._forward_stage(x, stage)
            if stage in wanted:
                feature = self.norm(x) if norm and stage == last else x
                intermediates.append(feature if output_fmt == "NHWC" else feature.permute(0, 3, 1, 2))
        if intermediates_only:
            return intermediates
        return (self.norm(x) if stage == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages, final norm and head that the outputs `indices` do not need, as timm's models do.

        Args:
            indices: Number of last stages, or a sequence of stages.
            prune_norm: True to always remove the final norm.
            prune_head: True to always remove the head.

        Returns:
            The indices of the chosen stages.
        """
        wanted, last_wanted = feature_take_indices(len(self.blocks), indices)
        keep = last_wanted + 1
        prune_stages = keep < len(self.blocks)
        names = ["patch_embeds", "pos_block", "blocks"]
        if self.stage_norm:
            names.append("norm_list")
        for name in names:
            setattr(self, name, getattr(self, name)[:keep])
        if prune_norm or prune_stages:
            self.norm = nn.Identity()
        if prune_stages:
            self.num_features = self.head_hidden_size = self.embed_dims[last_wanted]
        if prune_head or prune_stages:
            self.reset_classifier(0, "")
        return wanted

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable recomputation of each block in the backward pass: less memory, about a third more time."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, besides biases and norms: those of the PEGs."""
        return {f"pos_block.{name}" for name, _ in self.pos_block.named_parameters()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the grouping of parameters into layers, for timm's layer-wise learning-rate decay."""
        if coarse:
            blocks = [(r"^(?:patch_embeds|blocks|pos_block|norm_list)\.(\d+)", None), (r"^norm\.", (99999,))]
        else:
            blocks = [
                (r"^blocks\.(\d+)\.(\d+)", None),
                (r"^(?:patch_embeds|pos_block)\.(\d+)", (0,)),
                (r"^norm_list\.(\d+)", (99999,)),
                (r"^norm\.", (99999,)),
            ]
        return {"stem": r"^patch_embeds\.0\.", "blocks": blocks}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with random weights; 0 classes to remove it."""
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(_init_weights)
        parameter = next(self.parameters())
        self.head.to(device=parameter.device, dtype=parameter.dtype)

    def _to_channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """Check the images and view them as `(B, H, W, in_chans)`."""
        _check_image_size(x.shape[-2], x.shape[-1])
        return x.permute(0, 2, 3, 1)

    def _forward_stage(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        """Map tokens `(B, H, W, C_in)` of the previous stage to tokens `(B, H', W', C)` of this one."""
        x = self.patch_embeds[stage](x)
        for index, block in enumerate(self.blocks[stage]):
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index == 0:
                x = self.pos_block[stage](x)
        return self.norm_list[stage](x) if self.stage_norm else x


def _check_image_size(height: int, width: int) -> None:
    if height < MIN_INPUT_SIZE or width < MIN_INPUT_SIZE:
        raise TwinsError(
            f"images of {height}x{width} pixels are too small for Twins, whose last stage has stride "
            f"{MIN_INPUT_SIZE}; use at least {MIN_INPUT_SIZE}x{MIN_INPUT_SIZE}"
        )


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("", "avg"):
        raise TwinsError(f"global_pool {global_pool!r} is unknown; use 'avg', or '' to disable pooling")
    return global_pool


def _init_weights(module: nn.Module) -> None:
    """Initialise a layer as in the original. LayerNorms keep the initialisation of torch."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, MIN_INPUT_SIZE, MIN_INPUT_SIZE),
        "pool_size": None,
        "crop_pct": 0.875,  # as in the published evaluation; the entries of timm have 0.9
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embeds.0.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "pcpvt_small.in1k": _cfg(hf_hub_id="timm/twins_pcpvt_small.in1k"),
        "pcpvt_base.in1k": _cfg(hf_hub_id="timm/twins_pcpvt_base.in1k"),
        "pcpvt_large.in1k": _cfg(hf_hub_id="timm/twins_pcpvt_large.in1k"),
        "pcpvt_tiny.untrained": _cfg(),
        "alt_gvt_small.in1k": _cfg(hf_hub_id="timm/twins_svt_small.in1k"),
        "alt_gvt_base.in1k": _cfg(hf_hub_id="timm/twins_svt_base.in1k"),
        "alt_gvt_large.in1k": _cfg(hf_hub_id="timm/twins_svt_large.in1k"),
        "alt_gvt_tiny.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> nn.Module:
    return build_model_with_cfg(
        Twins, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}, **kwargs
    )


def _pcpvt(variant: str, pretrained: bool, kwargs: dict, **config) -> nn.Module:
    defaults = {"embed_dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4)}
    return _create(variant, pretrained, **(defaults | config | kwargs))


def _alt_gvt(variant: str, pretrained: bool, kwargs: dict, **config) -> nn.Module:
    defaults = {"window_size": 7}
    return _create(variant, pretrained, **(defaults | config | kwargs))


@register_model
def pcpvt_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Twins-PCPVT with 1.3 M parameters, for tests and first runs."""
    config = {"embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4), "depths": (1, 2, 2, 2)}
    return _pcpvt("pcpvt_tiny", pretrained, kwargs, **config)


@register_model
def pcpvt_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Twins-PCPVT-S."""
    return _pcpvt("pcpvt_small", pretrained, kwargs, depths=(3, 4, 6, 3))


@register_model
def pcpvt_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """Twins-PCPVT-B."""
    return _pcpvt("pcpvt_base", pretrained, kwargs, depths=(3, 4, 18, 3))


@register_model
def pcpvt_large(pretrained: bool = False, **kwargs) -> nn.Module:
    """Twins-PCPVT-L."""
    return _pcpvt("pcpvt_large", pretrained, kwargs, depths=(3, 8, 27, 3))


@register_model
def alt_gvt_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Twins-SVT with 1.0 M parameters, for tests and first runs."""
    config = {"embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4), "mlp_ratios": (2, 2, 4, 4)}
    return _alt_gvt("alt_gvt_tiny", pretrained, kwargs, depths=(1, 1, 4, 1), **config)


@register_model
def alt_gvt_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Twins-SVT-S."""
    return _alt_gvt("alt_gvt_small", pretrained, kwargs, depths=(2, 2, 10, 4))


@register_model
def alt_gvt_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """Twins-SVT-B."""
    config = {"embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 18, 2)}
    return _alt_gvt("alt_gvt_base", pretrained, kwargs, **config)


@register_model
def alt_gvt_large(pretrained: bool = False, **kwargs) -> nn.Module:
    """Twins-SVT-L."""
    config = {"embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2)}
    return _alt_gvt("alt_gvt_large", pretrained, kwargs, **config)


# Names of the original.
register_model_deprecations(__name__, {f"pcpvt_{size}_v0": f"pcpvt_{size}" for size in ("small", "base", "large")})
