"""Linear layers and MLPs that are fast on CPUs: the same results and gradients as torch's, in less time and memory.

In float32 on a CPU, torch multiplies matrices by MKL, which on AMD's processors came to less than half of what AVX-512
can do, and makes a pass of its own over memory for each GELU. Here oneDNN multiplies, by the operator that
torch.compile uses for it, and an MLP goes through its wide hidden layer in parts that stay in the cache. Training keeps
the hidden layer before its GELU alone and computes the GELU again in the backward pass. README.md has the figures.

Everywhere else (GPUs, other types, autocast, small layers, export, torch.func) the layers are torch's;
`set_enabled(False)` makes them so here, for tools that look for torch's layers and operations.
"""

import torch
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

PART_BYTES = 4 << 20  # of the hidden layer of an MLP; 2 to 8 MiB measured alike
LEAST_PRODUCTS = 1 << 21  # multiply-accumulates; in smaller layers the way to oneDNN takes longer than it saves


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def _is_available() -> bool:
    """Return True if torch has oneDNN and all its private functions that this file calls."""
    x = torch.ones(1, 1)
    try:  # each of them, as below
        torch._C._functorch.peek_interpreter_stack()
        int(torch.autograd.forward_ad._current_level)
        _has_hooks(nn.Identity())
        torch.ops.mkldnn._linear_pointwise(x, x, x[0], "gelu", [], "none")
        return torch.backends.mkldnn.is_available()
    except Exception:  # whatever another torch raises instead
        return False


AVAILABLE = _is_available()
_enabled = AVAILABLE


def set_enabled(enabled: bool) -> None:
    """Choose whether the layers of this file may differ from torch's in how they compute, where they can."""
    global _enabled
    _enabled = enabled and AVAILABLE


def _is_fast(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a layer `(..., in) -> (..., out)` with a weight `(out, in)` is one to compute here."""
    return (
        _enabled
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] == weight.shape[1]  # torch has the better message
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and (torch.compiler.is_compiling() or _is_worth_it(x, weight))  # one compiled graph serves all sizes
    )


def _is_worth_it(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a layer is large enough, and nobody looks at its operations one by one."""
    return (
        not torch.jit.is_tracing()
        and x.numel() * weight.shape[0] >= LEAST_PRODUCTS
        and torch._C._functorch.peek_interpreter_stack() is None  # torch.func
        and torch.autograd.forward_ad._current_level < 0  # forward-mode differentiation
    )


class Linear(nn.Linear):
    """torch's linear layer, `(..., in_features)` -> `(..., out_features)`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or not _is_fast(x, self.weight):
            return super().forward(x)
        return linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)


class Mlp(TimmMlp):
    """timm's MLP with one hidden layer and an exact GELU, `(..., C)` -> the same shape."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__(dim, hidden, drop=drop)
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        # The device first, which is quick to see; the parts before the weight, which others may not have.
        if not (_enabled and x.is_cpu and self.is_plain() and _is_fast(x, self.fc1.weight)):
            return super().forward(x)
        arguments = x.reshape(-1, x.shape[-1]), self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        output = mlp_training(*arguments)[0] if torch.is_grad_enabled() else mlp(*arguments)
        return output.view(x.shape)

    def is_plain(self) -> bool:
        """Tell whether the parts are as they were built: not replaced, hooked or dropping anything."""
        parts = {self.fc1: Linear, self.act: nn.GELU, self.norm: nn.Identity, self.fc2: Linear}
        return (
            all(type(part) is kind and not _has_hooks(part) for part, kind in parts.items())
            and self.act.approximate == "none"
            and not any((self.training and drop.p > 0) or _has_hooks(drop) for drop in (self.drop1, self.drop2))
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """Return `then(x @ weight.T + bias)` by oneDNN, `then` being `"none"` or `"gelu"`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none")


def _multiply_tokens(left: Tensor, right: Tensor) -> Tensor:
    """Return `left.T @ right`, `(tokens, M), (tokens, N) -> (M, N)`; the narrower one is transposed in memory."""
    if left.shape[1] <= right.shape[1]:
        return _multiply(left.t(), right.t())
    return _multiply(right.t(), left.t()).t().contiguous()


# ---------------------------------------------------------------------------------------------------------- linear


@torch.library.custom_op("twins::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `x @ weight.T + bias`, `(tokens, in) -> (tokens, out)`."""
    return _multiply(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("twins::linear_backward", mutates_args=(), device_types="cpu")
def linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input, the weight and the bias of `linear`."""
    grad = grad.contiguous()  # once, for all three
    return _multiply(grad, weight.t()), _multiply_tokens(grad, x), grad.sum(0)


@linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _save_for_linear(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _differentiate_linear(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradients are to be differentiated, too
        return grad @ weight, grad.t() @ x, grad.sum(0)
    return linear_backward(grad, x, weight)


linear.register_autograd(_differentiate_linear, setup_context=_save_for_linear)


# ------------------------------------------------------------------------------------------------------------- MLP


@torch.library.custom_op("twins::mlp", mutates_args=(), device_types="cpu")
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Return `gelu(x @ weight1.T + bias1) @ weight2.T + bias2`, `(tokens, C) -> (tokens, C)`, without a gradient."""
    parts = _split(x, hidden=len(weight1))
    return _cat([_multiply(_multiply(part, weight1, bias1, "gelu"), weight2, bias2) for part in parts])


@mlp.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight2.shape[0])


@torch.library.custom_op("twins::mlp_training", mutates_args=(), device_types="cpu")
def mlp_training(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `mlp` returns, and the hidden layer before its GELU, `(tokens, hidden)`."""
    hidden = _multiply(x, weight1, bias1)
    return _cat([_multiply(F.gelu(part), weight2, bias2) for part in _split(hidden, hidden=len(weight1))]), hidden


@mlp_training.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight2.shape[0]), x.new_empty(x.shape[0], weight1.shape[0])


@torch.library.custom_op("twins::mlp_backward", mutates_args=(), device_types="cpu")
def mlp_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the input, the weights and the biases of `mlp_training`."""
    of_x, sums = [], None
    parts = (_split(each, hidden=len(weight1)) for each in (grad.contiguous(), x, hidden))
    for grad_part, x_part, hidden_part in zip(*parts, strict=True):
        of_hidden = torch.ops.aten.gelu_backward(_multiply(grad_part, weight2.t()), hidden_part)
        of_x.append(_multiply(of_hidden, weight1.t()))
        of_first = _multiply_tokens(of_hidden, x_part), of_hidden.sum(0)
        of_second = _multiply_tokens(grad_part, F.gelu(hidden_part)), grad_part.sum(0)
        new = [*of_first, *of_second]
        sums = new if sums is None else [total.add_(part) for total, part in zip(sums, new, strict=True)]
    return _cat(of_x), *sums


@mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, ...]:
    biases = weight1.new_empty(weight1.shape[0]), weight2.new_empty(weight2.shape[0])
    return x.new_empty(x.shape), torch.empty_like(weight1), biases[0], torch.empty_like(weight2), biases[1]


def _save_for_mlp(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # nothing depends on the hidden layer, which is wide
    ctx.save_for_backward(*inputs[:4], output[1])


def _differentiate_mlp(ctx, grad: Tensor | None, _) -> tuple[Tensor | None, ...]:
    x, weight1, bias1, weight2, hidden = ctx.saved_tensors
    if grad is None:
        return (None,) * 5
    if torch.is_grad_enabled():  # the gradients are to be differentiated, too
        hidden = F.linear(x, weight1, bias1)
        of_hidden = torch.ops.aten.gelu_backward(grad @ weight2, hidden)
        of_second = grad.t() @ F.gelu(hidden), grad.sum(0)
        return of_hidden @ weight1, of_hidden.t() @ x, of_hidden.sum(0), *of_second
    return mlp_backward(grad, x, hidden, weight1, weight2)


mlp_training.register_autograd(_differentiate_mlp, setup_context=_save_for_mlp)


def _split(x: Tensor, hidden: int) -> tuple[Tensor, ...]:
    """Split tokens `(tokens, C)` into parts whose hidden layer stays in the cache."""
    return x.split(max(1, PART_BYTES // (hidden * x.element_size())))


def _cat(parts: list[Tensor]) -> Tensor:
    """Join parts of tokens; a single part is returned as it is, without a copy."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# --------------------------------------------------------------------------------------------------------- counting


def _count_linear(x_shape: torch.Size, weight_shape: torch.Size, *_, **__) -> int:
    return 2 * x_shape[0] * weight_shape.numel()


def _count_mlp(x_shape: torch.Size, weight1_shape: torch.Size, *_, **__) -> int:
    return 4 * x_shape[0] * weight1_shape.numel()


# For torch's FlopCounterMode.
register_flop_formula(torch.ops.twins.linear)(_count_linear)
register_flop_formula(torch.ops.twins.linear_backward)(lambda _, *shapes, **__: 2 * _count_linear(*shapes))
register_flop_formula([torch.ops.twins.mlp, torch.ops.twins.mlp_training])(_count_mlp)
register_flop_formula(torch.ops.twins.mlp_backward)(lambda _, x, __, *shapes, **___: 2 * _count_mlp(x, *shapes))
