"""Reading image files, for all three tasks."""

import errno

from PIL import Image


class BadImageError(ValueError):
    """An image file that cannot be decoded."""


def load_image(path: str) -> Image.Image:
    """Decode an image file to RGB; see `decode_image` for what is raised."""
    return decode_image(path, "RGB")


def decode_image(path: str, mode: str | None = None) -> Image.Image:
    """Decode an image file, to a mode of Pillow or as it is stored.

    Raises:
        BadImageError: If that fails; the file is named.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert(mode) if mode else image
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # the machine is at fault, not the file
        reason = "it is not in a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImageError(f"{path}: cannot be read as an image ({reason})") from error
