"""Data of detection in COCO's format on disk, the published augmentation and the batches."""

import copy
import json
import math
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as mask_coding

from detection import data as detection_data
from detection.configs.recipes import Experiment, shapes_setting
from detection.data import CocoDetection, GroupedBatches, build_dataset, collate
from detection.metrics import summarise, to_results
from detection.network import build_detector
from detection.transforms import many_scales, one_scale, random_crop, random_flip, resize
from tests.small_data import COCO_SIZES, circle, write_coco


def open_coco(root, is_train: bool):
    """Open the training or the validation part of a data set in COCO's layout."""
    return build_dataset(Experiment("alt_gvt_tiny", "retinanet", data_root=str(root)), "train" if is_train else "val")


def test_training_leaves_out_what_the_original_does(coco_folder):
    train, val = (open_coco(coco_folder, is_train) for is_train in (True, False))
    assert train.classes == ["person", "dog", "toothbrush"]  # by id
    assert train.ids == [3, 7, 12, 42]  # neither without annotations nor with a side under 32
    assert val.ids == [3, 7, 12, 40, 41, 42]
    assert train.sizes == [(COCO_SIZES[i][1], COCO_SIZES[i][0]) for i in train.ids]
    image, target = train[1]
    assert (image.shape, image.dtype, target["image_id"]) == ((3, 60, 80), torch.uint8, 7)
    assert target["boxes"].tolist() == [[10, 5, 30, 20], [16, 11, 45, 40]]
    assert target["labels"].tolist() == [0, 2]
    assert torch.equal(target["masks"][1], torch.from_numpy(circle(80, 60)))
    assert target["masks"][0].nonzero().amin(0).tolist() == [5, 10]
    assert target["masks"][0].sum() == 300
    _, target = val[3]
    assert [tuple(target[name].shape) for name in ("boxes", "labels", "masks")] == [(0, 4), (0,), (0, 70, 70)]
    assert val[5][1]["labels"].tolist() == [0, 2, 1]  # with the box over the border


def test_data_may_lie_in_other_folders(coco_folder, tmp_path):
    places = {}
    for part, split in (("train", "train2017"), ("val", "val2017"), ("test", "val2017")):
        places |= {f"{part}_images": f"a/{part}", f"{part}_annotations": f"a/{part}/labels.json"}
        shutil.copytree(coco_folder / split, tmp_path / f"a/{part}")
        shutil.copy(coco_folder / f"annotations/instances_{split}.json", tmp_path / f"a/{part}/labels.json")
    experiment = Experiment("alt_gvt_tiny", "retinanet", data_root=str(tmp_path), **places)
    for part in ("train", "val", "test"):
        mine, published = build_dataset(experiment, part), open_coco(coco_folder, part == "train")
        assert mine.ids == published.ids
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(mine, published, strict=True))
        assert (mine.folder, mine.annotations) == (tmp_path / f"a/{part}", tmp_path / f"a/{part}/labels.json")


@pytest.fixture
def written(tmp_path):
    """Return a function that writes COCO's layout with annotations changed, and opens a part of it."""

    def write(change, is_train=False):
        write_coco(tmp_path)
        path = tmp_path / f"annotations/instances_{'train' if is_train else 'val'}2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return open_coco(tmp_path, is_train)

    return write


def test_images_of_crowds_and_ignored_annotations_are_background(written):
    """The original trains on all images with annotations, and omits these; in its evaluation only crowds differ."""

    def change(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = int(annotation["image_id"] == 3)
            annotation["ignore"] = int(annotation["image_id"] == 7)
        content["annotations"][-1]["ignore"] = True  # in image 42

    train = written(change, is_train=True)
    assert train.ids == [3, 7, 12, 42]
    assert [target["labels"].tolist() for _, target in train] == [[], [], [0, 2, 1], [0, 2]]
    assert train[0][1]["masks"].shape == (0, 50, 100)


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_detectors_train_on_background_images(written, detector):
    """Images whose annotations are all omitted pass the augmentation, and teach the classes and no boxes."""

    def change(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    train = written(change, is_train=True)
    experiment = shapes_setting("alt_gvt_tiny", detector, scale=(90, 60), channels=16)
    model = build_detector(experiment, len(train.classes), pretrained=False).train()
    for augment in (partial(one_scale, scale=(90, 60)), many_scales):
        np.random.seed(1)
        image, target = augment(*train[0])
        assert target["masks"].shape == (0, *image.shape[1:])
        losses = model([resize(image, target, (64, 96))[0]], [resize(image, target, (64, 96))[1]])
        sum(losses.values()).backward()
        boxes = [name for name in losses if "box_reg" in name or "mask" in name or "regression" in name]
        assert boxes
        for name, loss in losses.items():
            assert loss == 0 if name in boxes else loss > 0, name


def expected_boxes(annotations: list[dict], size, scale_size, flip: bool) -> np.ndarray:
    """Return boxes as the original computes them: corners, scaled by each side's own factor, clipped, flipped."""
    (height, width), (new_height, new_width) = size, scale_size
    rows = []
    for x, y, w, h in (annotation["bbox"] for annotation in annotations):
        x1, x2 = (min(max(side * new_width / width, 0), new_width) for side in (x, x + w))
        y1, y2 = (min(max(side * new_height / height, 0), new_height) for side in (y, y + h))
        rows.append([new_width - x2, y1, new_width - x1, y2] if flip else [x1, y1, x2, y2])
    return np.array(rows)


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_are_clipped_to_resized_images_as_in_the_original(flip, written, monkeypatch):
    rng = np.random.default_rng(0)

    def change(content):
        for annotation in content["annotations"]:
            width, height = COCO_SIZES[annotation["image_id"]]
            corner = rng.uniform(-0.3, 0.7, 2) * (width, height)
            sides = rng.uniform(0.4, 0.9, 2) * (width, height)
            annotation.update(bbox=[*corner.tolist(), *sides.tolist()], iscrowd=0, area=50)

    monkeypatch.setattr(np.random, "rand", lambda: 0.9 if flip else 0.1)
    dataset = written(change, is_train=True)
    clipped = 0
    for image_id, (image, target) in zip(dataset.ids, dataset, strict=True):
        resized, new = one_scale(image, target, scale=(133, 77))
        boxes = expected_boxes(dataset.coco.imgToAnns[image_id], image.shape[1:], resized.shape[1:], flip)
        np.testing.assert_allclose(new["boxes"].numpy(), boxes, atol=1e-4)
        clipped += np.isin(boxes, (0, *resized.shape[1:])).sum()
    assert clipped > 5


def evaluate_truth(dataset) -> dict[str, float]:
    """Return the figures of the objects of a data set themselves as what was found."""
    results = []
    for _, target in dataset:
        scores = torch.ones(len(target["labels"]))
        results += to_results(target["image_id"], {**target, "scores": scores}, dataset.category_ids)
    return summarise(dataset.coco, dataset.ids, results, ("bbox", "segm"))


@pytest.mark.parametrize("missing", ["segmentation", "area", "iscrowd", "id"])
def test_what_annotations_may_leave_out(missing, written):
    def change(content):
        for annotation in content["annotations"]:
            del annotation[missing]

    dataset = written(change)
    if missing == "segmentation":  # the mask is that of the box
        _, target = dataset[0]
        assert target["masks"][0].nonzero().tolist() == [[y, x] for y in range(5, 20) for x in range(10, 30)]
    assert all(0 <= value <= 1 or value == -1 for value in evaluate_truth(dataset).values())


@pytest.mark.parametrize("ids", [range(15), [7] * 15])
def test_numbers_of_annotations_do_not_matter(ids, written):
    expected = evaluate_truth(written(lambda content: None))

    def change(content):
        for annotation, number in zip(content["annotations"], ids, strict=False):
            annotation["id"] = number

    assert evaluate_truth(written(change)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(image_id=999), "annotation 101 is of image 999, which is not listed"),
        (lambda c: c["annotations"][2].update(category_id=5), "annotation 102 has the category 5, which is not listed"),
        (
            lambda c: c["annotations"][0].update(bbox=[80, 5, 20, 15]),
            r"annotation 100 has the box \[80, 5, 20, 15\], outside its image 7 of 80x60 pixels",
        ),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 100 has the box None; it should be four numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 100 has the box \[1, 2, 3\]; it should be"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, "3", 4]), "annotation 100 has the box"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "annotation 100 has the box"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), "annotation 100 has a segmentation that is"),
        (lambda c: c["annotations"][1]["segmentation"].update(size=[9, 9]), "annotation 101 has a mask that is not"),
        (lambda c: c["annotations"][0].update(segmentation=[["a"] * 6]), "annotation 100 has a segmentation that is"),
        (lambda c: c["annotations"][0].update(segmentation=[[None] * 6]), "annotation 100 has a segmentation that is"),
        (lambda c: c["annotations"][1]["segmentation"].update(size=5), "annotation 101 has a mask that is not"),
        (lambda c: c["annotations"][1]["segmentation"].update(counts=""), "annotation 101 has a mask that is not"),
        (lambda c: c["annotations"][1]["segmentation"].update(counts=[-5, 4805]), "annotation 101 has a mask that is"),
        (lambda c: c["annotations"][1]["segmentation"].update(counts=["a"]), "annotation 101 has a mask that is not"),
        (
            lambda c: c["annotations"][1]["segmentation"].update(counts="garbage"),
            r"the mask of annotation number 2, of image 7, cannot be decoded \(.*\); correct or remove it",
        ),
        (lambda c: c["annotations"][0].update(area="x"), "annotation 100 has the area x; it should be a number"),
        (lambda c: c["annotations"][0].update(area=None), "annotation 100 has the area None; it should be a number"),
        (lambda c: c["annotations"][0].update(image_id=[1]), r"annotation 100 is of image \[1\], which is not listed"),
        (lambda c: c["annotations"][0].update(category_id={}), "annotation 100 has the category {}, which is not"),
        (lambda c: c["annotations"][0].update(bbox=[9, 9, -3, 5]), r"the box \[9, 9, -3, 5\]; its width and height"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 10**400, 4]), "annotation 100 has the box"),
        (lambda c: c["images"][1].update(file_name="x" * 5000), r"x is missing; .* lists it as image 12"),
        (lambda c: c["annotations"].append(5), "entry 15 of the annotations is not an object"),
        (lambda c: c["images"][0].pop("width"), "image 7 has the width None"),
        (lambda c: c["images"][0].update(file_name=""), "image 7 has no file_name"),
        (lambda c: c["images"][0].pop("id"), "image number 1 of the list has no id"),
        (lambda c: c["images"][1].update(id=7), "the image id 7 occurs twice"),
        (lambda c: c["categories"][0].update(name=""), "category 18 has no name"),
        (lambda c: c["categories"].clear(), "its list of categories is empty"),
        (lambda c: c.pop("categories"), "needs the lists images, annotations and categories"),
        (lambda c: c["images"][1].update(file_name="none.jpg"), r"none\.jpg is missing; .* lists it as image 12"),
        (lambda c: c["images"][3].update(width=71), r"has 70x70 pixels, but image 40 of the annotations 71x70"),
    ],
)
def test_faults_of_the_annotations_are_named(change, message, written, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        list(written(change))
    assert str(tmp_path) in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder; set the folder of .* with --data-root"):
        open_coco(tmp_path / "nowhere", is_train=True)
    with pytest.raises(ValueError, match=r"instances_train2017\.json: cannot be read"):
        open_coco(tmp_path, is_train=True)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"instances_train2017\.json: is not valid JSON"):
        open_coco(tmp_path, is_train=True)


def test_shapes_have_the_boxes_of_their_masks(monkeypatch):
    monkeypatch.setattr(detection_data, "SHAPES_VAL", 20)
    dataset = build_dataset(shapes_setting("alt_gvt_tiny", "retinanet"), "val")
    assert len(dataset.coco.anns) == sum(len(dataset[i][1]["labels"]) for i in range(20))
    for annotation in dataset.coco.anns.values():
        mask = mask_coding.decode(annotation["segmentation"])
        ys, xs = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + w, y + h)
        assert annotation["area"] == mask.sum()
    assert {len(dataset[i][1]["labels"]) for i in range(20)} == {1, 2, 3, 4}


# --------------------------------------------------------------------------------------------------- augmentation


@pytest.fixture
def sample():
    """An image whose pixels tell where they were, with a mask in each box that fills it."""
    height, width = 60, 90
    y, x = np.mgrid[:height, :width]
    image = torch.from_numpy(np.stack([x, y, x * 0]).astype(np.uint8))
    boxes = torch.tensor([[10.0, 20, 40, 50], [60, 5, 90, 25]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return image, {"boxes": boxes, "labels": torch.tensor([3, 1]), "masks": masks, "image_id": 5}


def assert_boxes_fit(target, tolerance=1.0) -> None:
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        ys, xs = mask.nonzero().unbind(1)
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (found - box).abs().max() <= tolerance


def test_a_mirrored_sample_fits_together(sample, monkeypatch):
    monkeypatch.setattr(np.random, "rand", lambda: 0.7)
    image, target = random_flip(*sample)
    assert torch.equal(image, sample[0].flip(2))
    assert target["boxes"].tolist() == [[50, 20, 80, 50], [0, 5, 30, 25]]
    assert_boxes_fit(target, 0)
    monkeypatch.setattr(np.random, "rand", lambda: 0.3)
    assert random_flip(*sample)[0] is sample[0]


def test_boxes_are_clipped_to_the_resized_image(sample):
    image, target = sample
    target["boxes"] = torch.tensor([[-5.0, 20, 40, 70], [60, 5, 95, 25]])  # over the left, lower and right border
    _, resized = resize(image, target, (120, 180))
    assert resized["boxes"].tolist() == [[0, 40, 80, 120], [120, 10, 180, 50]]


@pytest.mark.parametrize("augment", [partial(one_scale, scale=(90, 60)), many_scales], ids=["one scale", "many scales"])
def test_samples_are_mirrored_half_of_the_time(augment, sample):
    """The first channel grows to the right, and falls where the image was mirrored."""
    np.random.seed(0)
    mirrored = []
    for _ in range(100):
        image, target = augment(*copy.deepcopy(sample))
        row = image[0, 0].int()
        mirrored.append(bool(row[0] > row[-1]))
        assert_boxes_fit(target, tolerance=max(image.shape) / 20)
    assert 0.35 < np.mean(mirrored) < 0.65


def test_a_resized_sample_fits_together(sample):
    image, target = resize(*sample, (45, 120))
    assert image.shape == (3, 45, 120)
    expected = sample[1]["boxes"] * torch.tensor([120 / 90, 45 / 60] * 2)
    assert torch.allclose(target["boxes"], expected)
    assert_boxes_fit(target)


def test_a_cropped_sample_fits_together(sample):
    np.random.seed(0)
    counts = set()
    for _ in range(200):
        image, target = random_crop(*copy.deepcopy(sample), 20, 40)
        height, width = image.shape[1:]
        assert 20 <= height <= 40
        assert 20 <= width <= 40
        left, top = image[:2, 0, 0].tolist()
        assert torch.equal(image, sample[0][:, top : top + height, left : left + width])
        assert_boxes_fit(target, 0)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        counts.add(len(target["labels"]))
    assert counts == {0, 1, 2}


def test_scales_of_both_settings(sample):
    np.random.seed(0)
    image, _ = one_scale(*sample, scale=(1333, 800))
    assert image.shape[1:] == (800, 1200)
    sizes = [tuple(many_scales(*sample)[0].shape[1:]) for _ in range(60)]
    shorter = {min(size) for size in sizes}
    assert shorter <= set(range(480, 801, 32)) | {s for s in shorter if max(sizes[0]) >= 1332}
    assert len(shorter) >= 9
    assert max(max(size) for size in sizes) <= 1333
    ratios = [size[1] / size[0] for size in sizes]
    assert 0.3 < np.mean([abs(ratio - 1.5) < 0.01 for ratio in ratios]) < 0.7  # the others were cropped


# -------------------------------------------------------------------------------------------------------- batches


def filled_counts(count: int, multiple: int) -> list[int]:
    """Return how often each of `count` images is seen if they are repeated in turn up to a multiple of a number."""
    whole = math.ceil(count / multiple) * multiple
    return sorted(Counter(i % count for i in range(whole)).values())


@pytest.mark.parametrize("world_size", [2, 8])
def test_batches_are_those_of_the_original(world_size):
    """The original fills each group up to a multiple of batch size x processes, and shuffles batches of one kind."""
    rng = np.random.default_rng(3)
    sizes = [(10, 20) if wide else (20, rng.integers(10, 21)) for wide in rng.random(101) < 0.7]
    groups = [[i for i, (h, w) in enumerate(sizes) if (w / h > 1) == wide] for wide in (True, False)]
    multiple = 2 * world_size
    samples = sum(math.ceil(len(group) / 2 / world_size) * 2 for group in groups)  # of each process
    options = {"batch_size": 2, "global_batch": multiple, "world_size": world_size, "seed": 1}
    samplers = [GroupedBatches(sizes, rank=rank, **options) for rank in range(world_size)]
    epochs = []
    for epoch in (0, 1):
        parts = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            parts.append([[key.index for key in batch] for batch in sampler])
            assert len(sampler) == len(parts[-1]) == samples // 2
        for step in range(samples // 2):
            for sampler, part in zip(samplers, parts, strict=True):
                sampler.set_epoch(epoch, step)
                assert [[key.index for key in batch] for batch in sampler] == part[step:]
        batches = [batch for part in parts for batch in part]
        kinds = [{i in groups[0] for i in batch} for batch in batches]
        assert all(len(batch) == 2 and len(kind) == 1 for batch, kind in zip(batches, kinds, strict=True))
        steps = [{i in groups[0] for part in parts for i in part[step]} for step in range(samples // 2)]
        assert sum(len(kinds) == 2 for kinds in steps) >= len(steps) / 5  # one step has batches of both kinds
        counts = Counter(i for batch in batches for i in batch)
        for group in groups:
            assert sorted(counts[i] for i in group) == filled_counts(len(group), multiple)
        epochs.append(batches)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("world_size", "global_batch"), [(1, 12), (2, 12), (3, 12), (2, 4)])
def test_steps_are_the_same_for_any_number_of_processes(world_size, global_batch):
    sizes = [(10, 20) if i % 3 else (20, 10) for i in range(40)]  # 26 wide, 14 high
    options = {"batch_size": 2, "global_batch": global_batch, "seed": 1}
    alone = list(GroupedBatches(sizes, **options))
    parts = [list(GroupedBatches(sizes, world_size=world_size, rank=rank, **options)) for rank in range(world_size)]
    per_step = global_batch // 2
    per_part = per_step // world_size
    for step in range(len(alone) // per_step):
        seen = [batch for part in parts for batch in part[step * per_part : (step + 1) * per_part]]
        assert sorted(seen) == sorted(alone[step * per_step : (step + 1) * per_step])
    assert {key.index for batch in alone for key in batch} == set(range(40))


def orders(epochs=2, count=40, **options) -> list[list[int]]:
    """Return the indices of each epoch, in their order."""
    sizes = [(10, 20) if i % 3 else (20, 10) for i in range(count)]
    sampler = GroupedBatches(sizes, **({"batch_size": 2, "global_batch": 4, "seed": 1} | options))
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append([key.index for batch in sampler for key in batch])
    return found


def test_batches_are_shuffled_anew_in_each_epoch():
    first, second = orders()
    assert set(first) == set(second) == set(range(40))
    assert first != second
    assert orders() == [first, second]
    assert orders(seed=2)[0] != first
    for order in (first, second):
        wide = [index % 3 != 0 for index in order[::2]]  # of each batch
        assert wide not in (sorted(wide), sorted(wide, reverse=True))  # groups are mixed
        for of_group in ([i for i in order if i % 3], [i for i in order if i % 3 == 0]):
            assert of_group != sorted(of_group)
    pairs = [sorted(order[i : i + 2]) for order in (first, second) for i in range(0, len(order), 2)]
    assert len({tuple(pair) for pair in pairs}) > len(pairs) * 0.7  # images are mixed within a group, too


def test_another_global_batch_continues_within_the_epoch():
    """Groups are filled up to whole steps, so an epoch has fewer images where steps are smaller."""
    sizes = [(10, 20)] * 3 + [(20, 10)]
    for global_batch, expected in ((1, 4), (2, 3), (4, 1), (8, 0)):
        sampler = GroupedBatches(sizes, batch_size=1, global_batch=global_batch)
        step = sampler.nearest_step(3, 2)
        assert step == expected
        sampler.set_epoch(0, step)
        assert len(sampler) == len(list(sampler)) == (sampler.steps - step) * global_batch


def test_batches_keep_images_and_targets_together(coco_folder):
    dataset = open_coco(coco_folder, is_train=True)
    images, targets = collate([dataset[0], dataset[1]])
    assert [image.shape[1:] for image in images] == [(50, 100), (60, 80)]
    assert [target["image_id"] for target in targets] == [3, 7]


def test_images_are_turned_by_their_exif_orientation(tmp_path):
    """The sizes and boxes of the annotations are those of the turned image, as in the original."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    stored = Image.new("RGB", (60, 40))
    stored.paste((255, 255, 255), (0, 20, 30, 40))  # lower left, so upper left when turned
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 60}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 30], "area": 600, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "box"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    image, target = CocoDetection(tmp_path, tmp_path / "a.json", "val")[0]
    assert image.shape == (3, 60, 40)
    bright = image.float().mean(0) > 128
    assert torch.equal(bright, target["masks"][0].bool())
