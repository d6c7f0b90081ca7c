"""Numbers of parameters and multiply-accumulates (MACs) of models."""

import copy
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

NORM_OPERATIONS = 5  # operations per normalised element, as in the counter of the original


class Macs(NamedTuple):
    """Multiply-accumulates per image, in two conventions."""

    layers: int  # of convolutions, linear layers and norms, as in the README of the original
    total: int  # including the two matrix products of attention, as in the paper


def count_macs(name: str, input_size: int | tuple[int, int] = 224, **kwargs) -> Macs:
    """Count the multiply-accumulates per image of a model of this package or of timm, on torch's meta device.

    `input_size` is the side length in pixels, or height and width; `kwargs` are arguments of timm's `create_model`.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    with torch.device("meta"):
        return count_module_macs(timm.create_model(name, **kwargs), torch.empty(1, 3, *size))


def count_module_macs(model: nn.Module, *inputs: Tensor) -> Macs:
    """Count the multiply-accumulates of a module, by copies on the meta device: attention on a CPU is not counted."""
    model, inputs = copy.deepcopy(model).to("meta").eval(), [x.to("meta") for x in inputs]
    normalised = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _module, _inputs, output: normalised.append(output.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    flops = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    norms = NORM_OPERATIONS * sum(normalised)
    attention = sum(count for operation, count in flops.items() if "bmm" in operation or "attention" in operation)
    total = sum(flops.values()) // 2 + norms  # the counter counts a multiply-accumulate as two operations
    return Macs(total - attention // 2, total)


def count_module_parameters(model: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in model.parameters())
