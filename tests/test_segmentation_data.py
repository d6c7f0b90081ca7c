"""Data of semantic segmentation on disk in the real layouts, and the published transforms against naive ones."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from core.images import fitted_size, make_colours, resize_image
from segmentation import transforms
from segmentation.configs.recipes import Experiment
from segmentation.data import IGNORED_LABEL, build_dataset, read_classes
from segmentation.transforms import (
    EvalViews,
    augment,
    change_hsv,
    distort_colours,
    draw_distortion,
    normalise,
    random_crop,
    resize_labels,
    scale_levels,
)
from tests.helpers import damage_jpeg
from tests.small_data import ADE20K_SIZES, make_labels, write_ade20k, write_noise, write_street_scenes
from tests.test_models import DATA
from utils import UserError


def open_part(root, part: str = "train", **fields):
    return build_dataset(Experiment("alt_gvt_tiny", data_root=str(root), **fields), part)


def test_ade20k_ignores_0_and_shifts_the_others(ade20k_folder):
    dataset = open_part(ade20k_folder, "val")
    assert (len(dataset.classes), dataset.classes[0], dataset.classes[149]) == (150, "wall", "flag")
    assert len(set(dataset.classes)) == len(set(dataset.colours)) == 150
    assert [dataset.name(i) for i in range(5)] == [f"ADE_valid_{i + 1:08}" for i in range(5)]
    for i, (width, height) in enumerate(ADE20K_SIZES):
        image, labels = dataset[i]
        assert (image.shape, image.dtype) == ((3, height, width), torch.uint8)
        stored = make_labels(ADE20K_SIZES[i], i).astype(int)
        expected = np.where(stored == 0, IGNORED_LABEL, stored - 1)
        assert np.array_equal(labels.numpy(), expected)
        assert {IGNORED_LABEL, 149} <= set(labels.unique().tolist())
        with Image.open(ade20k_folder / f"images/validation/{dataset.name(i)}.jpg") as file:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(file))


def test_ones_own_folder(tmp_path):
    write_ade20k(tmp_path, high=3, count=2)
    (tmp_path / "classes.txt").write_text("road 128 64 128\ntraffic light\n\nsky 1 2 300\n")
    dataset = open_part(tmp_path, dataset="folder")
    assert dataset.classes == ["road", "traffic light", "sky 1 2 300"]
    assert dataset.colours[0] == (128, 64, 128)
    assert len(set(dataset.colours)) == 3
    by_rule = make_colours(3)
    lines = [" ".join(map(str, ("class", *colour))) for colour in by_rule]
    (tmp_path / "own.txt").write_text("\n".join(["a", "b", "c", *lines]))
    _, colours = read_classes(tmp_path / "own.txt")
    assert len(set(colours)) == 6
    assert colours[3:] == by_rule
    assert np.array_equal(dataset[0][1].numpy(), make_labels(ADE20K_SIZES[0], 0, 3))  # labels from 0 on, as they are


def test_files_with_other_suffixes_are_announced(tmp_path, caplog):
    write_ade20k(tmp_path, count=2)
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(151))))
    folder = tmp_path / "images/training"
    with caplog.at_level("INFO", "twins"):
        open_part(tmp_path, dataset="folder")
        assert not caplog.text
        for name in ("a.tif", "b/c.tif", "d.bmp", ".hidden", "upper.JPG"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")
        (tmp_path / "annotations/training/upper.png").write_bytes(b"")
        open_part(tmp_path, dataset="folder")
    note = f"note: {folder}: files not used: 1 .bmp, 2 .tif; image_suffix"
    assert note in caplog.text
    assert caplog.text.count("note:") == 1


def test_shapes_are_the_same_each_time_and_differ_between_parts():
    train, val = (open_part("", part, dataset="shapes", scale=(48, 48)) for part in ("train", "val"))
    assert (len(train.classes), train.classes[0]) == (11, "background")
    for a, b in zip(train[3], train[3], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(train[3][0], val[3][0])
    seen = torch.cat([train[i][1].unique() for i in range(40)]).unique()
    assert seen.tolist() == list(range(11))


def break_folder(root, how: str) -> None:
    image, label = (
        root / part / "validation" / f"ADE_valid_00000002.{suffix}"
        for part, suffix in (("images", "jpg"), ("annotations", "png"))
    )
    if how == "no labels at all":
        (root / "annotations/validation").rename(root / "annotations/val")
    elif how == "one without labels":
        label.unlink()
    elif how == "sizes differ":
        Image.fromarray(make_labels((90, 71), 0)).save(label)
    elif how == "label too high":
        Image.fromarray(np.full((70, 90), 151, np.uint8)).save(label)
    elif how == "colours for labels":
        Image.new("RGB", (90, 70)).save(label)
    elif how == "damaged image":
        damage_jpeg(image)
    elif how == "no images":
        for file in (root / "images/validation").iterdir():
            file.unlink()


FAULTS = {
    "no labels at all": r"annotations/validation is missing; set the folder with --cfg-options val_labels=",
    "one without labels": r"images/validation/ADE_valid_00000002\.jpg: has no labels; .*00000002\.png is missing",
    "sizes differ": r"00000002\.png: has 90x71 pixels, but .*00000002\.jpg has 90x70",
    "label too high": r"00000002\.png: has the label 151, but there are 150 classes, labelled 1 to 150",
    "colours for labels": r"00000002\.png: is a PNG of mode RGB; labels must be one channel",
    "damaged image": r"00000002\.jpg: cannot be read as an image",
    "no images": r"images/validation holds no images \(\.jpg, \.jpeg, \.png\)",
}


@pytest.mark.parametrize("how", FAULTS)
def test_faults_of_the_files_are_named(how, tmp_path):
    write_ade20k(tmp_path)
    break_folder(tmp_path, how)
    with pytest.raises(ValueError, match=FAULTS[how]):
        list(open_part(tmp_path, "val"))


def test_missing_folders_and_class_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder; set the folder of .* with --data-root"):
        open_part(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r": has neither classes\.txt nor images/training; set .* with --data-root"):
        open_part(tmp_path, dataset="folder")
    (tmp_path / "images/training").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"classes\.txt: cannot be read .* one class per line"):
        open_part(tmp_path, dataset="folder")
    with pytest.raises(UserError, match="label_suffix='' is empty"):
        open_part(tmp_path, dataset="folder", label_suffix="")
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"classes\.txt: has 0 classes"):
        read_classes(tmp_path / "classes.txt")


def test_stored_255_is_ignored_everywhere(tmp_path):
    write_ade20k(tmp_path, high=2, count=1)
    (tmp_path / "classes.txt").write_text("a\nb")
    path = tmp_path / "annotations/training/ADE_train_00000001.png"
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    for dataset in ("ade20k", "folder"):
        for ignored_label in (255, 7):
            labels = open_part(tmp_path, dataset=dataset, ignored_label=ignored_label)[0][1]
            assert labels.unique().tolist() == [IGNORED_LABEL]


def test_other_folders_suffixes_lists_and_an_ignored_label(tmp_path):
    fields = write_street_scenes(tmp_path)
    train, val = (open_part(tmp_path, part, **fields) for part in ("train", "val"))
    assert [train.name(i) for i in range(len(train))] == ["ulm/ulm_1", "bonn/bonn_1"]
    assert [val.name(i) for i in range(len(val))] == ["bonn/bonn_1", "bonn/bonn_2", "ulm/ulm_1"]
    assert open_part(tmp_path, "val", **fields | {"val_split": "some.txt"}).names == train.names
    stored = make_labels((50, 80), 2, 4).astype(int)
    assert {0, 3} <= set(stored.ravel())
    assert np.array_equal(train[0][1].numpy(), np.where(stored == 3, IGNORED_LABEL, stored))
    assert train[0][0].shape == (3, 80, 50)
    assert not torch.equal(train[0][0], val[2][0])
    with pytest.raises(UserError, match=r"ulm_1_gtFine_labelTrainIds\.png: has the label 3, but there are 3 classes"):
        open_part(tmp_path, **fields | {"ignored_label": 4})[0]
    (tmp_path / "some.txt").write_text("ulm/ulm_2")
    with pytest.raises(
        UserError, match=r"some\.txt: lists ulm/ulm_2, but .*train/ulm/ulm_2_leftImg8bit\.png is missing"
    ):
        open_part(tmp_path, **fields)
    with pytest.raises(UserError, match=r"none\.txt: cannot be read .* names of the images"):
        open_part(tmp_path, **fields | {"train_split": "none.txt"})


def test_a_test_part_has_no_labels(tmp_path):
    write_ade20k(tmp_path, count=1)
    for number in (1, 2):
        write_noise(tmp_path / f"images/testing/ADE_test_{number}.jpg", (64, 48), number)
    dataset = open_part(tmp_path, "test")
    assert dataset.names == ["ADE_test_1", "ADE_test_2"]
    assert (dataset[0][1].shape, dataset[0][1].unique().tolist()) == ((48, 64), [IGNORED_LABEL])
    (tmp_path / "one.txt").write_text("ADE_test_2\n")
    assert open_part(tmp_path, "test", test_split="one.txt").names == ["ADE_test_2"]
    assert open_part(tmp_path, "test", test_images="images/validation").names == ["ADE_valid_00000001"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_by_their_exif_orientation_and_labels_are_not(orientation, tmp_path):
    """The labels are those of the turned image, as the original reads both."""
    turns = [lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud]
    turns += [
        lambda x: np.swapaxes(x, 0, 1),
        lambda x: np.rot90(x, -1),
        lambda x: np.rot90(x, 2).swapaxes(0, 1),
        np.rot90,
    ]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    write_ade20k(tmp_path, count=1)
    image_path, label_path = (
        tmp_path / part / f"training/ADE_train_00000001.{suffix}"
        for part, suffix in (("images", "jpg"), ("annotations", "png"))
    )
    with Image.open(image_path) as image:
        image.save(image_path, exif=exif)
    with Image.open(image_path) as image:
        expected = turns[orientation - 1](np.asarray(image))
    labels = make_labels(expected.shape[1::-1], 0)
    Image.fromarray(labels).save(label_path, exif=exif)
    dataset = open_part(tmp_path)
    turned, read = dataset[0]
    assert np.array_equal(turned.permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(read.numpy(), labels - 1)  # 0 becomes 255
    Image.fromarray(labels.T).save(label_path)
    height, width = labels.shape
    with pytest.raises(
        UserError, match=rf"png: has {height}x{width} pixels, but .*jpg has {width}x{height}; each pixel"
    ):
        dataset[0]


# ------------------------------------------------------------------------------------------------------ transforms


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((512, 683), 1.0, (512, 683)),  # the shorter side decides
        ((300, 500), 1.0, (512, 853)),
        ((100, 900), 1.0, (228, 2048)),  # the longer side decides
        ((900, 100), 0.5, (1024, 114)),
        ((480, 640), 1.75, (896, 1195)),
        ((481, 641), 0.7777, (398, 530)),  # sides of the scale are whole: 1592 and 398
    ],
)
def test_images_are_fitted_into_the_scale(size, ratio, expected):
    assert fitted_size(size, (2048, 512), ratio) == fitted_size(size, (512, 2048), ratio) == expected


@pytest.mark.parametrize("size", [(7, 5), (20, 31), (12, 9)])
def test_resizing_equals_a_loop(size):
    """Bilinear between the centres of pixels, unsmoothed; labels from the pixel under the corner."""
    image = torch.randint(256, (3, 12, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = image[0]
    resized, relabelled = resize_image(image, size), resize_labels(labels, size)
    for y, x in np.ndindex(*size):
        v, u = (
            min(max((i + 0.5) * old / new - 0.5, 0), old - 1) for i, old, new in zip((y, x), (12, 9), size, strict=True)
        )
        top, left = int(v), int(u)
        bottom, right = min(top + 1, 11), min(left + 1, 8)
        for c in range(3):
            channel = image[c].double()
            upper = channel[top, left] * (1 - u + left) + channel[top, right] * (u - left)
            lower = channel[bottom, left] * (1 - u + left) + channel[bottom, right] * (u - left)
            assert abs(resized[c, y, x].item() - (upper * (1 - v + top) + lower * (v - top))) < 1
        assert relabelled[y, x] == labels[int(y * 12 / size[0]), int(x * 9 / size[1])]


def test_crops_avoid_a_class_that_fills_them():
    """Left half one class, right half many: all crops see both, unless ten tries find none."""
    labels = torch.zeros(40, 80, dtype=torch.uint8)
    labels[:, 40:] = torch.arange(40) % 7 + 1
    labels[:4] = IGNORED_LABEL
    image = labels.expand(3, -1, -1)
    np.random.seed(0)
    for _ in range(200):
        part, crop = random_crop(image, labels, 24)
        assert crop.shape == (24, 24)
        assert torch.equal(part[1], crop)
        counts = torch.bincount(crop.flatten(), minlength=256)[:255]
        assert counts.max() < 0.75 * counts.sum()
    tops = {
        int(random_crop(torch.arange(40).view(1, 40, 1).expand(3, 40, 80), labels, 24)[0][0, 0, 0]) for _ in range(400)
    }
    assert tops == set(range(17))  # up to the border
    alone = torch.ones(40, 80, dtype=torch.uint8)
    assert random_crop(image, alone, 24)[1].unique().tolist() == [1]  # nothing better to be found
    assert random_crop(image, labels, 60)[1].shape == (40, 60)  # all there is of a side


def test_colours_change_as_by_opencv():
    """To within a level, and nearly all exactly; see tests/data/opencv_hsv.json."""
    sample = np.load(DATA / "opencv_hsv.npz")
    for name, option, values in (("saturated", "factor", "factors"), ("shifted", "shift", "shifts")):
        rows = [
            change_hsv(sample["rgb"][:, [row]], **{option: value.item()}) for row, value in enumerate(sample[values])
        ]
        differences = np.abs(np.concatenate(rows, axis=1).astype(int) - sample[name])
        assert differences.max() <= 1
        assert (differences == 0).mean() > 0.99


@pytest.mark.parametrize("contrast_first", [True, False])
def test_distortions_are_made_one_after_the_other(contrast_first, monkeypatch):
    """With whole levels after each."""
    coins, uniform = iter([True, contrast_first, True, True, True]), iter([20.5, 1.25, 0.7])
    monkeypatch.setattr(transforms, "_coin", lambda: next(coins))
    monkeypatch.setattr(np.random, "uniform", lambda low, high: next(uniform))
    monkeypatch.setattr(np.random, "randint", lambda low, high: -15)
    image = torch.randint(256, (3, 150, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = np.trunc(np.minimum(image.numpy() + 20.5, 255))
    if contrast_first:
        expected = np.trunc(np.minimum(expected * 1.25, 255))
    expected = change_hsv(change_hsv(expected.astype(np.uint8), factor=0.7), shift=-15)
    if not contrast_first:
        expected = np.trunc(np.minimum(expected * 1.25, 255))
    before = image.clone()
    assert np.array_equal(distort_colours(image).numpy(), expected)
    assert torch.equal(image, before)
    monkeypatch.setattr(transforms, "_coin", lambda: False)
    assert torch.equal(distort_colours(image), image)


def test_distortions_have_the_published_probabilities():
    np.random.seed(0)
    orders, drawn = Counter(), {}
    for _ in range(8000):
        steps = [((step.func, *step.keywords), *step.keywords.values()) for step in draw_distortion()]
        orders[tuple(kind for kind, _ in steps)] += 1
        for kind, value in steps:
            drawn.setdefault(kind, []).append(value)
    brightness, contrast = (scale_levels, "shift"), (scale_levels, "factor")
    saturation, hue = (change_hsv, "factor"), (change_hsv, "shift")
    expected = Counter()
    for order in ((brightness, contrast, saturation, hue), (brightness, saturation, hue, contrast)):
        for count in range(5):
            for chosen in itertools.combinations(order, count):
                expected[chosen] += 1 / 32
    assert set(orders) == set(expected)
    for order, share in expected.items():
        assert orders[order] / 8000 == pytest.approx(share, abs=0.01), order
    for kind, (low, high) in {brightness: (-32, 32), contrast: (0.5, 1.5), saturation: (0.5, 1.5)}.items():
        quantiles = np.quantile(drawn[kind], [0, 0.25, 0.5, 0.75, 1])
        assert quantiles == pytest.approx(np.linspace(low, high, 5), abs=0.03 * (high - low))
        assert quantiles[[0, 4]] == pytest.approx([low, high], abs=0.005 * (high - low))
    hues = Counter(drawn[hue])
    assert set(hues) == set(range(-18, 18))
    assert all(70 < count < 160 for count in hues.values())  # 111 expected


def test_training_views_are_cropped_flipped_and_padded(ade20k_folder):
    dataset = open_part(ade20k_folder)
    random.seed(0)
    np.random.seed(0)
    padded = 0
    for index in [0, 1, 2, 3, 4] * 8:
        image, labels = augment(*dataset[index], (160, 40), (0.5, 2.0), 64)
        assert (image.shape, image.dtype) == ((3, 64, 64), torch.float32)
        assert (labels.shape, labels.dtype) == ((64, 64), torch.uint8)
        outside = (image == 0).all(0)
        assert (labels[outside] == IGNORED_LABEL).all()
        padded += outside[-1, -1].item()
        assert not outside[0, 0]
    assert 0 < padded < 40


class Places(torch.utils.data.Dataset):
    """One image whose pixels have their label as each of their three levels; labels grow to the right."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        labels = torch.arange(40 * 60, dtype=torch.int64).view(40, 60) % 90
        return labels.to(torch.uint8).expand(3, -1, -1), labels.to(torch.uint8)


def test_images_and_labels_are_flipped_together_half_of_the_time(monkeypatch):
    monkeypatch.setattr(transforms, "distort_colours", lambda image: image)
    monkeypatch.setattr(transforms, "normalise", lambda image: image)
    np.random.seed(0)
    flips = []
    for _ in range(200):
        image, labels = augment(*Places()[0], (60, 40), (1.0, 1.0), 32)
        assert torch.equal(image[0], labels)
        flips.append(bool(labels[0, 0] > labels[0, 1]) if labels[0, 0] not in (0, 89) else None)
    decided = [flip for flip in flips if flip is not None]
    assert 0.4 < np.mean(decided) < 0.6


def test_training_images_are_distorted_in_their_colours(monkeypatch):
    settings = (60, 40), (1.0, 1.0), 32
    np.random.seed(0)
    distorted = [augment(*Places()[0], *settings)[0] for _ in range(10)]
    monkeypatch.setattr(transforms, "distort_colours", lambda image: image)
    np.random.seed(0)
    plain = [augment(*Places()[0], *settings)[0] for _ in range(10)]
    assert sum(not torch.equal(a, b) for a, b in zip(distorted, plain, strict=True)) > 7


def test_training_images_are_resized_by_a_random_factor():
    """Without a crop that cuts anything, the view shows the whole image at its size."""
    np.random.seed(0)
    views = [augment(*Places()[0], (60, 40), (0.5, 2.0), 200) for _ in range(60)]
    heights = [int((labels != IGNORED_LABEL).any(1).sum()) for _, labels in views]
    assert min(heights) < 25
    assert max(heights) > 72
    assert len(set(heights)) > 30


def test_views_of_an_evaluation(ade20k_folder):
    dataset = open_part(ade20k_folder, "val")
    index, images, labels = EvalViews(dataset, (2048, 64), (0.5, 1.0, 1.75))[2]
    assert index == 2
    assert [tuple(image.shape) for image in images] == [(3, 51, 32), (3, 102, 64), (3, 179, 112)]
    assert torch.equal(labels, dataset[2][1])
    one = EvalViews(dataset, (2048, 48))[0][1][0]
    expected = dataset[0][0].double() / 255  # already of that size
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert torch.allclose(one[channel].double(), (expected[channel] - mean) / std, atol=1e-5)
    assert torch.equal(one, normalise(dataset[0][0]))


def test_images_too_flat_for_the_network_are_named(ade20k_folder):
    views = EvalViews(open_part(ade20k_folder, "val"), (2048, 48), (0.5, 1.0))
    with pytest.raises(ValueError, match=r"image ADE_valid_00000001: has 32x24 pixels when .* raise scale, or remove"):
        views[0]


def test_label_files_are_found_in_any_case_of_letters(tmp_path):
    write_ade20k(tmp_path, count=2)
    path = tmp_path / "annotations/training/ADE_train_00000002.png"
    path.rename(path.with_suffix(".PNG"))
    dataset = open_part(tmp_path)
    assert np.array_equal(dataset[1][1] != IGNORED_LABEL, make_labels(ADE20K_SIZES[1], 1) != 0)
    image = tmp_path / "images/training/ADE_train_00000002.jpg"
    image.with_suffix(".png").write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match=r"00000002\.png: is a second file with this name"):
        open_part(tmp_path)


def test_class_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "classes.txt").write_bytes("Stra\xdfe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt: is not in UTF-8"):
        read_classes(tmp_path / "classes.txt")
