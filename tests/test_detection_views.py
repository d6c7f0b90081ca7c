"""Testing of detectors: thresholds, results without figures, saved results, and several views of an image."""

import json
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import batched_nms

from dense.experiments import load_experiment
from detection import augmented
from detection import test as test_script
from detection.augmented import AugmentedDetector
from detection.network import Transform, build_detector
from tests.helpers import fails
from tests.test_detection_runs import FOLDER, MASK, RETINA, SMALL, TINY


def build_random(config: str, *changes: str) -> torch.nn.Module:
    """Build a detector whose random weights find many objects with different scores."""
    torch.manual_seed(0)
    model = build_detector(
        load_experiment(FOLDER / config, [*SMALL, "head_std=0.2", *changes]), 3, pretrained=False
    ).eval()
    if config == MASK:
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
        torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.05)
    else:
        torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.005)
        torch.nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.002)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """File of random weights of a small Mask R-CNN for COCO's layout."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": build_random(MASK).state_dict()}, path)
    return path


@pytest.fixture
def run_test(coco_folder, capsys):
    """Return a function that tests on COCO's layout and returns what is printed."""

    def run(checkpoint, *options, root=coco_folder, changes=()) -> str:
        options = [
            *TINY,
            "--data-root",
            root,
            *options,
            "--cfg-options",
            *SMALL,
            "detections=10",
            "proposals=50",
            *changes,
        ]
        test_script.main([str(arg) for arg in (FOLDER / MASK, checkpoint, *options)])
        return capsys.readouterr().out

    return run


def test_saved_results_are_evaluated_without_the_network(weights, run_test, tmp_path, monkeypatch):
    scales = ["test_scales=((128, 96), (160, 120))"]
    augmented = run_test(weights, "--aug-test", "--out", tmp_path / "augmented.json", changes=scales)
    plain = run_test(weights, "--out", tmp_path / "plain.json", changes=scales)
    single = run_test(weights, "--aug-test", "--out", tmp_path / "single.json")
    monkeypatch.setattr(test_script, "build_detector", None)
    for printed, name in ((augmented, "augmented"), (plain, "plain"), (single, "single")):
        assert run_test(tmp_path / f"{name}.json") == printed[printed.index("bbox:") :]
    contents = {(tmp_path / f"{name}.json").read_text() for name in ("augmented", "plain", "single")}
    assert len(contents) == 3


def result_of(image: int, category: int = 1) -> str:
    """Return a file of one result."""
    return json.dumps([{"image_id": image, "category_id": category, "bbox": [1, 2, 3, 4], "score": 0.5}])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("[", [], "results.json: cannot be read as JSON"),
        ('{"a": 1}', [], "is not a list of results in COCO's format, each with bbox, category_id, image_id, score"),
        (result_of(7), [], "each with bbox, category_id, "),
        (result_of(8), ["--eval", "bbox"], "of image 8, wh"),
        (result_of(7, category=2), ["--eval", "bbox"], "has a result of category 2, which the annotations do not list"),
        ("[]", ["--out", "x.json"], "results are only evaluated; remove --out"),
        ("[]", ["--format-only"], "--format-only: there is no file to write; name it with --out"),
    ],
)
def test_faults_of_saved_results_are_named(content, options, message, coco_folder, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(content)
    command = [FOLDER / MASK, path, *TINY, "--data-root", coco_folder, *options, "--cfg-options", *SMALL]
    assert message in fails(capsys, test_script, *command)


def test_a_set_without_annotations_has_results_but_no_figures(weights, run_test, coco_folder, tmp_path, capsys):
    """COCO's test-dev has a file that lists images and categories alone, and another folder of images."""
    content = json.loads((coco_folder / "annotations/instances_val2017.json").read_text())
    del content["annotations"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/image_info_test-dev2017.json").write_text(json.dumps(content))
    (tmp_path / "test2017").symlink_to(coco_folder / "val2017")
    output = run_test(weights, "--format-only", "--out", tmp_path / "new.json", root=tmp_path)
    assert f"wrote 60 objects in 6 images to {tmp_path / 'new.json'}" in output
    assert "AP" not in output
    run_test(weights, "--out", tmp_path / "val.json")
    assert (tmp_path / "new.json").read_text() == (tmp_path / "val.json").read_text()
    changes = [*SMALL, "val_annotations=annotations/image_info_test-dev2017.json", "val_images=test2017"]
    command = [FOLDER / MASK, weights, *TINY, "--data-root", tmp_path, "--cfg-options", *changes]
    assert "test a set without annotations with --format-only" in fails(capsys, test_script, *command)


@pytest.mark.parametrize("config", [MASK, RETINA])
@torch.inference_mode()
def test_objects_are_chosen_by_the_thresholds_of_the_experiment(config):
    images = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))]

    def find(*changes: str) -> dict[str, torch.Tensor]:
        return build_random(config, "score_threshold=0.0", "proposals=60", *changes)(images)[0]

    everything = find("detections=100000", "nms_threshold=1.0")
    scores = everything["scores"]
    assert len(scores) > 100
    few = find("detections=7")
    assert len(few["scores"]) == 7
    middle = scores.median().item()
    above = find("detections=100000", "nms_threshold=1.0", f"score_threshold={middle}")["scores"]
    assert torch.equal(above, scores[scores > middle])
    counts = []
    for threshold in (0.2, 0.6):
        found = find("detections=100000", f"nms_threshold={threshold}")
        keep = batched_nms(everything["boxes"], scores, everything["labels"], threshold)
        assert torch.equal(found["scores"], scores[keep])
        counts.append(len(keep))
    assert counts[0] < counts[1] < len(scores)


def picture(height: int = 90, width: int = 120) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_views_of_retinanet_are_merged_as_in_the_original():
    """All candidates of all views, in pixels of the image, go into one suppression."""
    changes = ["score_threshold=0.01", "detections=100000", "nms_threshold=1.0"]
    model, image, scales = build_random(RETINA, *changes), picture(), [(128, 96), (200, 140)]
    parts = {"boxes": [], "scores": [], "labels": []}
    for scale in scales:
        model.transform = Transform(scale).eval()
        for flipped in (False, True):
            (found,) = model([image.flip(2) if flipped else image])
            if flipped:
                left, top, right, bottom = found["boxes"].T
                found["boxes"] = torch.stack([120 - right, top, 120 - left, bottom], dim=1)
            for name, values in parts.items():
                values.append(found[name])
    boxes, scores, labels = (torch.cat(values) for values in parts.values())
    assert len(scores) > 400
    keep = batched_nms(boxes, scores, labels, 0.5)[:50]
    model.nms_thresh, model.detections_per_img = 0.5, 50
    (merged,) = AugmentedDetector(model, scales)([image])
    torch.testing.assert_close(merged["scores"], scores[keep], rtol=0, atol=1e-6)
    torch.testing.assert_close(merged["boxes"], boxes[keep], rtol=0, atol=1e-3)
    assert torch.equal(merged["labels"], labels[keep])


@torch.inference_mode()
def test_views_of_mask_rcnn_are_averaged():
    """Flipping the image flips the objects; the order and the number of equal views do not matter."""
    model, image = build_random(MASK, "score_threshold=0.2", "detections=20", "proposals=200"), picture()
    (found,) = AugmentedDetector(model, [(128, 96), (200, 140)])([image])
    assert len(found["scores"]) == 20
    assert set(found) == set(model([image])[0])
    assert 0.01 < found["masks"].float().mean() < 0.9
    assert not torch.allclose(found["scores"], model([image])[0]["scores"][:20], atol=1e-3)
    (mirrored,) = AugmentedDetector(model, [(128, 96), (200, 140)])([image.flip(2)])
    left, top, right, bottom = mirrored["boxes"].T
    mirrored["boxes"] = torch.stack([120 - right, top, 120 - left, bottom], dim=1)
    mirrored["masks"] = mirrored["masks"].flip(2)
    (reordered,) = AugmentedDetector(model, [(200, 140), (128, 96), (200, 140), (128, 96)])([image])
    for other in (mirrored, reordered):
        torch.testing.assert_close(other["scores"], found["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(other["boxes"], found["boxes"], rtol=0, atol=0.05)
        assert torch.equal(other["labels"], found["labels"])
        assert (other["masks"] != found["masks"]).float().mean() < 1e-3


@pytest.mark.parametrize(("shares", "is_shown"), [((0.2, 0.7), False), ((0.4, 0.7), True)])
def test_boxes_scores_and_masks_of_views_are_averaged(shares, is_shown, monkeypatch):
    """One proposal in two views: the average of the masks' probabilities is below or above 0.5."""
    boxes = torch.tensor([[[10.0, 10.0, 50.0, 50.0]], [[14.0, 10.0, 54.0, 50.0]]])  # of each view
    scores = torch.tensor([[[0.4, 0.6, 0.0, 0.0]], [[0.8, 0.2, 0.0, 0.0]]])
    views = [SimpleNamespace(number=number, image_size=(96, 128)) for number in range(2)]
    monkeypatch.setattr(augmented, "_propose", lambda rpn, view: (boxes[view.number], torch.tensor([0.9])))
    monkeypatch.setattr(
        augmented, "_refine", lambda heads, view, _: (boxes[view.number][:, None].repeat(1, 4, 1), scores[view.number])
    )
    monkeypatch.setattr(augmented, "_find_masks", lambda heads, view, *_: torch.full((1, 28, 28), shares[view.number]))
    found = augmented.merge_mask_rcnn(build_random(MASK), views)
    torch.testing.assert_close(found["boxes"], torch.tensor([[12.0, 10.0, 52.0, 50.0]]))
    torch.testing.assert_close(found["scores"], torch.tensor([0.4]))
    assert found["labels"].tolist() == [0]
    assert bool(found["masks"].any()) == is_shown
