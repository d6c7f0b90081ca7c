"""Where a Twins classifier looks: attention maps of blocks, and Grad-CAM (https://arxiv.org/abs/1610.02391)."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LocallyGroupedAttention
from .twins import Twins, TwinsError


@torch.no_grad()
def attention_maps(model: Twins, images: Tensor, blocks: Sequence[str]) -> dict[str, Tensor]:
    """Return how much attention each position of chosen blocks receives, as the mean over heads and queries.

    In GSA a position is a token of the subsampled map, and the queries are all tokens; in LSA it is a token of the map,
    and the queries are those of its window. So the map of a GSA block sums to 1, and in LSA each window does, unless
    padding takes part.

    Args:
        model: Twins model in evaluation mode.
        images: Normalised images `(B, 3, H, W)`.
        blocks: Names of blocks, such as `"blocks.2.3"`: block 3 of stage 2, counted from 0.

    Returns:
        Maps `(B, h, w)` by the name of the block.

    Raises:
        TwinsError: If there is no such block.
    """
    check_blocks(model, blocks)
    weights = {}  # (B, heads, queries, keys), in LSA (windows, heads, tokens, tokens)

    def keep_weights(name: str, _module, _inputs, output):
        weights[name] = output

    with torch.compiler.set_stance("force_eager"), ExitStack() as stack:  # compiled code does not call new hooks
        for name in blocks:
            attention = model.get_submodule(name).attn
            stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = False  # the fused function does not return its weights
            stack.enter_context(attention.attn_drop.register_forward_hook(partial(keep_weights, name)))
        model(images)
    maps = {}
    for name in blocks:
        stride = model.feature_info[int(name.split(".")[1])]["reduction"]
        size = images.shape[2] // stride, images.shape[3] // stride
        maps[name] = _received(model.get_submodule(name).attn, weights[name], *size, len(images))
    return maps


def check_blocks(model: Twins, blocks: Sequence[str]) -> None:
    """Raise a TwinsError if a model has no block of one of the names."""
    known = [f"blocks.{stage}.{i}" for stage, part in enumerate(model.blocks) for i in range(len(part))]
    for name in blocks:
        if name not in known:
            raise TwinsError(f"block {name!r} is unknown; choose from {known[0]} to {known[-1]}, blocks.STAGE.BLOCK")


def grad_cam(model: Twins, images: Tensor, classes: Tensor) -> Tensor:
    """Return the Grad-CAM of classes, on the output of stride 16: how much the parts of images speak for them.

    Args:
        model: Twins classifier in evaluation mode.
        images: Normalised images `(B, 3, H, W)`.
        classes: Class index of each image, int64 `(B,)`.

    Returns:
        Maps `(B, h, w)`, at least 0.
    """
    outputs = []
    hook = model.blocks[2].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with hook, torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(images)
        chosen = logits.gather(1, classes[:, None]).sum()
        (tokens,) = outputs
        (gradient,) = torch.autograd.grad(chosen, tokens)
    importance = gradient.mean(dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
    return (importance * tokens.detach()).sum(dim=3).clamp(min=0)


def _received(attention: nn.Module, weights: Tensor, height: int, width: int, count: int) -> Tensor:
    """Return the mean weight of each key `(B, h, w)`; the weights are those that `attention_maps` keeps."""
    weights = weights.mean(dim=1)  # (windows, queries, keys) in LSA
    if not isinstance(attention, LocallyGroupedAttention):
        ratio = attention.sr_ratio
        return weights.mean(dim=1).view(count, height // ratio, width // ratio)
    size = attention.window_size
    rows, cols = -(-height // size), -(-width // size)
    padded = F.pad(weights.new_ones(height, width), (0, cols * size - width, 0, rows * size - height))
    real = padded.view(rows, size, cols, size).transpose(1, 2).reshape(rows * cols, size**2, 1)  # 0 for padding
    weights = weights.view(count, rows * cols, size**2, size**2)
    received = (weights * real).sum(dim=2) / real.sum(dim=1)  # (B, windows, keys)
    windows = received.view(count, rows, cols, size, size).transpose(2, 3)
    return windows.reshape(count, rows * size, cols * size)[:, :height, :width]
