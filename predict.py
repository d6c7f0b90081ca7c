"""Predict the classes, label maps or objects of your own images with trained weights of any of the three tasks.

    python predict.py output/shapes/checkpoint_best.pth photo.jpg folder --out pictures --json predictions.json
    python predict.py photo.jpg --model alt_gvt_small --pretrained
    find photos -name '*.jpg' | python predict.py checkpoint_best.pth - --csv predictions.csv

A checkpoint of this repository describes its network and its classes. For released weights name the network: --model
for a classifier, --config for an experiment of segmentation/configs or detection/configs. In code:

    from predict import load_predictor

    predictor = load_predictor("checkpoint_best.pth")
    result = predictor("photo.jpg")
    result.draw().save("prediction.png")
"""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg_value
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights
from torchvision.transforms.v2.functional import to_pil_image

import models
from core.description import Description, find_task, read_description
from core.distributed import Processes, choose_device
from core.images import BadImageError, draw_captions, draw_heat, enlarge, log_unused, save_png
from core.launch import one_line, run_script
from core.meters import show_progress
from core.options import (
    POSITIVE_INT,
    SHARE,
    ArgumentParser,
    add_compute_options,
    add_loader_options,
    add_process_options,
    choose_amp,
    compile_if_asked,
    find_fault,
    loader_options,
)
from core.predictor import Predictor, Result, Source, open_image
from core.reports import COLUMNS, LISTS, Report, json_report, table_report
from core.signals import Interrupted, signals_noted, stop_requested
from dense.experiments import load_experiment
from detection.pictures import describe_none
from models.attention import attention_maps, check_blocks, grad_cam
from segmentation.data import ADE20K_CLASSES, read_classes
from segmentation.predictor import Segmentation, SegmentationPredictor
from transforms import build_eval_transform, to_input, to_picture
from utils import UserError, make_folder, require_package

logger = logging.getLogger("twins")

SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif")  # of image files in a folder
# Options of main.py's evaluation, for weights that do not hold those of their training.
EVALUATION = {"input_size": 224, "eval_crop_ratio": 0.875, "data_set": "IMNET"}
# Last layers of the dense networks, ours and those of released weights; entries of a class, and other entries.
CLASS_LAYERS = {
    "segmentation": (["decode_head.conv_seg"], 1, 0),
    "retinanet": (["head.classification_head.cls_logits", "bbox_head.retina_cls"], 9, 0),  # anchors per position
    "mask_rcnn": (["roi_heads.box_predictor.cls_score", "roi_head.bbox_head.fc_cls"], 1, 1),  # the background
}


# --------------------------------------------------------------------------------------------------- classification


@dataclass(frozen=True)
class Classification(Result):
    """Classes of an image."""

    logits: Tensor  # `(classes,)`

    @property
    def probabilities(self) -> Tensor:
        """Probability of each class, `(classes,)`."""
        return self.logits.softmax(dim=0)

    def to_dict(self, topk: int = 5) -> dict[str, Any]:
        """Return the `topk` most probable classes."""
        best = self.logits.topk(min(topk, len(self.classes))).indices
        rows = zip(best.tolist(), self.probabilities[best].tolist(), strict=True)
        return {"classes": [{"name": self.classes[i], "index": i, "probability": share} for i, share in rows]}

    def draw(self, topk: int = 5) -> Image.Image:
        """Return a picture of the image with its `topk` most probable classes below it."""
        rows = self.to_dict(topk)["classes"]
        lines = [f"{row['probability']:.1%}  {row['name']}" for row in rows]
        return draw_captions([("\n".join(lines), enlarge(open_image(self.source, upright=False)))])


class Classifier(Predictor):
    """Predictor of classes, with a classifier of timm's interface."""

    upright = False  # as in training, and as torchvision reads folders of images
    load = staticmethod(models.load_weights)

    def __init__(self, model: nn.Module, description: Description, amp_dtype: torch.dtype | None = None):
        if "input_size" in description.options or isinstance(model, models.Twins):
            transform = build_eval_transform(Namespace(**(EVALUATION | description.options)))
        else:  # released weights of one of timm's models
            config = resolve_data_config(model=model)
            transform = create_transform(**config)
            sizes = {"input_size": config["input_size"][-1], "eval_crop_ratio": config["crop_pct"]}
            description = replace(
                description, mean=config["mean"], std=config["std"], options=description.options | sizes
            )
        super().__init__(model, description, transform, amp_dtype)

    @staticmethod
    def build(description: Description) -> nn.Module:
        return create_classifier(description.options["model"], num_classes=len(description.classes))

    @torch.inference_mode()
    def predict(self, sources: Sequence[Source], inputs: Sequence[Tensor]) -> list[Classification]:
        with self.autocast():
            logits = self.model(to_input(torch.stack(list(inputs)).to(self.device)))
        rows = logits.float().cpu()
        return [Classification(source, self.classes, row) for source, row in zip(sources, rows, strict=True)]

    def explain(self, result: Classification, blocks: Sequence[str] = ()) -> Image.Image:
        """Return a picture of where the classifier looks: Grad-CAM of the predicted class, and attention of blocks.

        These have names such as `"blocks.2.3"`; by default they are the last two of the third stage.

        Raises:
            UserError: If the model is not a Twins model of this repository.
            TwinsError: If there is no such block.
        """
        self.check_explainable(blocks)
        pixels = self.prepare(result.source)
        best = result.logits.argmax()
        blocks = list(blocks) or [f"blocks.2.{i}" for i in range(len(self.model.blocks[2]))[-2:]]
        images = to_input(pixels[None].to(self.device))
        heat = {f"Grad-CAM of {self.classes[best]}": grad_cam(self.model, images, best[None].to(self.device))}
        heat |= attention_maps(self.model, images, blocks)
        seen = to_picture(pixels)
        panels = [("image", seen), *((title, draw_heat(seen, maps[0].cpu())) for title, maps in heat.items())]
        return draw_captions([(title, enlarge(panel)) for title, panel in panels])

    def check_explainable(self, blocks: Sequence[str]) -> None:
        """Raise the errors of `explain`."""
        if not isinstance(self.model, models.Twins):
            raise UserError(f"--attention: {type(self.model).__name__} is not a Twins model of this code; omit it")
        check_blocks(self.model, blocks)


# ---------------------------------------------------------------------------------------------------------- loading


def load_predictor(
    weights: str | Path,
    *,
    pretrained: bool = False,
    model: str | None = None,
    config: str | Path | None = None,
    ema: bool = False,
    device: str = "auto",
    amp: str = "off",
) -> Predictor:
    """Load a network with its classes and the preprocessing of its evaluation.

    Args:
        weights: Checkpoint of this repository, released weights, or with `pretrained` the name of a classifier.
        pretrained: True for the published ImageNet weights of the classifier `weights`.
        model: Name of the classifier, for weights without a description.
        config: Experiment of a dense task, for weights without a description.
        ema: True for the moving average of a classifier's weights.
        device: `auto`, `cuda`, `cuda:N` or `cpu`.
        amp: Mixed precision: `off`, `auto`, `bf16` or `fp16`.

    Returns:
        Predictor of one's own images; see `core.predictor.Predictor.__call__`.

    Raises:
        UserError: If the network is unknown, or the weights are of another one.
        TwinsError: If the file cannot be read or does not fit.
    """
    target = choose_device(device, local_rank=None)
    amp_dtype = choose_amp(amp, target)
    if pretrained:
        network = create_classifier(str(weights), pretrained=True)
        kind = Classifier
        classes = name_classes("classification", network.num_classes)
        description = Description("classification", classes, options={"model": str(weights)})
    else:
        description = find_description(weights, model, config)
        if ema and description.task != "classification":
            raise UserError(f"{weights}: networks for {description.task} have no moving average of the weights")
        kind = find_predictor(weights, description.task)
        network = kind.build(description)
        loading = {"ema": True} if ema else {}
        logger.info("%s", kind.load(network, weights, **loading))
    models.cpu.accelerate(network).to(target)
    return kind(network, description, amp_dtype)


def find_predictor(weights: str | Path, task: str) -> type[Predictor]:
    """Return the class of a task's predictors; a UserError says that detection needs pycocotools."""
    if task == "classification":
        return Classifier
    if task == "segmentation":
        return SegmentationPredictor
    require_package("pycocotools", f"{weights}: detection")
    from detection.predictor import DetectionPredictor

    return DetectionPredictor


def find_description(weights: str | Path, model: str | None, config: str | Path | None) -> Description:
    """Return the description of a network, whose classes are numbered where their names are unknown."""
    description = read_description(weights)
    if not description.task:
        return describe(weights, model, config)
    if model or config:
        raise UserError(f"{weights}: describes its own network; remove --model and --config")
    if description.classes:
        return description
    count = count_classes(weights, description.task, description.options)
    logger.info("%s: does not hold the names of its %d classes; they are numbered", weights, count)
    return replace(description, classes=[f"class {index}" for index in range(count)])


def create_classifier(name: str, **kwargs) -> nn.Module:
    """Create a classifier by its name; a UserError if that is unknown, or published weights cannot be loaded."""
    check_classifier(name)
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # timm and the hub raise many kinds of errors
        raise UserError(
            f"--model {name}: cannot be created ({type(error).__name__}: {one_line(error)}); check the name, and for "
            "--pretrained the network connection"
        ) from error


def check_classifier(name: str) -> None:
    """Raise a UserError if timm has no model of this name."""
    if fault := find_fault(name):
        raise UserError(f"--model {fault}")


def describe(weights: str | Path, model: str | None, config: str | Path | None) -> Description:
    """Describe a network of released weights by the model or the experiment that the user names."""
    if model:
        check_classifier(model)
        task, options = "classification", {"model": model}
    elif config:
        options = asdict(load_experiment(config))
        task = find_task(options)
    else:
        raise UserError(
            f"{weights}: does not name its network; pass --model for a classifier, or --config for an experiment of "
            "segmentation/configs or detection/configs"
        )
    count = count_classes(weights, task, options)
    colours = read_classes(ADE20K_CLASSES)[1] if (task, count) == ("segmentation", 150) else ()
    return Description(task, name_classes(task, count), colours, options=options)


def name_classes(task: str, count: int) -> list[str]:
    """Return the names of a task's classes by their number: those of ImageNet, ADE20K or COCO, or numbers."""
    if (task, count) == ("classification", 1000):
        info = ImageNetInfo()
        return [info.index_to_description(index) for index in range(count)]
    if (task, count) == ("segmentation", 150):
        return read_classes(ADE20K_CLASSES)[0]
    if (task, count) == ("detection", 80):
        names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        return [name for name in names if name not in ("__background__", "N/A")]
    return [f"class {index}" for index in range(count)]


def count_classes(path: str | Path, task: str, options: dict[str, Any]) -> int:
    """Return the number of classes of a network, from the bias of its last layer; a UserError if there is none."""
    if task == "classification":
        classifier = get_pretrained_cfg_value(options["model"], "classifier") or "head"
        layers, per_class, others = [classifier] if isinstance(classifier, str) else classifier, 1, 0
    else:
        layers, per_class, others = CLASS_LAYERS[options.get("detector", task)]
    weights = models.read_weights(path)
    layer = next((layer for layer in layers if f"{layer}.bias" in weights), None)
    if layer is None:
        raise UserError(f"{path}: has no layer {layers[0]}; pass the weights of a whole network for {task}")
    return len(weights[f"{layer}.bias"]) // per_class - others


# ----------------------------------------------------------------------------------------------------- command line


class Files(Dataset):
    """Image files as inputs of a predictor: `(path, input, "")`, or `(path, None, message)` for a bad file."""

    def __init__(self, paths: Sequence[Path], prepare: Callable[[Path], Any]):
        self.paths, self.prepare = paths, prepare

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, Any, str]:
        path = self.paths[index]
        try:
            return path, self.prepare(path), ""
        except UserError as error:
            return path, None, name_file(path, error)


def name_file(path: Path, error: Exception) -> str:
    """Return the message of an error that an image file caused, with the path of the file."""
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def add_network_options(parser: ArgumentParser):
    """Add the options that name a network, and return their group; `load_named_predictor` reads them."""
    group = parser.add_argument_group("network")
    group.add_argument("--pretrained", action="store_true", help="use the published ImageNet weights of --model")
    group.add_argument("--model", metavar="NAME", help="classifier, for weights without a description")
    group.add_argument("--config", metavar="FILE", help="experiment, for weights without a description")
    group.add_argument("--model-ema", action="store_true", help="use the moving average of a classifier's weights")
    return group


def load_named_predictor(args: Namespace, weights: str | None, processes: Processes) -> Predictor:
    """Load the network that `add_network_options` names, with its weights; these are None with `--pretrained`."""
    others = {"device": str(processes.device), "amp": getattr(args, "amp", "off")}
    if not args.pretrained:
        return load_predictor(weights, model=args.model, config=args.config, ema=args.model_ema, **others)
    if not args.model:
        raise UserError("--pretrained: name the classifier with --model")
    for option in ("config", "model_ema"):
        if getattr(args, option):
            raise UserError(
                f"--pretrained: the published weights take no --{option.replace('_', '-')}; omit one of them"
            )
    return load_predictor(args.model, pretrained=True, **others)


def get_parser() -> ArgumentParser:
    """Return the parser of predict.py."""
    usage = "predict.py WEIGHTS IMAGE_OR_FOLDER ... [options]"
    parser = ArgumentParser(prog="predict.py", usage=usage, description=__doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="WEIGHTS IMAGE_OR_FOLDER",
        help="weights (omit them with --pretrained), then images and folders of images; -: paths from standard input",
    )
    add_compute_options(add_network_options(parser), amp="off")
    group = parser.add_argument_group("predictions")
    group.add_argument("--out", metavar="FOLDER", help="write a picture of each prediction, and label maps, as PNG")
    group.add_argument("--json", metavar="FILE", help="write the predictions as JSON: a list with an object per image")
    group.add_argument("--csv", metavar="FILE", help="write the predictions as a table")
    group.add_argument("--topk", type=POSITIVE_INT, default=5, help="listed classes of a classifier")
    group.add_argument(
        "--score-thr",
        type=SHARE,
        default=0.3,
        metavar="SCORE",
        help="minimum score of an object; a network itself keeps those above its score_threshold, by default 0.05",
    )
    group.add_argument("--batch-size", type=POSITIVE_INT, default=8, help="images of a classifier's batch")
    group.add_argument(
        "--attention",
        action="store_true",
        help="write pictures of where a classifier looks: Grad-CAM of the predicted class, and attention; needs --out",
    )
    group.add_argument(
        "--blocks",
        metavar="NAMES",
        help="blocks of --attention, such as blocks.1.1,blocks.2.3 (default: the last two of the third stage)",
    )
    add_loader_options(group, num_workers=4)
    add_process_options(parser)
    return parser


def find_images(paths: Iterable[str], out: str | None = None) -> list[Path]:
    """Return the image files of paths, files or folders (`-`: from standard input), but for those in `out`."""
    images = []
    for path in paths:
        lines = [line.rstrip("\r\n") for line in sys.stdin] if path == "-" else [path]
        for name in filter(None, lines):
            images += search_folder(Path(name), out) if Path(name).is_dir() else [Path(name)]
    if not images:
        raise UserError("there are no images; name images or folders after the weights, or list them for -")
    return list(dict.fromkeys(images))


def search_folder(folder: Path, out: str | None) -> list[Path]:
    """Return the image files in a folder, by their suffixes; see `find_images`."""
    written = Path(out).resolve() if out else None
    if folder.resolve() == written:
        raise UserError(f"--out {out}: is searched for images; choose another folder")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and written not in file.resolve().parents]
    images = [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if not images:
        raise UserError(f"{folder}: contains no images; name a folder of images, such as .jpg or .png")
    log_unused(folder, (file for file in files if file.suffix.lower() not in SUFFIXES))
    return images


def run_prediction(args: Namespace, processes: Processes) -> None:
    """Predict images and write what the options ask for."""
    check_args(args, processes)
    weights, paths = (None, args.paths) if args.pretrained else (args.paths[0], args.paths[1:])
    images = find_images(paths, args.out)
    predictor = load_named_predictor(args, weights, processes)
    if args.attention:
        if not isinstance(predictor, Classifier):
            raise UserError(
                f"--attention: applies to classifiers, but {weights} is for {predictor.description.task}; omit it"
            )
        predictor.check_explainable(block_names(args))
    compile_if_asked(predictor.model, args.compile)
    for folder in (args.out, *(Path(file).parent for file in (args.json, args.csv) if file)):
        if folder:
            make_folder(Path(folder))
    with signals_noted(), ExitStack() as stack:
        reports = []
        if args.json:
            reports.append(stack.enter_context(json_report(args.json)))
        if args.csv:
            reports.append(stack.enter_context(table_report(args.csv, predictor.description.task)))
        predicted = predict_files(args, predictor, images, reports)
    if predicted < len(images):
        raise UserError(f"{len(images) - predicted} of {len(images)} images cannot be predicted; see above")


def check_args(args: Namespace, processes: Processes) -> None:
    """Reject options that do not work together, and files that cannot be written."""
    if processes.world_size > 1:
        raise UserError("predict.py runs in one process; start it without a launcher")
    if args.attention and not args.out:
        raise UserError("--attention: there is no folder for its pictures; name it with --out")
    if args.blocks and not args.attention:
        raise UserError(f"--blocks {args.blocks}: chooses the blocks of --attention; add that option")
    for option in ("json", "csv"):
        path = getattr(args, option)
        if path and (path == "-" or Path(path).is_dir()):
            raise UserError(f"--{option} {path}: is not a file; name one")
    if args.json and args.json == args.csv:
        raise UserError(f"--json {args.json}: is also the file of --csv; name two files")


def block_names(args: Namespace) -> list[str]:
    """Return the names of `--blocks`."""
    return [name.strip() for name in (args.blocks or "").split(",") if name.strip()]


def predict_files(args: Namespace, predictor: Predictor, images: Sequence[Path], reports: Sequence[Report]) -> int:
    """Predict image files, write the predictions, and return their number. Bad files are logged."""
    batch_size = args.batch_size if isinstance(predictor, Classifier) else 1
    loading = loader_options(args, predictor.device)
    loader = DataLoader(Files(images, predictor.prepare), batch_size, collate_fn=list, **loading)
    folder = os.path.commonpath([Path(os.path.abspath(path)).parent for path in images])
    predicted = 0
    for batch in show_progress(loader, "prediction"):
        if signal := stop_requested():
            logger.info("%d of %d images are predicted", predicted, len(images))
            raise Interrupted(signal)
        for _, _, message in batch:
            if message:
                logger.warning("skipped: %s", message)
        good = [(path, pixels) for path, pixels, message in batch if not message]
        results = predictor.predict([path for path, _ in good], [pixels for _, pixels in good]) if good else []
        for result in results:
            name = os.path.relpath(os.path.abspath(result.source), folder)
            try:
                entry = write_result(args, predictor, result, name)
            except BadImageError as error:  # removed in the meantime
                logger.warning("skipped: %s", name_file(result.source, error))
                continue
            for report in reports:
                report(entry)
            predicted += 1
    return predicted


def write_result(args: Namespace, predictor: Predictor, result: Result, name: str) -> dict[str, Any]:
    """Log a prediction, write its pictures and its label map, and return it as plain values."""
    choices = {"classification": {"topk": args.topk}, "detection": {"min_score": args.score_thr}}
    choice = choices.get(predictor.description.task, {})
    entry = {"path": str(result.source)} | result.to_dict(**choice)
    figure = COLUMNS[predictor.description.task][2]
    listed = ", ".join(f"{row['name']} {row[figure]:.1%}" for row in entry[LISTS[predictor.description.task]])
    logger.info("%s: %s", result.source, listed or describe_none(args.score_thr))
    if args.out:
        path = Path(args.out, name)
        save_png(result.draw(**choice), path)
        if isinstance(result, Segmentation):
            entry["label_map"] = f"{path}.labels.png"
            save_png(to_pil_image(result.labels[None]), path.with_name(f"{path.name}.labels"))
        if args.attention:
            save_png(predictor.explain(result, block_names(args)), path.with_name(f"{path.name}.attention"))
    return entry


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `core.launch.run_script` for the exit codes."""
    parser = get_parser()
    args = parser.parse_args(argv, intermixed=True)
    run_script(parser.prog, run_prediction, args, when_stopped="the predictions up to then are written")


if __name__ == "__main__":
    main()
