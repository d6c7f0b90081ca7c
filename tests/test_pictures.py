"""Pictures and image files of all tasks: captions, heat maps and images of 16 bits."""

import numpy as np
import torch
from PIL import Image

from core.images import draw_heat
from core.predictor import open_image
from predict import Classification


def test_text_grows_with_the_picture():
    """A legend of 14 pixels could not be read in a photograph of 3000."""
    network = Classification(Image.new("RGB", (3000, 2000)), ["a"], torch.zeros(1))
    assert network.draw().height == 2000 + 89 + 8  # a line of a font of 66 pixels, and the gap


def test_captions_have_letters_that_the_font_has():
    """Pillow's own font draws a box for ü."""
    pictures = [
        Classification(Image.new("RGB", (480, 9)), [name, "b"], torch.tensor([1.0, 0])).draw()
        for name in ("grün", "grun", "gr▯n")
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


def test_images_of_16_bits_are_scaled(tmp_path):
    """Pillow clips values above 255 to white."""
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as opened:
        assert (
            open_image(opened, upright=False).tobytes() == open_image(tmp_path / "image.png", upright=False).tobytes()
        )
    pixels = np.asarray(open_image(tmp_path / "image.png", upright=False))
    assert np.array_equal(pixels, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


def test_heat_goes_from_blue_to_yellow():
    image = Image.new("RGB", (64, 32), "black")
    pixels = np.asarray(draw_heat(image, torch.tensor([[2.0, 2.0, 5.0, 5.0]])), int)
    assert np.abs(pixels[:, :8] - np.array([0, 0, 64])).max() <= 1  # half of navy
    assert np.abs(pixels[:, -8:] - np.array([127, 127, 0])).max() <= 1  # half of yellow
