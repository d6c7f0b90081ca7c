"""The embedded scenes: the same for the same seed, and true to their labels, masks and boxes."""

import numpy as np
import pytest

from core import shapes


def test_a_seed_gives_one_scene():
    first, again, other = (shapes.draw_scene((0, i), 64) for i in (7, 7, 8))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.labels == again.labels
    assert first.image.tobytes() != other.image.tobytes()


def test_ten_classes_all_drawn():
    assert len(shapes.CLASSES) == 10
    drawn = {shapes.draw_scene(i, 32).labels[0] for i in range(200)}
    assert drawn == set(range(10))


@pytest.mark.parametrize("label", range(10))
def test_an_object_stands_out_where_its_mask_says(label):
    for seed in range(5):
        scene = shapes.draw_scene((1, seed), 96, labels=[label])
        pixels, mask = np.asarray(scene.image, float), scene.masks[0]
        assert scene.image.size == (96, 96)
        assert mask.sum() > 0.02 * mask.size
        colour = np.median(pixels[mask], axis=0)
        assert np.abs(pixels[mask] - colour).max(axis=1).mean() < 25  # one colour but for its smooth border
        assert np.linalg.norm(pixels[~mask] - colour, axis=1).mean() > 60


def test_several_objects_hide_each_other():
    scene = shapes.draw_scene(3, 64, labels=[0, 3, 5, 5], radii=(0.2, 0.4))
    assert scene.labels == (0, 3, 5, 5)
    assert scene.masks.shape == (4, 64, 64)
    assert scene.masks.sum(axis=0).max() == 1  # a pixel belongs to one object
    for mask, (x1, y1, x2, y2) in zip(scene.masks, scene.boxes.astype(int), strict=True):
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
        if mask.any():
            assert mask[y1].any()
            assert mask[y2 - 1].any()
            assert mask[:, x1].any()
            assert mask[:, x2 - 1].any()


def test_an_empty_scene_has_no_boxes():
    scene = shapes.draw_scene(0, 32, labels=[])
    assert scene.masks.shape == (0, 32, 32)
    assert scene.boxes.shape == (0, 4)
