"""Test a segmentation network of configs/ on the validation set: mIoU, mAcc and aAcc, overall and per class.

    bash dist_test.sh configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py checkpoint_file 8 --eval mIoU
    bash dist_test.sh configs/upernet_alt_gvt_tiny_shapes.py checkpoint_file 1 --show-dir pictures --out predictions
    bash dist_test.sh configs/upernet_alt_gvt_tiny_shapes.py predictions 1

The last evaluates predictions that --out has written, without the network.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # instead of this folder, whose file names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from core.distributed import Processes
from core.images import save_png
from core.launch import run_script
from core.options import ArgumentParser, choose_amp
from core.signals import signals_noted
from dense.training import build_experiment, describe, get_test_parser, prepare_test
from segmentation.configs.recipes import Experiment
from segmentation.metrics import build_reader, evaluate
from segmentation.network import build_predictor, build_segmentor
from segmentation.pictures import draw_overlay
from segmentation.train import build_eval_loader
from segmentation.weights import load_segmentor
from utils import UserError, make_folder

logger = logging.getLogger("twins")


def get_parser() -> ArgumentParser:
    """Return the parser of test.py."""
    parser = get_test_parser(__doc__)
    group = parser.add_argument_group("test")
    group.add_argument(
        "--eval",
        nargs="+",
        choices=("mIoU",),
        default=["mIoU"],
        metavar="mIoU",
        help="figures to report; mIoU includes mAcc and aAcc",
    )
    group.add_argument(
        "--aug-test", action="store_true", help="average over the experiment's test_ratios, each with its mirror image"
    )
    group.add_argument(
        "--out", metavar="FOLDER", help="write the predictions to this folder as PNG, with the data set's labels"
    )
    group.add_argument(
        "--format-only", action="store_true", help="predict the test part, which has no labels; needs --out"
    )
    group.add_argument(
        "--show-dir", metavar="FOLDER", help="write pictures of image, prediction, labels and legend to this folder"
    )
    return parser


def run_test(args: argparse.Namespace, processes: Processes) -> None:
    """Test the weights of a file, or the predictions in a folder, and log the figures."""
    experiment = build_experiment(args, Experiment)
    if args.format_only and not args.out:
        raise UserError("--format-only: there is no folder to write to; name it with --out")
    ratios = experiment.test_ratios if args.aug_test else (1.0,)
    loader = build_eval_loader(args, experiment, processes, ratios, "test" if args.format_only else "val")
    dataset = loader.dataset.dataset
    classes = dataset.classes
    if Path(args.checkpoint).is_dir():
        if args.out:
            raise UserError(f"{args.checkpoint}: predictions are only evaluated; remove --out and --format-only")
        predict_image = build_reader(Path(args.checkpoint), dataset)
    else:
        model = build_segmentor(experiment, len(classes), pretrained=False)
        prepare_test(args, model, load_segmentor, classes, processes.device)
        amp_dtype = choose_amp(args.amp, processes.device)
        predict_image = build_predictor(model, experiment, amp_dtype, flip=args.aug_test)
    write = build_writer(dataset, args.out, args.show_dir)
    with signals_noted():
        matrix = evaluate(predict_image, loader, processes.device, len(classes), on_prediction=write)
    if args.format_only:
        logger.info("wrote predictions of %d images to %s", len(dataset), args.out)
    else:
        logger.info("%s\n%s", matrix.table(classes), describe(matrix.summary()))


def build_writer(dataset: Dataset, out: str | None, show_dir: str | None) -> Callable[[int, Tensor, Tensor], None]:
    """Return a function that writes the prediction of an image to the folders that are given."""
    for folder in filter(None, (out, show_dir)):
        make_folder(Path(folder))

    def write(index: int, prediction: Tensor, labels: Tensor) -> None:
        if out:
            stored = prediction.numpy().astype(np.uint8) + dataset.first_label
            save_png(Image.fromarray(stored), Path(out) / dataset.name(index))
        if show_dir:
            maps = {"prediction": prediction, "labels": labels}
            overlay = draw_overlay(dataset[index][0], maps, dataset.classes, dataset.colours)
            save_png(overlay, Path(show_dir) / dataset.name(index))

    return write


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `core.launch.run_script` for the exit codes."""
    parser = get_parser()
    run_script(parser.prog, run_test, parser.parse_args(argv))


if __name__ == "__main__":
    main()
