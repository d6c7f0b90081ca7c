"""Linear layers and MLPs that are faster than torch's on a CPU, with the same results and gradients and less memory.

    models.cpu.accelerate(model)

switches them on in a model, whose layers are otherwise `nn.Linear` and timm's `Mlp`. In float32 on a CPU, torch
multiplies matrices with MKL, which reached less than half of the throughput of AVX-512 on AMD processors, and each GELU
is a separate pass over memory. The layers of this file use oneDNN, through the operator that torch.compile uses. An MLP
computes its wide hidden layer in parts that fit into the cache. For the backward pass it only saves the hidden layer
before the GELU and recomputes the GELU. README.md has the measurements.

Accelerated layers still compute as torch's wherever the results could differ or a tool looks at them: on GPUs, in other
data types, under autocast, in small layers, with parameters or parts that were replaced, with hooks, while a graph is
traced or exported, under torch.func, and under dispatch modes and the profiler, which count torch's operations: a
profile shows torch's layers.
"""

import torch
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.autograd import profiler
from torch.nn.modules import module as nn_module
from torch.utils.flop_counter import register_flop_formula

from .layers import concatenate

PART_BYTES = 4 << 20  # size of a part of the hidden layer of an MLP; 2 to 8 MiB are equally fast
ORIGINALS = F.linear, F.gelu, nn.Linear.forward, TimmMlp.forward  # before any tool replaces one of them
LEAST_PRODUCTS = 1 << 21  # multiply-accumulates; in smaller layers the overhead of the call exceeds the gain


def accelerate(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Switch the fast computation of all linear layers and MLPs of a model on or off, in place.

    The names of the parameters stay. Without oneDNN the model does not change. `enabled=False` restores the layers of
    torch and timm, for tools that choose layers by type. Returns the model.
    """
    classes = {nn.Linear: Linear, TimmMlp: Mlp} if enabled else {Linear: nn.Linear, Mlp: TimmMlp}
    if AVAILABLE:
        for layer in model.modules():
            if type(layer) in classes:
                layer.__class__ = classes[type(layer)]
    return model


def _is_available() -> bool:
    """Return True if torch has oneDNN and all private functions that this file calls."""
    x = torch.ones(1, 1)
    try:  # call each of them as the code below does
        _is_observed()
        _has_hooks(nn.Identity())
        torch.ops.mkldnn._linear_pointwise(x, x, x[0], "gelu", [], "none")
        return torch.backends.mkldnn.is_available()
    except Exception:  # other versions of torch may raise any error
        return False


def _has_hooks(layer: nn.Module) -> bool:
    """Return True if a layer has forward or backward hooks of its own."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(hooks)


def _is_observed() -> bool:
    """Return True if operations are traced, transformed, counted or replaced, or modules have global hooks."""
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
        or torch.autograd.forward_ad._current_level >= 0  # forward-mode differentiation
        or torch._C._len_torch_dispatch_stack() > 0  # among others FlopCounterMode
        or profiler._is_profiler_enabled
        or nn_module._has_any_global_hook()
        or (F.linear, F.gelu, nn.Linear.forward, TimmMlp.forward) != ORIGINALS  # replaced, as counters do
    )


AVAILABLE = _is_available()


def _is_fast(x: Tensor, layer: nn.Linear) -> bool:
    """Return True if this file computes a layer `(..., in) -> (..., out)` for this input."""
    weight = layer.weight
    return (
        type(x) is Tensor
        and type(weight) is type(layer.bias) is nn.Parameter  # not quantised, parametrised, or without a bias
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] == weight.shape[1]  # otherwise torch raises its error
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not _has_hooks(layer)
        and (  # a compiled graph must not depend on the size
            torch.compiler.is_compiling() or (x.numel() * weight.shape[0] >= LEAST_PRODUCTS and not _is_observed())
        )
    )


class Linear(nn.Linear):
    """Linear layer, `(..., in_features)` -> `(..., out_features)`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_fast(x, self):
            return super().forward(x)
        return linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)


class Mlp(TimmMlp):
    """MLP with one hidden layer and an exact GELU, `(..., C)` -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.is_plain() and _is_fast(x, self.fc1)):
            return super().forward(x)
        arguments = x.reshape(-1, x.shape[-1]), self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        output = mlp_training(*arguments)[0] if torch.is_grad_enabled() else mlp(*arguments)
        return output.view(*x.shape[:-1], -1)

    def is_plain(self) -> bool:
        """Return True if no part is replaced, patched or has hooks, and no dropout is active."""
        parts = {self.fc1: Linear, self.act: nn.GELU, self.norm: nn.Identity, self.fc2: Linear}
        drops = self.drop1, self.drop2
        return (
            all(type(part) is kind for part, kind in parts.items())
            and not any("forward" in vars(part) or _has_hooks(part) for part in (*parts, *drops))
            and all(type(drop) is nn.Dropout and not (drop.training and drop.p > 0) for drop in drops)
            and type(self.fc2.weight) is type(self.fc2.bias) is nn.Parameter
            and self.fc2.weight.dtype == torch.float32
            and self.act.approximate == "none"
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Return `activation(x @ weight.T + bias)`, computed by oneDNN; `activation` is `"none"` or `"gelu"`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def _multiply_tokens(left: Tensor, right: Tensor) -> Tensor:
    """Return `left.T @ right`, `(tokens, M), (tokens, N) -> (M, N)`; the narrower matrix is transposed in memory."""
    if left.shape[1] <= right.shape[1]:
        return _multiply(left.t(), right.t())
    return _multiply(right.t(), left.t()).t().contiguous()


@torch.library.custom_op(f"{__package__}::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `x @ weight.T + bias`, `(tokens, in) -> (tokens, out)`."""
    return _multiply(x, weight, bias)


linear.register_fake(lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))


@torch.library.custom_op(f"{__package__}::linear_backward", mutates_args=(), device_types="cpu")
def linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input, the weight and the bias of `linear`."""
    grad = grad.contiguous()  # one copy for all three results
    return _multiply(grad, weight.t()), _multiply_tokens(grad, x), grad.sum(0)


linear_backward.register_fake(
    lambda grad, x, weight: (x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0]))
)


def _differentiate_linear(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # for gradients of gradients, in differentiable operations
        return grad @ weight, grad.t() @ x, grad.sum(0)
    return linear_backward(grad, x, weight)


linear.register_autograd(
    _differentiate_linear, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2])
)


@torch.library.custom_op(f"{__package__}::mlp", mutates_args=(), device_types="cpu")
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Return `gelu(x @ weight1.T + bias1) @ weight2.T + bias2`, `(tokens, in) -> (tokens, out)`; not differentiable."""
    parts = _split(x, hidden=len(weight1))
    return concatenate([_multiply(_multiply(part, weight1, bias1, "gelu"), weight2, bias2) for part in parts])


mlp.register_fake(lambda x, weight1, bias1, weight2, bias2: x.new_empty(x.shape[0], weight2.shape[0]))


@torch.library.custom_op(f"{__package__}::mlp_training", mutates_args=(), device_types="cpu")
def mlp_training(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of `mlp` and the hidden layer before the GELU, `(tokens, hidden)`."""
    hidden = _multiply(x, weight1, bias1)
    parts = _split(hidden, hidden=len(weight1))
    return concatenate([_multiply(F.gelu(part), weight2, bias2) for part in parts]), hidden


@mlp_training.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight2.shape[0]), x.new_empty(x.shape[0], weight1.shape[0])


@torch.library.custom_op(f"{__package__}::mlp_backward", mutates_args=(), device_types="cpu")
def mlp_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the input, the weights and the biases of `mlp_training`."""
    grad_x, grad_parameters = [], None
    width = len(weight1)
    parts = zip(_split(grad.contiguous(), width), _split(x, width), _split(hidden, width), strict=True)
    for grad_part, x_part, hidden_part in parts:
        grad_hidden = torch.ops.aten.gelu_backward(_multiply(grad_part, weight2.t()), hidden_part)
        grad_x.append(_multiply(grad_hidden, weight1.t()))
        grad_first = _multiply_tokens(grad_hidden, x_part), grad_hidden.sum(0)
        grad_second = _multiply_tokens(grad_part, F.gelu(hidden_part)), grad_part.sum(0)
        new = [*grad_first, *grad_second]
        if grad_parameters is None:
            grad_parameters = new
        else:
            for total, part in zip(grad_parameters, new, strict=True):
                total.add_(part)
    return concatenate(grad_x), *grad_parameters


@mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, ...]:
    biases = weight1.new_empty(weight1.shape[0]), weight2.new_empty(weight2.shape[0])
    return x.new_empty(x.shape), torch.empty_like(weight1), biases[0], torch.empty_like(weight2), biases[1]


def _save_for_mlp(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the hidden layer has no gradient; do not allocate zeros for it
    ctx.save_for_backward(*inputs[:4], output[1])


def _differentiate_mlp(ctx, grad: Tensor | None, _) -> tuple[Tensor | None, ...]:
    x, weight1, bias1, weight2, hidden = ctx.saved_tensors
    if grad is None:
        return (None,) * 5
    if torch.is_grad_enabled():  # for gradients of gradients, in differentiable operations
        hidden = F.linear(x, weight1, bias1)
        grad_hidden = torch.ops.aten.gelu_backward(grad @ weight2, hidden)
        grad_first = grad_hidden.t() @ x, grad_hidden.sum(0)
        grad_second = grad.t() @ F.gelu(hidden), grad.sum(0)
        return grad_hidden @ weight1, *grad_first, *grad_second
    return mlp_backward(grad, x, hidden, weight1, weight2)


mlp_training.register_autograd(_differentiate_mlp, setup_context=_save_for_mlp)


def _split(x: Tensor, hidden: int) -> tuple[Tensor, ...]:
    """Split tokens `(tokens, C)` into parts whose hidden layer of `hidden` channels fits into the cache."""
    return x.split(max(1, PART_BYTES // (hidden * x.element_size())))


# For a FlopCounterMode around the backward pass alone. It counts the forward pass by torch's operations.
_operators = getattr(torch.ops, __package__)  # named by the package: two copies in one process stay apart
register_flop_formula(_operators.linear_backward)(lambda grad, x, weight, **_: 4 * x[0] * weight.numel())
register_flop_formula(_operators.mlp_backward)(
    lambda grad, x, hidden, weight1, weight2, **_: 4 * x[0] * (weight1.numel() + weight2.numel())
)
