"""Test a detector of configs/ on the validation set: box and mask AP, overall and per class.

    bash dist_test.sh configs/retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting.py checkpoint_file 8 --eval mAP
    bash dist_test.sh configs/mask_rcnn_alt_gvt_tiny_shapes.py checkpoint_file 1 --eval bbox segm --show-dir pictures
    bash dist_test.sh configs/mask_rcnn_alt_gvt_tiny_shapes.py results.json 1

The last evaluates results that --out has written, without the network.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # instead of this folder, whose file names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.distributed import Processes, on_main
from core.images import draw_captions, save_png
from core.launch import run_script
from core.options import SHARE, ArgumentParser, choose_amp
from core.signals import signals_noted
from dense.training import build_experiment, describe, get_test_parser, prepare_test
from detection.augmented import AugmentedDetector
from detection.configs.recipes import Experiment
from detection.metrics import find_objects, read_results, summarise, write_results
from detection.network import build_detector
from detection.pictures import describe_none, draw_detections, keep_above
from detection.train import KINDS, build_eval_loader
from detection.weights import load_detector
from utils import UserError, make_folder

logger = logging.getLogger("twins")


def get_parser() -> ArgumentParser:
    """Return the parser of test.py."""
    parser = get_test_parser(__doc__)
    group = parser.add_argument_group("test")
    group.add_argument(
        "--eval",
        nargs="+",
        choices=("mAP", "bbox", "segm"),
        default=["mAP"],
        metavar="KIND",
        help="results to evaluate: bbox, segm, or mAP for all that the detector has",
    )
    group.add_argument("--aug-test", action="store_true", help="merge the objects found at test_scales, with flips")
    group.add_argument("--out", metavar="FILE", help="write the results to this JSON file, in COCO's format")
    group.add_argument(
        "--format-only",
        action="store_true",
        help="find the objects of the test part, which has no annotations; needs --out",
    )
    group.add_argument(
        "--show-dir", metavar="FOLDER", help="write pictures with boxes, masks, class names and scores to this folder"
    )
    group.add_argument(
        "--show-score-thr",
        type=SHARE,
        default=0.3,
        metavar="SCORE",
        help="minimum score of the objects in the pictures",
    )
    return parser


def run_test(args: argparse.Namespace, processes: Processes) -> None:
    """Test the weights of a file, or evaluate results, and log the figures."""
    experiment = build_experiment(args, Experiment)
    kinds = KINDS[experiment.detector]
    wanted = kinds if "mAP" in args.eval else tuple(dict.fromkeys(args.eval))
    if not set(wanted) <= set(kinds):
        raise UserError(f"--eval segm: {experiment.detector} finds no masks; remove segm")
    if args.format_only and not args.out:
        raise UserError("--format-only: there is no file to write; name it with --out")
    loader = build_eval_loader(args, experiment, processes, "test" if args.format_only else "val")
    dataset = loader.dataset
    if Path(args.checkpoint).suffix == ".json":
        if args.out or args.show_dir:
            raise UserError(
                f"{args.checkpoint}: results are only evaluated; remove --out, --format-only and --show-dir"
            )
        results = read_results(Path(args.checkpoint), dataset.coco, wanted)
    else:
        results = detect(args, experiment, loader, processes)
    if args.out:
        on_main(partial(write_results, results, Path(args.out)))
    if args.format_only:
        if results is not None:  # the main process, which alone has them
            logger.info("wrote %d objects in %d images to %s", len(results), len(dataset), args.out)
    else:
        logger.info("%s", describe(summarise(dataset.coco, dataset.ids, results, wanted)))


def detect(
    args: argparse.Namespace, experiment: Experiment, loader: DataLoader, processes: Processes
) -> list[dict] | None:
    """Return the results of the network in COCO's format, in the main process."""
    dataset = loader.dataset
    model = build_detector(experiment, len(dataset.classes), pretrained=False)
    prepare_test(args, model, load_detector, dataset.classes, processes.device)
    if args.aug_test:
        model = AugmentedDetector(model, experiment.test_scales or [experiment.scale])
    show = build_painter(dataset, args.show_dir, args.show_score_thr) if args.show_dir else None
    amp_dtype, ids = choose_amp(args.amp, processes.device), dataset.category_ids
    with signals_noted():
        return find_objects(model, loader, processes.device, ids, amp_dtype=amp_dtype, on_detections=show)


def build_painter(dataset: Dataset, folder: str, min_score: float) -> Callable[[int, dict[str, Tensor]], None]:
    """Return a function that writes a picture of the objects found in an image, beside those of the annotations."""
    make_folder(Path(folder))
    index_of = {image_id: index for index, image_id in enumerate(dataset.ids)}

    def show(image_id: int, found: dict[str, Tensor]) -> None:
        image, target = dataset[index_of[image_id]]
        shown = keep_above(found, min_score)
        title = "found" if len(shown["scores"]) else describe_none(min_score)
        panels = [(title, draw_detections(image, shown, dataset.classes))]
        if dataset.coco.anns:
            truth = {name: target[name] for name in ("boxes", "labels", "masks") if name in found}
            panels.append(("annotated", draw_detections(image, truth, dataset.classes)))
        name = Path(dataset.coco.imgs[image_id]["file_name"])
        inside = [part for part in name.parts if part not in (name.anchor, "..")]
        save_png(draw_captions(panels), Path(folder, *inside))

    return show


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `core.launch.run_script` for the exit codes."""
    parser = get_parser()
    run_script(parser.prog, run_test, parser.parse_args(argv))


if __name__ == "__main__":
    main()
