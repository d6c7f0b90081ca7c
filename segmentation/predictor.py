"""Prediction of the class of each pixel of one's own images; predict.py loads the predictor."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from core.description import Description
from core.images import make_colours
from core.predictor import Predictor, Result, Source, open_image
from segmentation.configs.recipes import Experiment
from segmentation.network import Segmentor, build_predictor, build_segmentor
from segmentation.pictures import draw_overlay
from segmentation.transforms import evaluation_inputs
from segmentation.weights import load_segmentor


@dataclass(frozen=True)
class Segmentation(Result):
    """Class of each pixel of an image."""

    colours: Sequence[tuple[int, ...]]  # RGB colours of all classes
    labels: Tensor  # class indices, uint8 `(H, W)`

    def to_dict(self) -> dict[str, Any]:
        """Return the classes that occur, the largest first, with their shares of the pixels from 0 to 1."""
        shares = torch.bincount(self.labels.flatten(), minlength=len(self.classes)) / self.labels.numel()
        present = [index for index in shares.argsort(descending=True).tolist() if shares[index] > 0]
        return {"areas": [{"name": self.classes[i], "index": i, "share": shares[i].item()} for i in present]}

    def draw(self) -> Image.Image:
        """Return a picture of the image, the classes in colours over the image, and a legend."""
        image = pil_to_tensor(open_image(self.source, upright=True))
        return draw_overlay(image, {"prediction": self.labels}, self.classes, self.colours)


def to_input(image: Image.Image, scale: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Return the normalised image `(3, h, w)` at the scale of the evaluation, and the height and width before."""
    return evaluation_inputs(pil_to_tensor(image), scale)[0], (image.height, image.width)


class SegmentationPredictor(Predictor):
    """Predictor of label maps, with a network of `build_segmentor` and the fields of its experiment as options."""

    load = staticmethod(load_segmentor)

    def __init__(self, model: Segmentor, description: Description, amp_dtype: torch.dtype | None = None):
        experiment = description.to_experiment(Experiment)
        super().__init__(model, description, partial(to_input, scale=experiment.scale), amp_dtype)
        self.colours = list(description.colours) or make_colours(len(self.classes))
        self.predict_image = build_predictor(model, experiment, amp_dtype)

    @staticmethod
    def build(description: Description) -> Segmentor:
        """Build the network of a description."""
        return build_segmentor(description.to_experiment(Experiment), len(description.classes), pretrained=False)

    def predict(self, sources: Sequence[Source], inputs: Sequence[Any]) -> list[Segmentation]:
        results = []
        for index, (source, (pixels, size)) in enumerate(zip(sources, inputs, strict=True)):
            labels = self.predict_image(index, [pixels], size).to(torch.uint8).cpu()
            results.append(Segmentation(source, self.classes, self.colours, labels))
        return results
