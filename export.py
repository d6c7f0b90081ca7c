"""Export trained weights as a file for other software, and check that the file gives the outputs of the network.

    python export.py output/shapes/checkpoint_best.pth --format onnx --with-preprocessing --out shapes.onnx
    python export.py --model alt_gvt_small --pretrained --format aoti --out alt_gvt_small.pt2
    python export.py output/flowers/checkpoint_best.pth --format timm --out flowers

| network              | onnx                   | pt2                    | aoti          | timm |
|----------------------|------------------------|------------------------|---------------|------|
| classifier           | any batch, any size    | any batch, any size    | any batch     | yes  |
| segmentation network | any batch, any size    | one image, any size    | -             | -    |
| detector             | one image, any size    | -                      | -             | -    |

Any size is at least 64x64 pixels. docs/export.md shows how to use each file.
"""

import json
import logging
import os
import shutil
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

import models
from core.description import Description
from core.distributed import Processes
from core.launch import one_line, run_script
from core.options import ArgumentParser, add_process_options
from core.predictor import Predictor
from core.shapes import draw_quarters
from core.signals import Interrupted, signals_raised
from models.layers import LocallyGroupedAttention
from predict import EVALUATION, add_network_options, create_classifier, load_named_predictor
from transforms import crop_ratio
from utils import UserError, make_folder, require_package

logger = logging.getLogger("twins")

FORMATS = {"classification": ("onnx", "pt2", "aoti", "timm"), "segmentation": ("onnx", "pt2"), "detection": ("onnx",)}
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2", "timm": ""}
DETECTIONS = ("boxes", "scores", "labels", "masks")  # outputs of a detector; RetinaNet has no masks
EXAMPLE_SIZE = (160, 128)  # height and width of the images in an export for any size
TRIAL_SIZES = ((97, 225), (230, 161))  # at which it is checked, besides the input size
MIN_SIZE = 64  # of a side in an export for any size
TOLERANCE = 1e-4  # relative to the largest output if that is above 1; for boxes, to the longer side of the image
MASK_TOLERANCE = 1e-3  # share of the pixels of masks

Outputs = Tensor | Sequence[Tensor]
Run = Callable[[Tensor], Outputs]  # function from the input of an exported network to its outputs


@dataclass(frozen=True)
class Export:
    """A network of one tensor, and how to export and check it."""

    network: nn.Module  # returns a tensor, or a tuple of them
    description: Description
    levels: str  # of the input, for the file
    outputs: tuple[str, ...]  # names of the outputs
    axes: dict[int, str]  # names of the axes of the input that can have any length
    example: Tensor  # an input
    trials: Sequence[Tensor]  # inputs of the check

    @property
    def input(self) -> str:
        """Description of the input."""
        shape = ", ".join(str(self.axes.get(axis, length)) for axis, length in enumerate(self.example.shape))
        return f"({shape}), {self.levels}"

    @property
    def metadata(self) -> dict[str, str]:
        """Description of the network for the file; lists are in JSON."""
        entries = asdict(self.description) | {"input": self.input, "input_size": input_size(self.description)}
        options = entries.pop("options")
        if self.description.task == "detection":  # it normalises its input itself
            del entries["mean"], entries["std"]
            entries["score_threshold"] = options["score_threshold"]
        if self.description.task == "classification":
            entries["crop_ratio"] = crop_ratio(Namespace(**(EVALUATION | options)))
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in entries.items()}


# -------------------------------------------------------------------------------------------------------- networks


class WithPreprocessing(nn.Module):
    """A network that normalises uint8 images `(B, 3, H, W)` and returns the probabilities of the classes."""

    def __init__(self, network: nn.Module, description: Description):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(description.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(description.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images / 255 - self.mean) / self.std).softmax(dim=1)


class SingleImage(nn.Module):
    """A detector of one image `(3, H, W)`, uint8 or from 0 to 1, that returns a tuple in the order of `DETECTIONS`."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.detector([image])[0]
        return tuple(found[name] for name in DETECTIONS if name in found)


def prepare_export(predictor: Predictor, format: str, as_bytes: bool) -> Export:
    """Return the export of a predictor's network in a format; `as_bytes` is `--with-preprocessing`."""
    if predictor.description.task == "detection":
        return prepare_detector(predictor, as_bytes)
    description, network, size = predictor.description, predictor.model, input_size(predictor.description)
    axes = {} if (description.task, format) == ("segmentation", "pt2") else {0: "batch"}
    has_one_size = format in ("aoti", "timm")
    if description.task == "classification":
        # Many of timm's classifiers have one size. In small images the last map has a side of one token, a constant.
        has_one_size |= not isinstance(network, models.Twins) or min(size) < MIN_SIZE
    sizes = [size] * 3
    if not has_one_size:
        axes |= {2: "height", 3: "width"}
        sizes = [EXAMPLE_SIZE, *TRIAL_SIZES, tuple(max(side, MIN_SIZE) for side in size)]
    batches = (2, 1, 3, 1) if 0 in axes else [1] * 4  # a batch of one in the example would be a constant of the graph
    images = [draw_images(*shape).to(predictor.device) for shape in zip(batches, sizes, strict=False)]
    if as_bytes:
        network = WithPreprocessing(network, description).eval().to(predictor.device)
        return Export(network, description, "uint8", ("probabilities",), axes, images[0], images[1:])
    if format == "timm":
        network = with_zero_padding(network, description.options["model"])
    images = [normalize(batch / 255, description.mean, description.std) for batch in images]
    levels = "float32, normalised by mean and std"
    return Export(network, description, levels, ("logits",), axes, images[0], images[1:])


def prepare_detector(predictor: Predictor, as_bytes: bool) -> Export:
    """Return the export of a detector, of one image of any size; see `prepare_export`."""
    sizes = [EXAMPLE_SIZE, *TRIAL_SIZES, input_size(predictor.description)]
    images = [draw_images(1, size)[0].to(predictor.device) for size in sizes]
    levels = "uint8"
    if not as_bytes:
        images, levels = [image / 255 for image in images], "float32 from 0 to 1"
    outputs = DETECTIONS if hasattr(predictor.model, "roi_heads") else DETECTIONS[:3]
    axes = {1: "height", 2: "width"}
    return Export(
        SingleImage(predictor.model).eval(), predictor.description, levels, outputs, axes, images[0], images[1:]
    )


def with_zero_padding(network: models.Twins, name: str) -> models.Twins:
    """Return a copy of a classifier with zero padding of windows, as in timm."""
    copy = create_classifier(name, num_classes=network.num_classes, window_padding="zero").eval()
    copy.load_state_dict(network.state_dict())
    return copy.to(next(network.parameters()).device)


def input_size(description: Description) -> tuple[int, int]:
    """Return the height and width of the images for which a network was trained."""
    if description.task == "detection":
        return min(description.options["scale"]), max(description.options["scale"])
    name = "input_size" if description.task == "classification" else "crop_size"
    side = (EVALUATION | description.options)[name]
    return side, side


def draw_images(batch: int, size: tuple[int, int]) -> Tensor:
    """Return random scenes of shapes, uint8 `(batch, 3, height, width)`."""
    height, width = size
    scenes = [draw_quarters((batch, height, width, index), max(size)).image for index in range(batch)]
    return torch.stack([pil_to_tensor(scene)[:, :height, :width] for scene in scenes])


# --------------------------------------------------------------------------------------------------------- formats


def write_onnx(export: Export, path: Path) -> None:
    """Write an ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision's use of torch, for every operation
        program = torch.onnx.export(
            export.network,
            (export.example,),
            dynamo=True,
            input_names=["images" if export.example.dim() == 4 else "image"],
            output_names=export.outputs,
            dynamic_shapes=(export.axes,),
            verbose=False,
        )
    program.model.metadata_props.update(export.metadata)
    program.save(path, external_data=False)


def open_onnx(path: Path) -> Run:
    """Return a function that runs an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy(force=True)})]


def capture(export: Export) -> torch.export.ExportedProgram:
    """Return the graph of a network."""
    shapes = dict.fromkeys(export.axes, torch.export.Dim.AUTO)
    return torch.export.export(export.network, (export.example,), dynamic_shapes=(shapes,))


def write_pt2(export: Export, path: Path) -> None:
    """Write a program of torch.export."""
    torch.export.save(capture(export), path, extra_files={"metadata.json": json.dumps(export.metadata)})


def open_pt2(path: Path) -> Run:
    """Return a function that runs a program of torch.export."""
    return torch.export.load(path).module()


def write_aoti(export: Export, path: Path) -> None:
    """Write a package of AOTInductor: machine code for processors or GPUs like those of this machine."""
    options = {"aot_inductor.metadata": export.metadata}
    torch._inductor.aoti_compile_and_package(capture(export), package_path=str(path), inductor_configs=options)


def open_aoti(path: Path) -> Run:
    """Return a function that runs a package of AOTInductor."""
    return torch._inductor.aoti_load_package(str(path))


def write_timm(export: Export, path: Path) -> None:
    """Write a folder for timm's own Twins."""
    from timm.models import save_for_hf  # not in the oldest versions that the other formats take

    options = EVALUATION | export.description.options
    name = options["model"].removesuffix("_v0").replace("alt_gvt_", "twins_svt_").replace("pcpvt_", "twins_pcpvt_")
    arguments = {}
    if not timm.is_model(name):  # a tiny one
        name, arguments = f"{name.rpartition('_')[0]}_small", network_arguments(export.network)
    size = input_size(export.description)
    network = timm.create_model(name, num_classes=export.network.num_classes, img_size=size, **arguments)
    network.load_state_dict(export.network.state_dict())
    network.pretrained_cfg |= {
        "tag": "",
        "input_size": (3, *size),
        "crop_pct": crop_ratio(Namespace(**options)),
        "mean": export.description.mean,
        "std": export.description.std,
    }
    save_for_hf(network, path, {"label_names": list(export.description.classes)}, arguments, safe_serialization=True)
    for file in path.iterdir():  # safetensors writes files that only their owner can read
        shutil.copymode(path / "config.json", file)


def network_arguments(network: models.Twins) -> dict[str, Sequence[float]]:
    """Return the arguments of a network that timm's Twins has, too, under the same names."""
    first_blocks = [stage[0] for stage in network.blocks]
    return {
        "embed_dims": network.embed_dims,
        "num_heads": [block.attn.num_heads for block in first_blocks],
        "mlp_ratios": [block.mlp.fc1.out_features / block.mlp.fc1.in_features for block in first_blocks],
        "depths": [len(stage) for stage in network.blocks],
    }


def open_timm(path: Path) -> Run:
    """Return a function that runs a folder with timm."""
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def as_tuple(outputs: Outputs) -> Sequence[Tensor]:
    """Return the outputs of a network as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs


WRITERS = {"onnx": write_onnx, "pt2": write_pt2, "aoti": write_aoti, "timm": write_timm}
READERS = {"onnx": open_onnx, "pt2": open_pt2, "aoti": open_aoti, "timm": open_timm}


# ----------------------------------------------------------------------------------------------------------- check


@torch.inference_mode()
def check_outputs(export: Export, run: Run) -> None:
    """Raise a UserError if an exported file has other outputs than its network at any of the trials."""
    differences, objects = {}, 0
    for images in export.trials:
        expected, found = ([output.cpu() for output in as_tuple(call(images))] for call in (export.network, run))
        shape = "x".join(map(str, images.shape))
        differences[shape] = find_difference(found, expected, max(images.shape))
        objects += len(expected[0])
        if not differences[shape] <= TOLERANCE:  # or not a number
            raise UserError(
                f"the outputs of the exported file differ from those of the network by {differences[shape]:.1g} for "
                f"{shape} pixels, more than {TOLERANCE:.0e}; nothing is written. Try another format, or another "
                "version of torch and of the software of the format"
            )
    logger.info("checked for %s pixels: largest difference %.1g", ", ".join(differences), max(differences.values()))
    if export.description.task == "detection":
        logger.log(logging.INFO if objects else logging.WARNING, "%d objects are equal one to one", objects)


def find_difference(found: Sequence[Tensor], expected: Sequence[Tensor], side: int) -> float:
    """Return the largest difference of outputs, relative as `TOLERANCE` says; infinity for other shapes or types.

    Detections are paired, each with the nearest of its class.
    """
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in expected]:
        return float("inf")
    if len(expected) == 1:
        return ((found[0] - expected[0]).abs().max() / expected[0].abs().max().clamp(min=1)).item()
    boxes, scores, labels = expected[:3]
    if not len(boxes):
        return 0.0
    distances = (found[0] - boxes[:, None]).abs().amax(dim=2) / side
    distances = distances.maximum((found[1] - scores[:, None]).abs())  # boxes that are clipped can be the same
    distances[found[2] != labels[:, None]] = float("inf")
    nearest = distances.argmin(dim=1)
    if len(nearest.unique()) < len(boxes):
        return float("inf")
    difference = distances.gather(1, nearest[:, None]).max().item()
    for found_masks, masks in zip(found[3:], expected[3:], strict=True):
        share = (found_masks[nearest] != masks).sum() / masks.sum().clamp(min=1)
        difference = max(difference, share.item() * TOLERANCE / MASK_TOLERANCE)
    return difference


def report_padding(network: models.Twins, export: Export) -> None:
    """Log how far a network with masked padding of windows is from its copy for timm, which pads them with zeros."""
    if not any(isinstance(module, LocallyGroupedAttention) for module in network.modules()):
        return
    with torch.inference_mode():
        difference = (network(export.example) - export.network(export.example)).abs().max().item()
    size = "x".join(map(str, export.example.shape[2:]))
    if difference > TOLERANCE:
        text = (
            "timm pads windows with zeros, this network masks the padding: at %s pixels the logits differ by up to %.1g"
        )
        logger.warning(text, size, difference)
    else:
        logger.info("timm pads windows with zeros, this network masks the padding: at %s pixels there is none", size)


# ----------------------------------------------------------------------------------------------------- command line


def get_parser() -> ArgumentParser:
    """Return the parser of export.py."""
    usage = "export.py WEIGHTS --format FORMAT --out PATH [options]"
    parser = ArgumentParser(prog="export.py", usage=usage, description=__doc__)
    parser.add_argument("weights", nargs="?", metavar="WEIGHTS", help="checkpoint or weights; omit with --pretrained")
    group = parser.add_argument_group("export")
    group.add_argument("--format", choices=tuple(WRITERS), required=True, help="format of the file")
    group.add_argument("--out", metavar="PATH", required=True, help="file to write, or folder for --format timm")
    group.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="normalise uint8 images in the file and return probabilities; without it, normalised images and logits",
    )
    add_network_options(parser)
    add_process_options(parser)
    parser.set_defaults(device="cpu", loader_timeout=0)
    return parser


def check_args(args: Namespace, processes: Processes) -> None:
    """Reject options that do not work together, missing packages and paths that cannot be written."""
    if processes.world_size > 1:
        raise UserError("export.py runs in one process; start it without a launcher")
    if args.pretrained and args.weights:
        raise UserError(f"{args.weights}: is a second source of weights beside --pretrained; omit one of them")
    if not args.pretrained and not args.weights:
        raise UserError("there are no weights; name a file, or --pretrained --model NAME for the published ones")
    if args.format == "timm" and args.with_preprocessing:
        raise UserError(
            "--with-preprocessing: timm's own transforms prepare the images; omit it, or use another format"
        )
    if args.format != "aoti" and processes.device.type != "cpu":
        raise UserError(f"--device {args.device}: applies to --format aoti; {args.format} files are for all devices")
    check_path(Path(args.out), args.format)
    if args.format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            require_package(name, "--format onnx")
    if args.format == "aoti" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--format aoti: there is no C++ compiler; install g++")


def check_path(out: Path, format: str) -> None:
    """Raise a UserError if a path cannot be written in a format."""
    suffix = SUFFIXES[format]
    if suffix and (out.suffix != suffix or out.is_dir()):
        raise UserError(f"--out {out}: is not a {suffix} file, which --format {format} writes")
    if not suffix and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is a file or a folder with files; name a new folder")


def check_format(format: str, predictor: Predictor) -> None:
    """Raise a UserError if a format does not take a predictor's network."""
    task = predictor.description.task
    if format not in FORMATS[task]:
        raise UserError(f"--format {format}: does not take networks for {task}; choose {' or '.join(FORMATS[task])}")
    if format == "timm" and not isinstance(predictor.model, models.Twins):
        raise UserError(
            f"--format timm: {type(predictor.model).__name__} is a network of timm already; choose onnx, pt2 or aoti"
        )
    if format == "timm" and tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 16):
        raise UserError(f"--format timm: timm {timm.__version__} loads no folders; pip install -U timm (from 1.0.16)")


def run_export(args: Namespace, processes: Processes) -> None:
    """Export a network, check the result, and put it in place."""
    check_args(args, processes)
    predictor = load_named_predictor(args, args.weights, processes)
    check_format(args.format, predictor)
    models.cpu.accelerate(predictor.model, enabled=False)
    export = prepare_export(predictor, args.format, args.with_preprocessing)
    out = Path(args.out)
    make_folder(out.parent)
    with signals_raised(), temporary_folder(out) as folder:
        path = folder / out.name
        try:
            WRITERS[args.format](export, path)
            check_outputs(export, READERS[args.format](path))
        except (UserError, Interrupted):
            raise
        except Exception as error:  # exporters and the software of their formats raise many kinds of errors
            reason = f"{type(error).__name__}: {one_line(error)[:300]}"
            raise UserError(
                f"--format {args.format}: this network cannot be exported ({reason}); try another format, or "
                "--traceback to find out why"
            ) from error
        os.replace(path, out)
    if args.format == "timm":
        report_padding(predictor.model, export)
    logger.info("wrote %s", out)


@contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """Create a folder beside a path, and remove it at the end; a UserError if that fails, or the end of the block."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); choose another place") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `core.launch.run_script` for the exit codes."""
    parser = get_parser()
    run_script(parser.prog, run_export, parser.parse_args(argv), when_stopped="nothing is written")


if __name__ == "__main__":
    main()
