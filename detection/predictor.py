"""Prediction of the objects in one's own images; predict.py loads the predictor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from core.description import Description
from core.images import draw_captions
from core.predictor import Predictor, Result, Source, open_image
from detection.configs.recipes import Experiment
from detection.data import encode_mask
from detection.network import build_detector
from detection.pictures import describe_none, draw_detections, keep_above
from detection.weights import load_detector

MIN_SCORE = 0.3  # of the objects that are drawn and listed


@dataclass(frozen=True)
class Detection(Result):
    """Objects in an image, the highest score first."""

    boxes: Tensor  # x1, y1, x2, y2 in pixels, float32 `(n, 4)`
    labels: Tensor  # class indices, int64 `(n,)`
    scores: Tensor  # from 0 to 1, float32 `(n,)`
    masks: Tensor | None = None  # bool `(n, H, W)`; None if the network finds no masks

    def above(self, min_score: float) -> dict[str, Tensor]:
        """Return the tensors of the objects with a score of at least `min_score`, by their names."""
        found = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        if self.masks is not None:
            found["masks"] = self.masks
        return keep_above(found, min_score)

    def to_dict(self, min_score: float = MIN_SCORE) -> dict[str, Any]:
        """Return the objects with a score of at least `min_score`; masks are run-length codes, as in COCO's format."""
        found = self.above(min_score)
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        objects = [{"name": self.classes[i], "index": i, "score": score, "box": box} for i, score, box in rows]
        if self.masks is not None:
            for entry, mask in zip(objects, found["masks"], strict=True):
                entry["mask"] = encode_mask(mask.numpy())
        return {"objects": objects}

    def draw(self, min_score: float = MIN_SCORE) -> Image.Image:
        """Return a picture with the boxes, masks, names and scores of the objects of at least `min_score`."""
        found = self.above(min_score)
        picture = draw_detections(pil_to_tensor(open_image(self.source, upright=True)), found, self.classes)
        return picture if len(found["scores"]) else draw_captions([(describe_none(min_score), picture)])


class DetectionPredictor(Predictor):
    """Predictor of objects, with a network of `build_detector`, which resizes and normalises the images itself.

    It sees one image at a time, as the evaluation does, because padding has an effect.
    """

    load = staticmethod(load_detector)

    def __init__(self, model: nn.Module, description: Description, amp_dtype: torch.dtype | None = None):
        super().__init__(model, description, pil_to_tensor, amp_dtype)

    @staticmethod
    def build(description: Description) -> nn.Module:
        """Build the detector of a description."""
        return build_detector(description.to_experiment(Experiment), len(description.classes), pretrained=False)

    @torch.inference_mode()
    def predict(self, sources: Sequence[Source], inputs: Sequence[Tensor]) -> list[Detection]:
        results = []
        for source, pixels in zip(sources, inputs, strict=True):
            with self.autocast():
                found = self.model([pixels.to(self.device)])[0]
            results.append(Detection(source, self.classes, **{name: value.cpu() for name, value in found.items()}))
        return results
