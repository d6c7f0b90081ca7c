"""Print parameters and multiply-accumulates of models, in both conventions in use.

python benchmark.py
python benchmark.py alt_gvt_small twins_svt_small --input-size 384
"""

import argparse
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models  # noqa: F401  registers our models

PUBLISHED = ("pcpvt_small", "pcpvt_base", "pcpvt_large", "alt_gvt_small", "alt_gvt_base", "alt_gvt_large")
NORM_OPERATIONS = 5  # counted for each normalised element, as the original's counter does


class Macs(NamedTuple):
    """Multiply-accumulates of one image, in two conventions."""

    layers: int  # convolutions, linear layers and norms: the convention of the original's README
    total: int  # with the two matrix products of attention: the convention of the paper


def count_macs(name: str, input_size: int | tuple[int, int] = 224, **kwargs) -> Macs:
    """Count the multiply-accumulates of one image, without computing or allocating anything.

    Args:
        name: A model of `models/twins.py` or of timm.
        input_size: Pixels a side, or height and width.
        **kwargs: Passed to timm's `create_model`.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    with torch.device("meta"):
        return count_module_macs(timm.create_model(name, **kwargs), torch.empty(1, 3, *size))


def count_module_macs(model: nn.Module, *inputs: torch.Tensor) -> Macs:
    """Count the multiply-accumulates of a network, which may be on torch's meta device with its inputs."""
    normalised = []
    for module in model.eval().modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _module, _inputs, output: normalised.append(output.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    flops = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    norms = NORM_OPERATIONS * sum(normalised)
    attention = sum(count for operation, count in flops.items() if "bmm" in operation or "attention" in operation)
    total = sum(flops.values()) // 2 + norms  # the counter takes a multiply-accumulate for two
    return Macs(total - attention // 2, total)


def count_parameters(name: str, **kwargs) -> int:
    """Count the parameters of a model without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, **kwargs).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=PUBLISHED, help="models of models/twins.py or of timm")
    parser.add_argument("--input-size", type=int, default=224, help="pixels a side (default: 224)")
    args = parser.parse_args()
    print(f"{'model':<24}{'parameters':>14}{'conv + linear + norm':>24}{'with attention':>18}")
    for name in args.models:
        macs = count_macs(name, args.input_size)
        print(f"{name:<24}{count_parameters(name):>14,}{macs.layers / 1e9:>22.3f} G{macs.total / 1e9:>16.3f} G")


if __name__ == "__main__":
    main()
