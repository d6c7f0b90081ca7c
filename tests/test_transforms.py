"""Transforms of classification against timm's, Pillow's and ones written out."""

import random

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from datasets import build_dataset
from main import get_args_parser
from transforms import (
    POLICIES,
    RandomCrop,
    adapt_policy,
    build_train_transform,
    collate_train_images,
    normalise,
    to_input,
)
from utils import seed_generators


def options(*argv):
    return get_args_parser().parse_args(["--input-size", "48", *map(str, argv)])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random", "lanczos"])
@pytest.mark.parametrize("size", [(500, 375), (60, 90)])  # made smaller, and larger
def test_crops_are_timms(size, interpolation):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    photo = Image.fromarray(pixels).resize(size)
    crops = [kind(112, interpolation=interpolation) for kind in (RandomCrop, RandomResizedCropAndInterpolation)]
    for seed in range(20):
        found = []
        for crop in crops:
            random.seed(seed)
            found.append((np.asarray(crop(photo), int), random.random()))  # the same number of random values is drawn
        assert found[0][0].shape == (112, 112, 3)
        assert np.abs(found[0][0] - found[1][0]).max() <= 3
        assert np.abs(found[0][0] - found[1][0]).mean() < 0.1
        assert found[0][1] == found[1][1]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_crops_of_lines_and_points(size):
    assert all(RandomCrop(16, interpolation="bicubic")(Image.new("RGB", size)).size == (16, 16) for _ in range(50))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_images_equal_those_of_timms_transforms(mode):
    """Bytes, normalised after loading, with their erased pixels equal the images of timm's whole transform."""
    photos = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 48, 3), np.uint8)) for i in range(8)]
    argv = ["--scale", "1", "1", "--reprob", "0.6", "--remode", mode, "--recount", "2", "--data-path", "."]
    ours = build_train_transform(options(*argv))
    settings = {"scale": (1, 1), "ratio": (1, 1), "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}
    erasing = {"re_prob": 0.6, "re_mode": mode, "re_count": 2}
    timms = create_transform(48, is_training=True, **settings, **erasing)
    ours.transforms[0].ratio = (1, 1)  # so the crop is the whole image, and resizing does not round
    found, expected = [], []
    for seed, photo in enumerate(photos):
        seed_generators(seed)
        found.append((ours(photo), seed))
        seed_generators(seed)
        expected.append(timms(photo))
    train_images, targets = collate_train_images(found)
    images = train_images.normalise()
    assert len(train_images.erased), "nothing was erased"
    assert targets.tolist() == list(range(8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalisation_is_torchvisions(dtype, channels_last):
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = images / 255
    statistics = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = torchvision.transforms.functional.normalize(floats, *statistics)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    given = (images if dtype == torch.uint8 else floats).contiguous(memory_format=memory_format)
    before = given.clone()
    found = normalise(given)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.equal(given, before)
    assert torch.equal(normalise(given[1]), expected[1])


def test_evaluation_transform_equals_one_written_out(image_folder):
    dataset = build_dataset(False, options("--data-path", image_folder))
    path, _ = dataset.samples[3]
    image = torchvision.datasets.folder.default_loader(path)
    side = int(48 / 0.875)
    width, height = image.size
    scale = side / min(width, height)
    size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
    assert scale < 1
    image = image.resize(size, resample=3)
    left, top = round((image.width - 48) / 2), round((image.height - 48) / 2)
    pixels = np.asarray(image.crop((left, top, left + 48, top + 48)), np.float32) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(to_input(dataset[3][0]).permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_policies_of_other_code_stay_as_they_are():
    """Neither importing this project nor building its transforms changes timm."""
    build_train_transform(options("--data-path", "."))
    assert auto_augment.NAME_TO_OP["Posterize"] is auto_augment.posterize
    assert auto_augment.NAME_TO_OP["ShearX"] is auto_augment.shear_x


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original", "v0"])
def test_operations_of_every_policy_are_adapted(name):
    transform = build_train_transform(options("--data-path", ".", "--aa", name))
    (policy,) = [step for step in transform.transforms if isinstance(step, POLICIES)]
    operations = policy.ops if hasattr(policy, "ops") else [operation for pair in policy.policy for operation in pair]
    for operation in operations:
        is_adapted = operation.aug_fn is not auto_augment.NAME_TO_OP[operation.name]
        assert is_adapted == operation.name.startswith(("Posterize", "Shear", "Translate"))
    seed_generators(0)
    photo = Image.effect_noise((60, 50), 80).convert("RGB")
    assert all(transform(photo).pixels.shape == (48, 48, 3) for _ in range(50))


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
@pytest.mark.parametrize("magnitude", [0, 5, 10])
def test_posterize_works_at_every_magnitude(name, magnitude):
    """The published policy draws magnitudes up to 10, which give 0 bits."""
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    policy = auto_augment.RandAugment([auto_augment.AugmentOp(name, prob=1, magnitude=magnitude)], num_layers=1)
    adapt_policy(policy)
    result = np.asarray(policy(image))
    assert result.shape == (32, 32, 3)
    if name == "PosterizeIncreasing" and magnitude == 10:
        assert result.max() == 0


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"])
@pytest.mark.parametrize(
    "interpolation",
    [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)],
    ids=["bicubic", "bilinear", "random"],
)
def test_moved_pixels_are_pillows(name, interpolation):
    photo = Image.effect_noise((50, 40), 80).resize((64, 48)).convert("RGB")
    hints = {"magnitude_std": 0.5, "translate_const": 30, "img_mean": (124, 116, 104), "interpolation": interpolation}
    policies = [
        auto_augment.RandAugment([auto_augment.AugmentOp(name, prob=1, magnitude=9, hparams=hints)], num_layers=1)
        for _ in range(2)
    ]
    adapt_policy(policies[0])
    for seed in range(20):
        found = []
        for policy in policies:
            random.seed(seed), np.random.seed(seed)
            found.append((np.asarray(policy(photo), int), random.random()))
        assert np.abs(found[0][0] - found[1][0]).max() <= 1
        assert (found[0][0] != found[1][0]).mean() < 0.01
        assert found[0][1] == found[1][1]
    assert (found[0][0] != np.asarray(photo)).any()
