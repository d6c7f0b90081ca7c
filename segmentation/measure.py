"""Count the parameters and operations of the published UPerNets, and measure time and memory of one of them.

python measure.py                               # counts
python measure.py --time configs/upernet_alt_gvt_s_512x512_160k_ade20k_swin_setting.py
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose file names might shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from core.meters import peak_memory
from dense.experiments import load_experiment
from models.complexity import count_module_macs
from segmentation.network import Segmentor, build_segmentor

CLASSES = 150
PUBLISHED_G = {"pcpvt_s": 234, "pcpvt_b": 250, "pcpvt_l": 269, "alt_gvt_s": 228, "alt_gvt_b": 261, "alt_gvt_l": 297}
CONFIG = "upernet_{}_512x512_160k_ade20k_swin_setting.py"
REPEATS = 5  # of which the first is a warm-up and does not count


def build(config: str | Path) -> Segmentor:
    """Build the network of an experiment for ADE20K, with random weights."""
    return build_segmentor(load_experiment(config), CLASSES, pretrained=False)


def print_counts() -> None:
    """Print a line for each published UPerNet."""
    print(f"{'UPerNet with':<14}{'parameters':>12}{'G at 512x512':>14}{'published':>11}{'G at 512x2048':>15}")
    for name, published in PUBLISHED_G.items():
        with torch.device("meta"):
            model = build(Path(__file__).parent / "configs" / CONFIG.format(name))
            counts = [count_module_macs(model, torch.empty(1, 3, 512, width)).total / 1e9 for width in (512, 2048)]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:<14}{parameters:>12,}{counts[0]:>14.1f}{published:>11}{counts[1]:>15.1f}")


def measure(what: str, config: str, device: torch.device) -> None:
    """Print the median time and the peak memory of one training step or one inference, in fp32."""
    model = build(config).to(device, memory_format=torch.channels_last)
    run = {"train": training_step, "test": inference}[what](model, device)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    what = {"train": "training step, 2 images of 512x512", "test": "inference, 1 image of 512x2048"}[what]
    memory = peak_memory(device) / 2**20
    print(f"{what:<36}{statistics.median(times[1:]):8.2f} s{memory:8.0f} MiB peak   ({device})")


def training_step(model: Segmentor, device: torch.device) -> Callable[[], None]:
    """Return a whole step with AdamW on two crops, the least that the BatchNorm of a pooled map can do with."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=6e-5)
    images = torch.randn(2, 3, 512, 512, device=device)
    labels = torch.randint(CLASSES, (2, 512, 512), device=device)

    def run() -> None:
        sum(model(images, labels).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def inference(model: Segmentor, device: torch.device) -> Callable[[], None]:
    """Return the inference of one image."""
    image = torch.randn(1, 3, 512, 2048, device=device)
    return torch.inference_mode()(lambda: model.eval()(image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", metavar="CONFIG", help="measure the network of this experiment")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--what", choices=("train", "test"), help=argparse.SUPPRESS)  # of the process of its own
    args = parser.parse_args()
    if not args.time:
        print_counts()
    elif args.what:
        measure(args.what, args.time, torch.device(args.device))
    else:  # a process each: the peak memory of a process never falls
        for what in ("train", "test"):
            command = [sys.executable, __file__, "--time", args.time, "--device", args.device, "--what", what]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
