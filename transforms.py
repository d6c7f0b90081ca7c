"""Image transforms of classification, and the normalisation that all tasks share.

Training uses timm's augmentation, with faster crops, shears and translations. To add an augmentation, add a step to
`build_train_transform`.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import to_pil_image

from core.options import FRACTION, NON_NEGATIVE, POSITIVE_INT, PROBABILITY
from utils import UserError

STATISTICS = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
POLICIES = auto_augment.RandAugment, auto_augment.AugMixAugment, auto_augment.AutoAugment
Colour = tuple[int, int, int]


def add_augmentation_options(group) -> None:
    """Add the options of the training transform; `build_train_transform` reads them."""
    group.add_argument(
        "--scale",
        default=[0.08, 1.0],
        type=FRACTION,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="range of the fraction of the image area that a random crop covers",
    )
    group.add_argument(
        "--color-jitter",
        default=0.4,
        type=NON_NEGATIVE,
        metavar="X",
        help="strength of the colour jitter; ignored unless --aa none",
    )
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        metavar="NAME",
        help="augmentation policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original or v0; none to "
        "disable",
    )
    group.add_argument(
        "--train-interpolation",
        default="bicubic",
        choices=("random", "bilinear", "bicubic"),
        help="interpolation of the random crops",
    )
    group.add_argument("--reprob", default=0.25, type=PROBABILITY, help="probability of random erasing, 0 to 1")
    group.add_argument(
        "--remode",
        default="pixel",
        choices=("const", "rand", "pixel"),
        help="filling of erased areas: zeros, one random colour, or a random colour per pixel",
    )
    group.add_argument("--recount", default=1, type=POSITIVE_INT, help="maximum number of erased areas")


def add_eval_crop_option(group) -> None:
    """Add `--eval-crop-ratio`; `build_eval_transform` reads it."""
    group.add_argument(
        "--eval-crop-ratio",
        default=0.875,
        type=FRACTION,
        metavar="RATIO",
        help="ratio of the side of the centre crop to the shorter side of the resized image, in evaluation",
    )


def build_train_transform(args) -> Callable[[Image.Image], "TrainImages"]:
    """Build the training transform: timm's augmentation of a PIL image, returned as `TrainImages`."""
    if args.aa != "none":
        check_policy(args.aa)
    steps = create_transform(
        input_size=args.input_size,
        is_training=True,
        scale=args.scale,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    ).transforms
    for step in steps:
        if isinstance(step, POLICIES):
            adapt_policy(step)
    crop = RandomCrop(args.input_size, args.scale, interpolation=args.train_interpolation)
    if _is_small_cifar(args):
        crop = transforms.RandomCrop(args.input_size, padding=4)
    end = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
    erasing = next((step for step in steps[end:] if isinstance(step, RandomErasing)), None)
    return transforms.Compose([crop, *steps[1:end], ToTrainImages(erasing, args.input_size)])


def build_eval_transform(args) -> Callable[[Image.Image], Tensor]:
    """Build the evaluation transform, from a PIL image to a tensor `(3, size, size)`, uint8 for a small transfer."""
    return transforms.Compose(
        [
            transforms.Resize(int(args.input_size / crop_ratio(args)), interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(args.input_size),
            transforms.PILToTensor(),
        ]
    )


def crop_ratio(args) -> float:
    """Return the ratio of the side of the evaluation's crop to the shorter side of the resized image."""
    # Shapes are drawn at the input size and reach the border, so they are not cropped.
    return 1.0 if args.data_set == "SHAPES" or _is_small_cifar(args) else args.eval_crop_ratio


def _is_small_cifar(args) -> bool:
    """Return True if images of CIFAR keep their size; training then shifts them instead of cropping them."""
    return args.data_set == "CIFAR" and args.input_size <= 32


# -------------------------------------------------------------------------------------------------- normalisation


def normalise(images: Tensor) -> Tensor:
    """Return images `(..., 3, H, W)`, normalised by the mean and standard deviation of ImageNet.

    The images are uint8 or float32 from 0 to 1; the result is float32, in the same memory format.
    """
    exporting = torch.compiler.is_exporting()  # then tensors are placeholders, which must not stay in the cache
    mean, std = _make_statistics(images.device) if exporting else _cached_statistics(images.device)
    if images.stride(-3) == 1:  # Channels last: one operand per row is 4 times as fast on a CPU as one per pixel.
        width = images.shape[-1]
        mean, std = (values.movedim(0, -1).repeat(1, width, 1).movedim(-1, 0) for values in (mean, std))
    images = images.float().div_(255).sub_(mean) if images.dtype == torch.uint8 else images - mean
    return images.div_(std)


def to_input(images: Tensor) -> Tensor:
    """Return images `(..., 3, H, W)`, normalised if they are uint8; others already are."""
    return normalise(images) if images.dtype == torch.uint8 else images


def to_picture(pixels: Tensor) -> Image.Image:
    """Return an image `(3, H, W)`, uint8 or normalised, as a PIL image."""
    if pixels.dtype == torch.uint8:
        return to_pil_image(pixels)
    mean, std = _make_statistics(pixels.device)
    return to_pil_image((pixels * std + mean).clamp(0, 1))


def _make_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in STATISTICS)
    return mean, std


# Copying to a GPU waits until the GPU is idle, so it is done once. Training uses the same tensors as inference.
_cached_statistics = cache(torch.inference_mode(False)(_make_statistics))


# ------------------------------------------------------------------------------------------------ training images


class TrainImages(NamedTuple):
    """A training image, or a batch of them, as bytes and the normalised values of the erased pixels.

    Bytes pass between processes faster than floats; the values that random erasing draws do not fit into bytes.
    """

    pixels: Tensor  # RGB values, uint8 `(H, W, 3)`, or `(B, H, W, 3)` in a batch
    erased: Tensor  # indices of the erased pixels among all pixels, int64 `(N,)`
    values: Tensor  # normalised values of the erased pixels, float32 `(3, N)`

    def normalise(self) -> Tensor:
        """Return normalised images `(B, 3, H, W)` in channels-last memory format."""
        images = normalise(self.pixels.movedim(-1, -3))
        images.movedim(-3, -1).view(-1, 3)[self.erased] = self.values.T
        return images


class ToTrainImages:
    """Convert a PIL image to `TrainImages`, with parts erased by timm's RandomErasing.

    timm writes the erased parts into a normalised image; here it writes them into a canvas of NaN, to find them there.
    `size` is the side length of the images in pixels.
    """

    def __init__(self, erasing: RandomErasing | None, size: int):
        self.erasing = erasing
        self.canvas = torch.full((3, size, size), torch.nan)

    def __call__(self, image: Image.Image) -> TrainImages:
        if self.erasing is not None:
            self.erasing(self.canvas)
        canvas = self.canvas.flatten(1).numpy()
        erased = np.flatnonzero(~np.isnan(canvas[0]))
        values = canvas.take(erased, axis=1)
        if len(erased):
            self.canvas.fill_(torch.nan)
        return TrainImages(*map(torch.from_numpy, (np.array(image), erased, values)))


def collate_train_images(samples: Sequence[tuple[TrainImages, int]]) -> tuple[TrainImages, Tensor]:
    """Return samples `(image, target)` as a batch `(images, targets)`."""
    pixels, targets = default_collate([(image.pixels, target) for image, target in samples])
    size = pixels[0, ..., 0].numel()
    erased = torch.cat([i * size + image.erased for i, (image, _) in enumerate(samples)])
    values = torch.cat([image.values for image, _ in samples], dim=1)
    return TrainImages(pixels, erased, values), targets


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random crop of a PIL image, resized by torch in a quarter of Pillow's time.

    The position and size of a crop are drawn as timm draws them. Pixel values differ by at most 3 of 255 from those of
    Pillow before version 13. Pillow 13 resizes the columns of some images first, and differs by up to 8 at sharp edges.
    """

    def __call__(self, img: Image.Image) -> Image.Image:
        if self.interpolation not in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
            return super().__call__(img)
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        pixels = np.array(img.crop((left, top, left + max(1, width), top + max(1, height))))
        images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels last, which is resized without a copy
        images = F.interpolate(images, size=self.size, mode=self.interpolation.value, antialias=True)
        return Image.fromarray(images[0].permute(1, 2, 0).numpy())


# -------------------------------------------------------------------------------- operations of timm's policies


def check_policy(name: str) -> None:
    """Raise a UserError if timm has no augmentation policy of this name."""
    build = auto_augment.auto_augment_transform
    if name.startswith("rand"):
        build = auto_augment.rand_augment_transform
    elif name.startswith("augmix"):
        build = auto_augment.augment_and_mix_transform
    try:
        build(name, {})
    except (AssertionError, ValueError, LookupError) as error:
        raise UserError(f"--aa {name!r} is not a policy of timm; use one such as rand-m9-mstd0.5-inc1") from error


def adapt_policy(policy: Callable) -> None:
    """Replace the operations of a timm RandAugment, AugMixAugment or AutoAugment that are listed in `OPERATIONS`."""
    operations = policy.ops if hasattr(policy, "ops") else [operation for pair in policy.policy for operation in pair]
    for operation in operations:
        operation.aug_fn = OPERATIONS.get(operation.name, operation.aug_fn)


def shear(
    image: Image.Image,
    slope: float,
    offset: float = 0.0,
    *,
    fillcolor: Colour | None,
    resample: Image.Resampling | Sequence[Image.Resampling],
) -> Image.Image:
    """Shift row i to the left by `slope * (i + 0.5) + offset` pixels."""
    if isinstance(resample, (list, tuple)):
        resample = random.choice(resample)  # as timm does
    if resample == Image.Resampling.BICUBIC and image.mode == "RGB" and fillcolor is not None:
        return move_rows(image, slope * (np.arange(image.height) + 0.5) + offset, fillcolor)
    matrix = (1, slope, offset, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fillcolor)


def translate(image: Image.Image, pixels: float, **options) -> Image.Image:
    """Shift an image to the left."""
    return shear(image, 0, pixels, **options)


def translate_rel(image: Image.Image, share: float, **options) -> Image.Image:
    """Shift an image to the left by a share of its width."""
    return shear(image, 0, share * image.width, **options)


def on_columns(operation: Callable, image: Image.Image, amount: float, **options) -> Image.Image:
    """Shift columns up as an operation above shifts rows to the left."""
    transposed = image.transpose(Image.Transpose.TRANSPOSE)
    return operation(transposed, amount, **options).transpose(Image.Transpose.TRANSPOSE)


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """Keep the highest bits of each value; 0 bits, which timm's policies can draw and Pillow 13 refuses, give black."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


OPERATIONS = {
    "ShearX": shear,
    "ShearY": partial(on_columns, shear),
    "TranslateX": translate,
    "TranslateY": partial(on_columns, translate),
    "TranslateXRel": translate_rel,
    "TranslateYRel": partial(on_columns, translate_rel),
    "Posterize": posterize,
    "PosterizeIncreasing": posterize,
    "PosterizeOriginal": posterize,
}


def move_rows(image: Image.Image, shifts: np.ndarray, fill: Colour) -> Image.Image:
    """Shift each row of an RGB image to the left by a number of pixels, `(H,)`, and fill in a colour.

    The interpolation is bicubic, in a quarter of Pillow's time. Values differ from Pillow's by at most 1 of 255.
    """
    width, height = image.size
    whole = np.floor(shifts).astype(np.int64)
    margin = np.abs(whole).max() + 3  # repeats the border, so that a shifted row is a slice
    wide = np.empty((height, width + 2 * margin), np.uint32)  # one element per pixel is faster than four bytes
    wide[:, margin:-margin] = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(height, width)
    wide[:, :margin], wide[:, -margin:] = wide[:, margin, None], wide[:, -margin - 1, None]
    slices = np.lib.stride_tricks.sliding_window_view(wide.ravel(), width + 3)
    near = slices[wide.shape[1] * np.arange(height) + margin + whole - 1]
    near = torch.from_numpy(near.view(np.uint8)).float()  # (H, 4 (W + 3)): one pixel before, two pixels after each row
    t = torch.from_numpy((shifts - whole).astype(np.float32))[:, None]
    moved = near[:, : 4 * width] * (-t + 2 * t**2 - t**3)
    for i, weight in enumerate((1 - 2 * t**2 + t**3, t + t**2 - t**3, t**3 - t**2), start=1):
        moved.addcmul_(near[:, 4 * i : 4 * (i + width)], weight)
    moved = moved.clamp_(0, 255).byte().numpy().view(np.uint32)
    sources = np.arange(width) + 0.5 + shifts[:, None]
    moved = np.where((sources < 0) | (sources >= width), np.array([*fill, 0], np.uint8).view(np.uint32), moved)
    return Image.frombytes("RGB", image.size, moved, "raw", "RGBX")
