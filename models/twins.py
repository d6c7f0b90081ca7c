"""Twins-PCPVT and Twins-SVT: the backbone `Twins` and entry points; `models/layers.py` has the layers.

Papers: Twins (Chu et al., NeurIPS 2021, https://arxiv.org/abs/2104.13840) and, for the positional
encoding generator, CPVT (Chu et al., ICLR 2023, https://arxiv.org/abs/2102.10882).

A network has four stages of strides 4, 8, 16 and 32. Parameter names are those of the released weights;
`models/weights.py` reads the other formats.

    from timm import create_model
    import models
    model = create_model("alt_gvt_small", pretrained=True)
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    register_model_deprecations,
    register_notrace_function,
)
from timm.models._features import feature_take_indices
from torch import nn

from . import layers

MIN_INPUT_SIZE = 32  # side length in pixels: the stride of the last stage


class TwinsError(ValueError):
    """Weights, images or arguments that do not fit the models of this package. The message has the remedy."""


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
        window_padding: `"mask"`, `"zero"` or `"released"`, see `LocallyGroupedAttention`.
        stage_norm: True to normalise the output of each stage (`norm_list` of the dense SVT models).
        drop_rate: Dropout rate before the head.
        proj_drop_rate: Dropout rate after the projections of attention and MLP.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_path_rate: Stochastic depth rate of the last block; the rate grows linearly from 0 over all blocks.
        img_size: Side length of the images, or height and width. It is only checked; the network takes any size.
        device: Device of the parameters; None for torch's default.
        dtype: Data type of the parameters; None for torch's default.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if window_padding not in layers.WINDOW_PADDINGS:
            raise TwinsError(f"window_padding {window_padding!r} is unknown; use one of {layers.WINDOW_PADDINGS}")
        for dim, heads in zip(embed_dims, num_heads, strict=True):
            if dim % heads:
                raise TwinsError(f"{heads} attention heads do not divide an embedding of {dim} channels")
        if img_size is not None:
            check_image_size(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = _check_pool(global_pool)
        self.embed_dims = tuple(embed_dims)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False

        def make_attention(stage: int, index: int) -> nn.Module:
            """Return LSA at even indices if there are windows, GSA otherwise."""
            dim, heads, drops = embed_dims[stage], num_heads[stage], (attn_drop_rate, proj_drop_rate)
            if window_size is not None and index % 2 == 0:
                return layers.LocallyGroupedAttention(dim, heads, window_size, window_padding, *drops)
            return layers.GlobalSubsampledAttention(dim, heads, sr_ratios[stage], *drops)

        with torch.device(torch.get_default_device() if device is None else device):
            in_dims = (in_chans, *embed_dims[:-1])
            patch_sizes = (4, *[2] * (len(depths) - 1))
            drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
            self.patch_embeds = nn.ModuleList(map(layers.PatchEmbed, in_dims, embed_dims, patch_sizes))
            self.pos_block = nn.ModuleList(map(layers.PositionalEncodingGenerator, embed_dims))
            self.blocks = nn.ModuleList(
                layers.Stage(
                    layers.Block(dim, make_attention(stage, index), mlp_ratios[stage], proj_drop_rate, next(drop_paths))
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
                {"module": self._last_module(i), "num_chs": dim, "reduction": 4 * 2**i}
                for i, dim in enumerate(embed_dims)
            ]
            self.apply(_init_weights)
        self.to(dtype=dtype)

    def _last_module(self, stage: int) -> str:
        """Return the name of the module that returns the output of a stage, for timm's feature extractors."""
        if self.stage_norm:
            return f"norm_list.{stage}"
        return f"blocks.{stage}" if len(self.blocks[stage]) > 1 else f"pos_block.{stage}"

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
        """Return `(tokens, maps)`, or only the maps, of images `(B, in_chans, H, W)`, as timm's models do.

        The maps are the outputs of the stages `indices`: a number of last stages or a sequence of stages; None for all.
        If the last stage was computed, the tokens are those of `forward_features`.
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

        `indices` is a number of last stages or a sequence of stages. `prune_norm` removes the final norm in any case,
        `prune_head` the head. Returns the indices of the chosen stages.
        """
        wanted, last_wanted = feature_take_indices(len(self.blocks), indices)
        keep = last_wanted + 1
        prune_stages = keep < len(self.blocks)
        for name in self._stage_lists():
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
    def freeze_stages(self, count: int) -> None:
        """Freeze the first `count` stages for fine-tuning: no gradients and, also after `train()`, no drop path."""
        for name in self._stage_lists():
            getattr(self, name)[:count].requires_grad_(False)
        for stage in self.blocks[:count]:
            for block in stage:
                block.drop_path = nn.Identity()

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
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with random weights; 0 classes to remove it."""
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(_init_weights)
        parameter = next(self.parameters())
        self.head.to(device=parameter.device, dtype=parameter.dtype).train(self.training)

    def _stage_lists(self) -> list[str]:
        """Return the names of the lists of modules that have one entry for each stage."""
        return ["patch_embeds", "pos_block", "blocks"] + (["norm_list"] if self.stage_norm else [])

    def _to_channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """Check the images and view them as `(B, H, W, in_chans)`."""
        check_image_size(x.shape[-2], x.shape[-1])
        return x.permute(0, 2, 3, 1)

    def _forward_stage(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        """Map tokens `(B, H, W, C_in)` of the previous stage to tokens `(B, H', W', C)` of this one."""
        x = self.patch_embeds[stage](x)
        x = self.blocks[stage](x, self.pos_block[stage], self.grad_checkpointing and self.training)
        return self.norm_list[stage](x) if self.stage_norm else x


@register_notrace_function
def check_image_size(height: int, width: int) -> None:
    """Raise a TwinsError for images that are too small."""  # The name is public: FX would not register `_check`.
    if torch.jit.is_tracing():
        return  # the sizes of the graph are open
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
        "pool_size": (7, 7),
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


def _create(variant: str, pretrained: bool, kwargs: dict, **config) -> nn.Module:
    """Build a variant with the hyperparameters `config`, unless the arguments `kwargs` of the user differ."""
    if not kwargs.get("pretrained_cfg") and get_pretrained_cfg(variant) is None:
        kwargs["pretrained_cfg"] = _cfg()  # a variant of the user without an entry above
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(Twins, variant, pretrained, feature_cfg=feature_cfg, **(config | kwargs))


def _register(variant: str, description: str, **config) -> Callable[..., nn.Module]:
    """Register a variant with timm and return its entry point."""

    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(variant, pretrained, kwargs, **config)

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = description
    return register_model(create)


PCPVT = {"embed_dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4)}
TINY = {"embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4)}  # for tests and first runs
SVT_TINY = TINY | {"mlp_ratios": (2, 2, 4, 4)}
SVT_BASE = {"embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
SVT_LARGE = {"embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}

pcpvt_tiny = _register("pcpvt_tiny", "Twins-PCPVT with 1.3 M parameters.", **(PCPVT | TINY), depths=(1, 2, 2, 2))
pcpvt_small = _register("pcpvt_small", "Twins-PCPVT-S.", **PCPVT, depths=(3, 4, 6, 3))
pcpvt_base = _register("pcpvt_base", "Twins-PCPVT-B.", **PCPVT, depths=(3, 4, 18, 3))
pcpvt_large = _register("pcpvt_large", "Twins-PCPVT-L.", **PCPVT, depths=(3, 8, 27, 3))

alt_gvt_tiny = _register(
    "alt_gvt_tiny", "Twins-SVT with 1.0 M parameters.", window_size=7, depths=(1, 1, 4, 1), **SVT_TINY
)
alt_gvt_small = _register("alt_gvt_small", "Twins-SVT-S.", window_size=7, depths=(2, 2, 10, 4))
alt_gvt_base = _register("alt_gvt_base", "Twins-SVT-B.", window_size=7, depths=(2, 2, 18, 2), **SVT_BASE)
alt_gvt_large = _register("alt_gvt_large", "Twins-SVT-L.", window_size=7, depths=(2, 2, 18, 2), **SVT_LARGE)

# Names of the original.
register_model_deprecations(__name__, {f"pcpvt_{size}_v0": f"pcpvt_{size}" for size in ("small", "base", "large")})
