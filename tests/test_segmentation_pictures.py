"""Pictures of segmentations: colours, legends and ignored pixels."""

import warnings

import numpy as np
import torch

from segmentation.pictures import draw_overlay


def test_overlays_show_classes_in_their_colours():
    image = torch.full((3, 100, 200), 100, dtype=torch.uint8)
    labels = torch.full((100, 200), 255, dtype=torch.uint8)
    labels[:, 50:100], labels[:, 100:150] = 0, 2
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    picture = draw_overlay(image, {"prediction": labels}, ["a", "b", "c"], colours)
    pixels = np.asarray(picture).astype(int)
    second = 3 * 200 + 8  # the image is enlarged three times, then a gap
    panels = pixels[:300, : second + 600]
    assert (panels[:, :600] == 100).all()
    for x, expected in ((0, (100, 100, 100)), (50, (177, 50, 50)), (100, (50, 50, 177)), (150, (100, 100, 100))):
        assert (panels[:, second + 3 * x : second + 3 * (x + 50)] == expected).all()
    legend = pixels[:, second + 3 * 200 + 8 :].reshape(-1, 3).tolist()
    assert [255, 0, 0] in legend
    assert [0, 0, 255] in legend
    assert [0, 255, 0] not in legend  # not in the picture


def test_the_legend_has_the_classes_of_all_maps():
    image, maps = torch.zeros(3, 64, 64, dtype=torch.uint8), {}
    for title, label in (("prediction", 1), ("labels", 2)):
        maps[title] = torch.full((64, 64), label, dtype=torch.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pixels = np.asarray(draw_overlay(image, maps, ["a", "b", "c"], colours))
    legend = pixels[:, 3 * (512 + 8) :].reshape(-1, 3).tolist()
    assert [colour in legend for colour in map(list, colours)] == [False, True, True]


def test_an_image_without_labels_stays_as_it_is():
    image, labels = torch.full((3, 64, 64), 70, dtype=torch.uint8), torch.full((64, 64), 255, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(draw_overlay(image, {"labels": labels}, ["a"], [(255, 0, 0)]))
    assert (pixels[:512, 512 + 8 : 512 + 8 + 512] == 70).all()


def test_the_legend_of_a_wide_picture_is_drawn_once():
    """It has the height of the picture; names that the font writes alike keep their lines and colours."""
    labels = torch.zeros(360, 640, dtype=torch.uint8)
    labels[100:], labels[200:] = 1, 2
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    image = torch.zeros(3, 360, 640, dtype=torch.uint8)
    picture = draw_overlay(image, {"prediction": labels}, ["人", "车", "天"], colours)
    assert picture.height == 360 + 19 + 8  # a line of text and the gap
    assert picture.width < 2 * 648 + 100
    legend = np.asarray(picture)[:, 2 * 648 :].reshape(-1, 3).tolist()
    assert all(list(colour) in legend for colour in colours)
