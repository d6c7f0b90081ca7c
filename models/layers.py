"""Layers of Twins: patch embedding, PEG, the two attentions LSA and GSA, and the transformer block.

Tokens are channels-last, `(B, H, W, C)`, so that convolutions, norms and linear layers use the same memory layout.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, use_fused_attn
from timm.models import register_notrace_function, register_notrace_module
from torch import nn
from torch.utils.checkpoint import checkpoint

WINDOW_PADDINGS = ("mask", "zero", "released")
MOST_WINDOWS = {"cuda": 65_535}  # that torch's fused attention takes, by type of device: a limit of the grid of kernels


def conv_channels_last(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to channels-last tokens: `(B, H, W, C)` -> `(B, H', W', C')`, without a copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def concatenate(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Concatenate tensors; a single one is returned without a copy."""
    return torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]


@register_notrace_function
def to_autocast_type(x: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to the data type of autocast, once for all layers that take it; without autocast return it."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _is_known_multiple(side: int, window: int) -> bool:
    """Return True if a side is a multiple of the window. In a captured graph for many sizes this is unknown: False."""
    if not torch.compiler.is_compiling():
        return not torch.jit.is_tracing() and side % window == 0
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


class Attention(nn.Module):
    """Multi-head attention of queries to keys and values: torch's fused function or, if timm disables it, in steps."""

    def __init__(self, num_heads: int, attn_drop: float):
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.attn_drop = nn.Dropout(attn_drop)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the weighted sums of the values for queries `(B, heads, queries, C / heads)`, in the same shape.

        Keys and values are `(B, heads, keys, C / heads)`. `real`, `(B, 1, 1, keys)`, is False for keys that take no
        part; None if all do.
        """
        if self.fused_attn:
            dropout = self.attn_drop.p if self.attn_drop.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=real, dropout_p=dropout)
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, queries, keys)
        if real is not None:
            weights = weights.masked_fill(~real, -torch.inf)
        return self.attn_drop(weights.softmax(dim=-1)) @ v


@register_notrace_module  # the windows depend on the size
class LocallyGroupedAttention(Attention):
    """LSA of Twins-SVT: attention inside windows of `window_size` x `window_size` tokens.

    If a side of the map is not a multiple of the window, the last windows extend beyond the right or lower border.
    With `window_padding="mask"` the padding takes no part in attention: these windows are just smaller. With `"zero"`
    it takes part as zero vectors. `"released"` is what the original's segmentation models do, because of an error in
    their mask: the padding is masked if both sides are padded, and zeros if only one is. Without padding all are the
    same.
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
        super().__init__(num_heads, attn_drop)
        self.window_size = window_size
        self.window_padding = window_padding
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, H, W, C)` to the same shape."""
        _, H, W, _ = x.shape
        size = self.window_size
        captured = torch.compiler.is_compiling() or torch.jit.is_tracing()  # in a graph, which must serve all sizes
        if _is_known_multiple(H, size) and _is_known_multiple(W, size):
            x = self.attend_map(x)
        elif captured or not self.fused_attn:  # in steps all windows at once, so that tools see all weights
            x = self.attend_by_index(x)
        elif self.pads_with_zeros(H, W):
            x = self.attend_map(F.pad(x, (0, 0, 0, -W % size, 0, -H % size)))[:, :H, :W]
        else:
            bands = []
            for band in self.split(x, dim=1):
                bands.append(concatenate([self.attend_map(part) for part in self.split(band, dim=2)], dim=2))
            x = concatenate(bands, dim=1)
        return self.proj_drop(x)

    def pads_with_zeros(self, height: int, width: int) -> bool:
        """Return True if the padding of a map takes part in attention as zeros."""
        one_side = (height % self.window_size == 0) != (width % self.window_size == 0)
        return self.window_padding == "zero" or (self.window_padding == "released" and one_side)

    def split(self, x: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Split a map into the whole windows and the rest, without empty parts."""
        remainder = x.shape[dim] % self.window_size
        parts = x.split([x.shape[dim] - remainder, remainder], dim=dim)
        return [part for part in parts if part.shape[dim] > 0]

    def attend_map(self, x: torch.Tensor) -> torch.Tensor:
        """Attend inside windows of a map `(B, H, W, C)`, whose sides are multiples of the window or smaller than it."""
        B, H, W, C = x.shape
        height, width = min(H, self.window_size), min(W, self.window_size)
        rows, cols = H // height, W // width
        # Rearranging into windows before the projection to q, k and v moves a third of the memory.
        x = x.reshape(B, rows, height, cols, width, C).transpose(2, 3).reshape(-1, C)
        x = self.attend_windows(x, height * width).reshape(B, rows, cols, height, width, C)
        return x.transpose(2, 3).reshape(B, H, W, C)

    def attend_by_index(self, x: torch.Tensor) -> torch.Tensor:
        """Attend inside windows of a map `(B, H, W, C)`, in a single captured graph for all sizes."""
        B, H, W, C = x.shape
        source, below, right = self.index_windows(B, H, W, x.device)
        inside = ~(below | right)
        x = x.reshape(-1, C).index_select(0, source)
        if self.window_padding != "mask":
            x = x * inside[:, None]
        if self.window_padding == "released":
            inside = inside | (below.any() != right.any())  # zeros take part if only one side is padded
        real = None if self.window_padding == "zero" else inside.view(-1, 1, 1, self.window_size**2)
        x = self.attend_windows(x, self.window_size**2, real)
        return x.index_select(0, self.index_map(B, H, W, x.device)).view(B, H, W, C)

    def index_windows(self, B: int, H: int, W: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return where the tokens of all windows come from.

        The compiler makes sizes of one constants of a graph. No size may be one for some maps only, so the windows of
        all images are in one dimension, with a spare window, so that there are at least two. Every window has a token
        that is not padding; the spare one has tokens of the last image, and its output is dropped.

        Returns:
            For each token in the order of windows, int64 or bool `(windows * tokens,)`: its index in the order of rows,
            and whether it is padding below the map and to its right.
        """
        size = self.window_size
        rows, cols = (H + size - 1) // size, (W + size - 1) // size
        windows = B * rows * cols + (1 if torch.compiler.is_compiling() else 0)
        place = torch.arange(windows * size**2, device=device)
        window, token = place // size**2, place % size**2
        band = window // cols  # row of windows, counted through all images
        image = band // rows
        row, col = (band - image * rows) * size + token // size, (window - band * cols) * size + token % size
        line = image.clamp(max=B - 1) * H + row.clamp(max=H - 1)  # row of tokens, counted through all images
        return line * W + col.clamp(max=W - 1), row >= H, col >= W

    def index_map(self, B: int, H: int, W: int, device: torch.device) -> torch.Tensor:
        """Return, for each token in the order of rows, its index in the order of windows, int64 `(B * H * W,)`."""
        size = self.window_size
        rows, cols = (H + size - 1) // size, (W + size - 1) // size
        place = torch.arange(B * H * W, device=device)
        line = place // W
        image = line // H
        row, col = line - image * H, place - line * W
        window = (image * rows + row // size) * cols + col // size
        return window * size**2 + row % size * size + col % size

    def attend_windows(self, x: torch.Tensor, tokens: int, real: torch.Tensor | None = None) -> torch.Tensor:
        """Attend inside windows, `(windows * tokens, C)` -> the same shape.

        `real`, `(windows, 1, 1, tokens)`, is False for padding; None if all tokens take part.
        """
        most = MOST_WINDOWS.get(x.device.type)
        if most is None or not self.fused_attn or torch.jit.is_tracing() or x.shape[0] <= most * tokens:
            return self.attend_chunk(x, tokens, real)
        chunks = x.split(most * tokens)
        masks = [None] * len(chunks) if real is None else real.split(most)
        return torch.cat([self.attend_chunk(chunk, tokens, mask) for chunk, mask in zip(chunks, masks, strict=True)])

    def attend_chunk(self, x: torch.Tensor, tokens: int, real: torch.Tensor | None) -> torch.Tensor:
        """Attend inside so many windows that torch's fused attention takes them at once; see `attend_windows`."""
        C = x.shape[-1]
        qkv = self.qkv(x).view(-1, tokens, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.unbind(2)  # (windows, tokens, heads, C / heads) each
        x = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), real)
        return self.proj(x.transpose(1, 2).reshape(-1, C))


class GlobalSubsampledAttention(Attention):
    """GSA of Twins, the spatial-reduction attention of PVT: keys and values come from a subsampled map.

    The map is subsampled by a convolution with kernel and stride `sr_ratio`. With `sr_ratio=1` this is plain attention.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__(num_heads, attn_drop)
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim * 2)
        self.proj = nn.Linear(dim, dim)
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
        k, v = self.kv(x).reshape(B, -1, 2, self.num_heads, head_dim).unbind(2)  # (B, keys, heads, C / heads) each
        x = self.attend(q, k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).reshape(B, H, W, C)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    """Pre-norm transformer block, `(B, H, W, C)` -> the same shape. `attn` is LSA or GSA."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, proj_drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(to_autocast_type(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.ModuleList):
    """The blocks of a stage, with the PEG after the first one."""

    def forward(self, x: torch.Tensor, peg: nn.Module, checkpointing: bool = False) -> torch.Tensor:
        """Map tokens `(B, H, W, C)` to the same shape; `checkpointing` recomputes each block in the backward pass."""
        for index, block in enumerate(self):
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
            if index == 0:
                x = peg(x)
        return x
