"""Loading of the real formats, seeded augmentation, and input that is bad."""

import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader

from datasets import IGNORED_TARGET, BadImageError, EvalSet, TrainSet, build_dataset
from main import get_args_parser
from samplers import SampleKey, TrainSampler
from tests.conftest import damage_jpeg
from transforms import POLICIES, RandomCrop, ToImages, adapt_policy, build_transform, collate_views, posterize
from utils import UserError, restored_generators, seed_generators


def options(*argv):
    return get_args_parser().parse_args(["--input-size", "48", *map(str, argv)])


def all_images(dataset, workers: int, epoch: int = 3, seed: int = 1) -> list[torch.Tensor]:
    sampler = TrainSampler(len(dataset), global_batch=4, seed=5)
    sampler.set_epoch(epoch)
    options = {"batch_size": 4, "sampler": sampler, "num_workers": workers, "collate_fn": collate_views}
    batches = list(DataLoader(TrainSet(dataset, seed), **options))
    images = [ToImages()(pixels, *erased) for pixels, _, *erased in batches]
    return [torch.cat(images), torch.cat([targets for _, targets, *_ in batches])]


@pytest.mark.parametrize("repeated", [False, True])
def test_augmentation_is_the_same_for_any_number_of_workers(image_folder, repeated):
    dataset = build_dataset(True, options("--data-path", image_folder, "--reprob", 1))
    images, targets = all_images(dataset, workers=0)
    for workers in (1, 4):
        others, other_targets = all_images(dataset, workers)
        assert torch.equal(images, others)
        assert torch.equal(targets, other_targets)
    assert not torch.equal(images, all_images(dataset, workers=0, epoch=4)[0])
    assert not torch.equal(images, all_images(dataset, workers=0, seed=2)[0])


def test_copies_of_an_image_differ(image_folder):
    dataset = TrainSet(build_dataset(True, options("--data-path", image_folder)), seed=0)
    first, again, copy = (dataset[SampleKey(0, 5, copy)][0].pixels for copy in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, copy)


def test_seeding_leaves_the_generators_as_they_were():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with restored_generators():
        seed_generators(0, 1, 2)
        inside = draw()
        seed_generators(0, 1, 2)
        assert draw() == inside
        seed_generators(0, 1, 3)
        assert draw() != inside
    assert draw() == expected


def test_loading_leaves_the_generators_as_they_were(image_folder):
    dataset = TrainSet(build_dataset(True, options("--data-path", image_folder)), seed=0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    dataset.__getitems__([SampleKey(0, 5, 0), SampleKey(0, 6, 0)])
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


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
            found.append((np.asarray(crop(photo), int), random.random()))  # and as much is drawn
        assert found[0][0].shape == (112, 112, 3)
        assert np.abs(found[0][0] - found[1][0]).max() <= 3
        assert np.abs(found[0][0] - found[1][0]).mean() < 0.1
        assert found[0][1] == found[1][1]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_crops_of_lines_and_points(size):
    assert all(RandomCrop(16, interpolation="bicubic")(Image.new("RGB", size)).size == (16, 16) for _ in range(50))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_images_equal_those_of_timms_transforms(mode):
    """Bytes that are normalised behind the loader, with erased parts, are what timm's whole transform makes."""
    photos = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 48, 3), np.uint8)) for i in range(8)]
    argv = ["--scale", "1", "1", "--reprob", "0.6", "--remode", mode, "--recount", "2", "--data-path", "."]
    ours = build_transform(True, options(*argv))
    settings = {"scale": (1, 1), "ratio": (1, 1), "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}
    erasing = {"re_prob": 0.6, "re_mode": mode, "re_count": 2}
    timms = create_transform(48, is_training=True, **settings, **erasing)
    ours.transforms[0].ratio = (1, 1)  # so that the image is taken as it is, and no resizing rounds
    found, expected = [], []
    for seed, photo in enumerate(photos):
        seed_generators(seed)
        found.append((ours(photo), seed))
        seed_generators(seed)
        expected.append(timms(photo))
    pixels, targets, *erased = collate_views(found)
    images = ToImages()(pixels, *erased)
    assert erased[0], "nothing was erased"
    assert targets.tolist() == list(range(8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images, torch.stack(expected), rtol=0, atol=1e-5)


def test_image_folder(image_folder):
    for is_train, count in ((True, 24), (False, 21)):
        dataset = build_dataset(is_train, options("--data-path", image_folder))
        assert len(dataset) == count
        assert dataset.classes == ["n01440764", "n01443537", "n01484850"]
        image, label = dataset[count - 1]
        assert image.pixels.shape == (48, 48, 3) if is_train else image.shape == (3, 48, 48)
        assert label == 2


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
    np.testing.assert_allclose(dataset[3][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_validation_alone_can_be_evaluated(image_folder, tmp_path):
    shutil.copytree(image_folder / "val", tmp_path / "val")
    assert len(build_dataset(False, options("--data-path", tmp_path))) == 21


def test_cifar(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = {}
    for name, count in (("train", 12), ("test", 5)):
        images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = rng.integers(0, 100, count).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": images, "fine_labels": labels}))
        files[name] = images, labels
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    # The checksums are those of the real files, which are not here; the layout is theirs.
    cifar = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cifar, "train_list", [["train", None]])
    monkeypatch.setattr(cifar, "test_list", [["test", None]])
    monkeypatch.setattr(cifar, "meta", {"filename": "meta", "key": "fine_label_names", "md5": None})
    args = get_args_parser().parse_args(["--data-set", "CIFAR", "--data-path", str(tmp_path), "--input-size", "32"])
    assert len(build_dataset(True, args)) == 12
    dataset = build_dataset(False, args)
    assert len(dataset.classes) == 100
    image, label = dataset[4]
    images, labels = files["test"]
    assert label == labels[4]
    pixels = images[4].reshape(3, 32, 32) / np.float32(255)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)[:, :, None, None]
    np.testing.assert_allclose(image.numpy(), (pixels - mean) / std, atol=1e-5)
    args.data_path = str(folder)
    with pytest.raises(ValueError, match="holds no whole CIFAR-100; fetch it with python -c"):
        build_dataset(False, args)


@pytest.fixture
def inaturalist(image_folder, tmp_path):
    """iNaturalist 2019 in its published layout: four species of two families."""
    families = ["Felidae", "Canidae", "Felidae", "Canidae"]
    taxonomy = [{"id": i, "name": f"species {i}", "family": name, "genus": "x"} for i, name in enumerate(families)]
    (tmp_path / "categories.json").write_text(json.dumps(taxonomy))
    files = sorted((image_folder / "train").rglob("*.JPEG"))
    for split, order in (("train", [2, 0, 1, 3, 2]), ("val", [3, 0])):
        images, annotations = [], []
        for i, category in enumerate(order):
            name = f"train_val2019/Animals/{category}/{split}{i}.jpg"
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files[i], tmp_path / name)
            images.append({"id": 100 + i, "file_name": name})
            annotations.append({"id": i, "image_id": 100 + i, "category_id": category})
        content = {"images": images, "annotations": annotations}
        (tmp_path / f"{split}2019.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("category", "classes", "val_labels"),
    [
        ("name", ["species 2", "species 0", "species 1", "species 3"], [3, 1]),
        ("family", ["Felidae", "Canidae"], [1, 0]),
    ],
)
def test_inaturalist(inaturalist, category, classes, val_labels):
    args = options("--data-set", "INAT19", "--data-path", inaturalist, "--inat-category", category)
    assert len(build_dataset(True, args)) == 5
    dataset = build_dataset(False, args)
    assert dataset.classes == classes
    assert [label for _, label in (dataset[i] for i in range(2))] == val_labels
    assert dataset[0][0].shape == (3, 48, 48)


def test_inaturalist_faults_are_named(inaturalist):
    args = options("--data-set", "INAT19", "--data-path", inaturalist, "--inat-category", "kingdom")
    with pytest.raises(ValueError, match="do not fit together"):
        build_dataset(True, args)
    (inaturalist / "val2019.json").write_text("{")
    with pytest.raises(ValueError, match=r"val2019\.json: is no valid JSON"):
        build_dataset(False, args)
    (inaturalist / "categories.json").unlink()
    with pytest.raises(ValueError, match=r"categories\.json: cannot be read"):
        build_dataset(False, args)


def test_embedded_shapes():
    train, val = (build_dataset(is_train, options("--data-set", "SHAPES")) for is_train in (True, False))
    assert len(train.classes) == 10
    assert [val[i][1] for i in range(12)] == [*range(10), 0, 1]
    assert val[0][0].shape == (3, 48, 48)
    assert torch.equal(val[4][0], val[4][0])
    train.transform = val.transform
    assert not torch.equal(train[4][0], val[4][0])


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"--data-path '.*nowhere' is no folder; name the one that holds IMNET"):
        build_dataset(True, options("--data-path", tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"train is missing; .* should hold train/ and val/"):
        build_dataset(True, options("--data-path", tmp_path))


def test_empty_class(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    for file in (tmp_path / "data/train/n01443537").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"train: no images in the class folder n01443537; fill it"):
        build_dataset(True, options("--data-path", tmp_path / "data"))


def test_different_classes(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    shutil.move(tmp_path / "data/val/n01443537", tmp_path / "data/val/n99999999")
    with pytest.raises(ValueError, match=r"train/ has 3 classes and val/ 3, and n01443537, n99999999 on one side only"):
        build_dataset(True, options("--data-path", tmp_path / "data"))


@pytest.fixture
def damaged_folder(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    for split in ("train", "val"):
        damage_jpeg(tmp_path / "data" / split / "n01440764" / "1.JPEG")
    return tmp_path / "data"


def test_truncated_image_is_named(damaged_folder):
    dataset = EvalSet(build_dataset(False, options("--data-path", damaged_folder)))
    with pytest.raises(BadImageError, match=r"val/n01440764/1\.JPEG: cannot be read .*--bad-image skip"):
        dataset[1]
    (damaged_folder / "val/n01440764/1.JPEG").write_text("no image")
    with pytest.raises(BadImageError, match="it is not in a known format"):
        dataset[1]


def test_a_disk_that_fails_is_not_skipped(damaged_folder, monkeypatch):
    def fail(self):
        raise OSError(5, "Input/output error")

    dataset = EvalSet(build_dataset(False, options("--data-path", damaged_folder)), bad_image="skip")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=r"0\.JPEG: cannot be read \(Input/output error\); check the disk") as raised:
        dataset[0]
    assert not isinstance(raised.value, BadImageError)


def test_truncated_image_is_skipped(damaged_folder, caplog):
    train = TrainSet(build_dataset(True, options("--data-path", damaged_folder)), 0, bad_image="skip")
    image, label = train[SampleKey(0, 1, 0)]
    assert f"skipped: {damaged_folder / 'train/n01440764/1.JPEG'}: cannot be read as an image" in caplog.text
    seed_generators(0, *SampleKey(0, 1, 0))
    expected, _ = train.dataset[2]
    assert label == 0
    assert torch.equal(image.pixels, expected.pixels)
    val = EvalSet(build_dataset(False, options("--data-path", damaged_folder)), bad_image="skip")
    caplog.clear()
    image, label = val[1]
    assert f"skipped: {damaged_folder / 'val/n01440764/1.JPEG'}" in caplog.text
    assert image.shape == (3, 48, 48)
    assert label == IGNORED_TARGET


def test_policies_of_other_code_stay_as_they_are():
    """Neither importing this project nor building its transforms changes timm."""
    build_transform(True, options("--data-path", "."))
    assert auto_augment.NAME_TO_OP["Posterize"] is auto_augment.posterize
    assert auto_augment.NAME_TO_OP["ShearX"] is auto_augment.shear_x


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original", "v0"])
def test_operations_of_every_policy_are_adapted(name):
    transform = build_transform(True, options("--data-path", ".", "--aa", name))
    (policy,) = [each for each in transform.transforms if isinstance(each, POLICIES)]
    operations = policy.ops if hasattr(policy, "ops") else [each for pair in policy.policy for each in pair]
    for operation in operations:
        if operation.name.startswith("Posterize"):
            assert operation.aug_fn is posterize
        moves = operation.name.startswith(("Shear", "Translate"))
        assert moves == (operation.aug_fn.__module__ == "transforms" and operation.aug_fn is not posterize)
    seed_generators(0)
    photo = Image.effect_noise((60, 50), 80).convert("RGB")
    assert all(transform(photo).pixels.shape == (48, 48, 3) for _ in range(50))


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
@pytest.mark.parametrize("magnitude", [0, 5, 10])
def test_posterize_works_at_every_magnitude(name, magnitude):
    """The published policy draws magnitudes up to 10, which ask for 0 bits."""
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    policy = auto_augment.RandAugment([auto_augment.AugmentOp(name, prob=1, magnitude=magnitude)], num_layers=1)
    adapt_policy(policy)
    result = np.asarray(policy(image))
    assert result.shape == (32, 32, 3)
    if name == "PosterizeIncreasing" and magnitude == 10:
        assert result.max() == 0


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"])
@pytest.mark.parametrize("interpolation", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
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


def test_the_published_augmentation_never_fails():
    dataset = TrainSet(build_dataset(True, options("--data-set", "SHAPES")), seed=0)
    assert all(dataset[SampleKey(0, i, 0)][0].pixels.shape == (48, 48, 3) for i in range(1500))
