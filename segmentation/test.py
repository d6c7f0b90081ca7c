"""Test a segmentation network of configs/ on the validation set: mIoU and its relatives, by class and in all.

    bash dist_test.sh configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py checkpoint_file 8 --eval mIoU
    bash dist_test.sh configs/upernet_alt_gvt_tiny_shapes.py checkpoint_file 1 --show-dir pictures

Bad input ends with one line that names it and a non-zero exit code; --traceback shows where it was found.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose file names might shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from core.distributed import Processes
from core.images import save_png
from core.launch import run_script
from core.options import ArgumentParser, choose_amp, compile_if_asked
from core.signals import signals_noted
from dense.training import build_experiment, describe, get_test_parser
from segmentation.configs.recipes import Experiment
from segmentation.metrics import evaluate
from segmentation.network import IGNORED_LABEL, build_segmentor
from segmentation.pictures import draw_overlay
from segmentation.train import build_eval_loader, inference_options
from segmentation.weights import load_segmentor
from utils import make_folder

logger = logging.getLogger("twins")


def get_parser() -> ArgumentParser:
    parser = get_test_parser(__doc__)
    group = parser.add_argument_group("test")
    group.add_argument(
        "--eval",
        nargs="+",
        choices=("mIoU",),
        default=["mIoU"],
        metavar="mIoU",
        help="the figures to report; mAcc and aAcc come with mIoU",
    )
    group.add_argument(
        "--aug-test", action="store_true", help="average over the experiment's test_ratios, each mirrored, too"
    )
    group.add_argument("--out", metavar="FOLDER", help="write the predictions as PNG, with the labels of the data set")
    group.add_argument("--show-dir", metavar="FOLDER", help="write pictures: image, prediction, labels and a legend")
    return parser


def run_test(args: argparse.Namespace, processes: Processes) -> None:
    """Test the weights of a file and report the figures."""
    experiment = build_experiment(args, Experiment)
    loader = build_eval_loader(args, experiment, processes, experiment.test_ratios if args.aug_test else (1.0,))
    dataset = loader.dataset.dataset
    classes = dataset.classes
    write = build_writer(dataset, args.out, args.show_dir)
    model = build_segmentor(experiment, len(classes), pretrained=False)
    logger.info("%s", load_segmentor(model, args.checkpoint))
    model.to(processes.device)
    compile_if_asked(model, args.compile)
    with signals_noted():
        matrix = evaluate(
            model,
            loader,
            processes.device,
            len(classes),
            amp_dtype=choose_amp(args.amp, processes.device),
            on_prediction=write,
            flip=args.aug_test,
            **inference_options(experiment),
        )
    logger.info("%s\n%s", matrix.table(classes), describe(matrix.summary()))


def build_writer(dataset: Dataset, out: str | None, show_dir: str | None) -> Callable[[int, Tensor], None]:
    """Return a function that writes the prediction of an image to the folders that are asked for."""
    for folder in filter(None, (out, show_dir)):
        make_folder(Path(folder))

    def write(index: int, prediction: Tensor) -> None:
        if out:
            labels = prediction.numpy().astype(np.uint8) + dataset.first_label
            save_png(Image.fromarray(labels), Path(out) / dataset.name(index))
        if show_dir:
            image, labels = dataset[index]
            maps = {"prediction": prediction.numpy(), "labels": labels.numpy()}
            overlay = draw_overlay(to_pil_image(image), maps, dataset.classes, dataset.colours, IGNORED_LABEL)
            save_png(overlay, Path(show_dir) / dataset.name(index))

    return write


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `command_line.run_script` for how it ends."""
    parser = get_parser()
    run_script(parser.prog, run_test, parser.parse_args(argv))


if __name__ == "__main__":
    main()
