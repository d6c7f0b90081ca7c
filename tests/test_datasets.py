"""Loading of the real formats, seeded augmentation, and bad input."""

import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from datasets import IGNORED_TARGET, BadImageError, EvalSet, TrainSet, build_dataset
from main import get_args_parser
from samplers import SampleKey, TrainSampler
from tests.helpers import damage_jpeg
from transforms import collate_train_images, to_input
from utils import UserError, restored_generators, seed_generators


def options(*argv):
    return get_args_parser().parse_args(["--input-size", "48", *map(str, argv)])


def all_images(dataset, workers: int, epoch: int = 3, seed: int = 1) -> list[torch.Tensor]:
    sampler = TrainSampler(len(dataset), global_batch=4, seed=5)
    sampler.set_epoch(epoch)
    options = {"batch_size": 4, "sampler": sampler, "num_workers": workers, "collate_fn": collate_train_images}
    batches = list(DataLoader(TrainSet(dataset, seed), **options))
    return [torch.cat([images.normalise() for images, _ in batches]), torch.cat([targets for _, targets in batches])]


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


def test_image_folder(image_folder):
    for is_train, count in ((True, 24), (False, 21)):
        dataset = build_dataset(is_train, options("--data-path", image_folder))
        assert len(dataset) == count
        assert dataset.classes == ["n01440764", "n01443537", "n01484850"]
        image, label = dataset[count - 1]
        assert image.pixels.shape == (48, 48, 3) if is_train else image.shape == (3, 48, 48)
        assert label == 2


def test_the_exif_orientation_is_ignored(image_folder, tmp_path):
    """As by torchvision's ImageFolder."""
    images = []
    for orientation in (None, 6):
        folder = tmp_path / str(orientation)
        shutil.copytree(image_folder / "val", folder / "val")
        path = folder / "val/n01440764/0.JPEG"
        with Image.open(path) as image:
            exif = image.getexif()
            if orientation:
                exif[ExifTags.Base.Orientation] = orientation
            image.save(path, exif=exif)
        images.append(build_dataset(False, options("--data-path", folder))[0][0])
    assert torch.equal(*images)


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
    np.testing.assert_allclose(to_input(image).numpy(), (pixels - mean) / std, atol=1e-5)
    args.data_path = str(folder)
    with pytest.raises(ValueError, match="does not contain a complete CIFAR-100; download it with python -c"):
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
    with pytest.raises(ValueError, match="the JSON files do not match"):
        build_dataset(True, args)
    (inaturalist / "val2019.json").write_text("{")
    with pytest.raises(ValueError, match=r"val2019\.json: is not valid JSON"):
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
    with pytest.raises(ValueError, match=r"--data-path '.*nowhere' is not a folder; pass the folder of IMNET"):
        build_dataset(True, options("--data-path", tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"train is missing; .* should contain train/ and val/"):
        build_dataset(True, options("--data-path", tmp_path))


def test_files_that_are_no_images_are_named(image_folder, tmp_path, caplog):
    shutil.copytree(image_folder, tmp_path / "data")
    folder = tmp_path / "data/val/n01440764"
    (folder / "notes.txt").write_text("")
    (folder / "photo.jp2").write_text("")
    with caplog.at_level("INFO", "twins"):
        dataset = build_dataset(False, options("--data-path", tmp_path / "data"))
    assert caplog.messages == [f"note: {tmp_path}/data/val: files not used: 1 .jp2, 1 .txt"]
    assert [sample for sample in dataset.samples if "n01440764" in sample[0]] == [
        (str(folder / f"{i}.JPEG"), 0) for i in range(7)
    ]
    caplog.clear()
    build_dataset(True, options("--data-path", tmp_path / "data"))
    assert not caplog.messages


def test_empty_class(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    for file in (tmp_path / "data/train/n01443537").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"train: no images in n01443537; add some"):
        build_dataset(True, options("--data-path", tmp_path / "data"))


def test_different_classes(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    shutil.move(tmp_path / "data/val/n01443537", tmp_path / "data/val/n99999999")
    with pytest.raises(
        ValueError, match=r"train/ has 3 classes and val/ has 3; n01443537, n99999999 in one of them only"
    ):
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
    with pytest.raises(BadImageError, match="its format is unknown"):
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


def test_the_published_augmentation_never_fails():
    dataset = TrainSet(build_dataset(True, options("--data-set", "SHAPES")), seed=0)
    assert all(dataset[SampleKey(0, i, 0)][0].pixels.shape == (48, 48, 3) for i in range(1500))
