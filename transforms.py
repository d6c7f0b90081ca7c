"""What happens to an image between the file and the model."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from utils import UserError

STATISTICS = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


POLICIES = auto_augment.RandAugment, auto_augment.AugMixAugment, auto_augment.AutoAugment


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's operation, which the published policy asks for 0 bits now and then; Pillow 13 refuses those."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


class Movable:
    """Takes the place of a PIL image for timm's shears and shifts, moving rows or columns in a quarter of the time.

    Values of pixels differ from Pillow's by 1 of 255 at most.
    """

    def __init__(self, img: Image.Image):
        self.img = img
        self.size = img.size

    def transform(self, size, method, data: Sequence[float], resample=None, fillcolor=None) -> Image.Image:
        """Do what Pillow's images do for `Image.transform`."""
        if resample != Image.Resampling.BICUBIC or self.img.mode != "RGB" or fillcolor is None:
            return self.img.transform(size, method, data, resample=resample, fillcolor=fillcolor)
        _, xy, x, yx, _, y = data  # what is at (i, j) comes from (i + xy j + x, yx i + j + y)
        if (yx, y) == (0, 0):
            return move_rows(self.img, xy * (np.arange(size[1]) + 0.5) + x, fillcolor)
        transposed = self.img.transpose(Image.Transpose.TRANSPOSE)
        moved = move_rows(transposed, yx * (np.arange(size[0]) + 0.5) + y, fillcolor)
        return moved.transpose(Image.Transpose.TRANSPOSE)


def move_rows(img: Image.Image, shifts: np.ndarray, fill: tuple[int, int, int]) -> Image.Image:
    """Move each row of an RGB image to the left by its own number of pixels, with Pillow's bicubic interpolation."""
    width, height = img.size
    whole = np.floor(shifts).astype(np.int64)
    margin = np.abs(whole).max() + 3  # in the colours of the edge, so that each row's new pixels are a slice
    wide = np.empty((height, width + 2 * margin), np.uint32)  # for four bytes move as fast as one
    wide[:, margin:-margin] = np.frombuffer(img.tobytes("raw", "RGBX"), np.uint32).reshape(height, width)
    wide[:, :margin], wide[:, -margin:] = wide[:, margin, None], wide[:, -margin - 1, None]
    slices = np.lib.stride_tricks.sliding_window_view(wide.ravel(), width + 3)
    near = slices[wide.shape[1] * np.arange(height) + margin + whole - 1]
    near = torch.from_numpy(near.view(np.uint8)).float()  # (H, 4 (W + 3)): from the pixel before to the second behind
    t = torch.from_numpy((shifts - whole).astype(np.float32))[:, None]
    moved = torch.zeros(height, 4 * width)
    for i, weight in enumerate((-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, t**3 - t**2)):
        moved.addcmul_(near[:, 4 * i : 4 * (i + width)], weight)
    moved = moved.clamp_(0, 255).byte().numpy().view(np.uint32)
    places = np.arange(width) + 0.5 + shifts[:, None]
    moved = np.where((places < 0) | (places >= width), np.array([*fill, 0], np.uint8).view(np.uint32), moved)
    return Image.frombytes("RGB", img.size, moved, "raw", "RGBX")


def adapt_policy(policy: Callable) -> None:
    """Have the shears and shifts of a policy of timm work on `Movable` images, and posterising on any number of bits.

    Args:
        policy: A RandAugment, AugMixAugment or AutoAugment; nothing else in the process is changed.
    """
    operations = policy.ops if hasattr(policy, "ops") else [each for pair in policy.policy for each in pair]
    for operation in operations:
        if operation.name.startswith(("Shear", "Translate")):
            operation.aug_fn = _on_movable(operation.aug_fn)
        elif operation.name.startswith("Posterize"):
            operation.aug_fn = posterize


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
        raise UserError(f"--aa {name!r} is no policy of timm; use one such as rand-m9-mstd0.5-inc1") from error


def _on_movable(change: Callable) -> Callable:
    return lambda img, *args, **kwargs: change(Movable(img), *args, **kwargs)


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random crop of a PIL image, resized by torch in a quarter of Pillow's time.

    Where crops lie is drawn exactly as timm draws it. Values of pixels are those of Pillow before 13 but for 3 of 255.
    Pillow 13 resizes some images by columns first, which makes more of a difference at sharp edges (8 in shapes).
    """

    modes = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}  # noqa: RUF012

    def __call__(self, img: Image.Image) -> Image.Image:
        mode = self.modes.get(self.interpolation) if isinstance(self.interpolation, InterpolationMode) else None
        if mode is None:  # rarely used; Pillow has them all
            return super().__call__(img)
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        pixels = np.array(img.crop((left, top, left + max(1, width), top + max(1, height))))
        images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # known to be channels-last, so resized as it lies
        images = F.interpolate(images, size=self.size, mode=mode, antialias=True)
        return Image.fromarray(images[0].permute(1, 2, 0).numpy())


class View(NamedTuple):
    """A training image: bytes, which are quick to hand from process to process, and what random erasing wrote into it.

    Attributes:
        pixels: uint8 `(H, W, 3)`, RGB.
        erased: Parts as `((top, left), values)`, the values normalised floats `(3, height, width)`.
    """

    pixels: torch.Tensor
    erased: list[tuple[tuple[int, int], torch.Tensor]]


class ToView:
    """Turn a PIL image into a `View`; `eraser` is timm's RandomErasing or None."""

    def __init__(self, eraser: RandomErasing | None):
        self.eraser = eraser

    def __call__(self, img: Image.Image) -> View:
        erased = Erased(img.height, img.width)
        if self.eraser is not None:
            self.eraser(erased)
        return View(torch.from_numpy(np.array(img)), erased.parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.eraser})"


class Erased:
    """Takes the place of a normalised image for timm's RandomErasing, and keeps what is written into it."""

    dtype = torch.float32

    def __init__(self, height: int, width: int):
        self.shape = torch.Size((3, height, width))
        self.parts = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], values: torch.Tensor) -> None:
        _, rows, columns = place
        values = values.expand(3, rows.stop - rows.start, columns.stop - columns.start)
        self.parts.append(((rows.start, columns.start), values))


Batch = tuple[torch.Tensor, torch.Tensor, list[tuple[int, ...]], torch.Tensor]


def collate_views(samples: Sequence[tuple[View, int]]) -> Batch:
    """Return a batch of views.

    Returns:
        Bytes `(B, H, W, 3)`; targets `(B,)`; image, top, left, height and width of each erased part; and the values of
        all those parts in a row.
    """
    pixels, targets = default_collate([(view.pixels, target) for view, target in samples])
    parts = [(i, *part) for i, (view, _) in enumerate(samples) for part in view.erased]
    places = [(i, *corner, *values.shape[1:]) for i, corner, values in parts]
    values = torch.cat([torch.empty(0), *(values.flatten() for _, _, values in parts)])
    return pixels, targets, places, values


class ToImages:
    """Turn batches of `collate_views` into normalised images `(B, 3, H, W)` in channels-last memory, on a device."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.mean, self.std = (255 * torch.tensor(values, device=device) for values in STATISTICS)

    def __call__(self, pixels: torch.Tensor, places: Sequence[tuple[int, ...]], values: torch.Tensor) -> torch.Tensor:
        width = pixels.shape[2]  # by whole rows, for a last dimension of three takes a CPU four times as long
        images = pixels.flatten(2).float().sub_(self.mean.repeat(width)).div_(self.std.repeat(width))
        images = images.view(pixels.shape).permute(0, 3, 1, 2)
        sizes = [3 * height * width for *_, height, width in places]
        for (i, top, left, height, width), part in zip(places, values.split(sizes), strict=True):
            images[i, :, top : top + height, left : left + width] = part.view(3, height, width)
        return images


def build_transform(is_train: bool, args) -> Callable:
    """Build the transform of an image to a `View` in training, else to a normalised tensor `(3, size, size)`."""
    shifts = args.data_set == "CIFAR" and args.input_size <= 32  # small images are shifted, not cropped
    if is_train:
        if args.aa != "none":
            check_policy(args.aa)
        transform = create_transform(
            input_size=args.input_size,
            is_training=True,
            scale=args.scale,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
        crop = RandomCrop(args.input_size, args.scale, interpolation=args.train_interpolation)
        changes = transform.transforms
        for change in changes:
            if isinstance(change, POLICIES):
                adapt_policy(change)
        end = next(i for i, change in enumerate(changes) if isinstance(change, MaybeToTensor))
        erasers = [change for change in changes[end:] if isinstance(change, RandomErasing)]
        first = transforms.RandomCrop(args.input_size, padding=4) if shifts else crop
        return transforms.Compose([first, *changes[1:end], ToView(*erasers or [None])])
    # Shapes are drawn at the input size, objects up to the border, so nothing of them is cut off.
    crops = not shifts and args.data_set != "SHAPES"
    size = int(args.input_size / args.eval_crop_ratio) if crops else args.input_size
    return transforms.Compose(
        [
            transforms.Resize(size, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(args.input_size),
            transforms.ToTensor(),
            transforms.Normalize(*STATISTICS),
        ]
    )
