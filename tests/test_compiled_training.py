"""Compiled training: one graph, and no new one after the first epoch and its evaluation."""

import pytest
import torch
from torch import nn

import main
from core.run import Run
from detection import train as detection_train
from segmentation import train as segmentation_train
from tests.helpers import ROOT, TINY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_sets")]
SHAPES = [*TINY, "--data-set", "SHAPES", "--epochs", "3", "--drop-path", "0.1"]
ALL_TOGETHER = ["--global-batch", "8", "--model-ema", "--grad-checkpointing"]
CONFIGS = {
    segmentation_train: ("segmentation/configs/upernet_alt_gvt_tiny_shapes.py", "channels=8 crop_size=64 iterations=6"),
    detection_train: ("detection/configs/mask_rcnn_alt_gvt_tiny_shapes.py", "channels=8 proposals=50 epochs=3"),
}


def dense(script, *options) -> list[str]:
    """Return the arguments of a short training of a dense task, on images of one size."""
    config, fields = CONFIGS[script]
    fields = [*fields.split(), "batch_size=2", "global_batch=4", "pretrained=", "lr=1e-4"]
    fields += ["eval_interval=2"] if script is segmentation_train else ["scale=(64,64)", "milestones=()"]
    return [str(ROOT / config), "--device", "cpu", "--num_workers", "0", *options, "--cfg-options", *fields]


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        (main, SHAPES),
        (main, [*SHAPES, *ALL_TOGETHER]),
        (segmentation_train, dense(segmentation_train, "--grad-checkpointing")),
        (detection_train, dense(detection_train, "--grad-checkpointing")),
    ],
    ids=["classification", "all together", "segmentation", "detection"],
)
def test_training_compiles_one_graph(script, argv, tmp_path, monkeypatch):
    graphs, counts = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_with(self, wrapped=nn.Module.compile, **_):
        wrapped(self, backend=count)

    def finish(self, train_stats, test_stats, wrapped=Run.finish_epoch):
        counts.append(len(graphs))
        wrapped(self, train_stats, test_stats)

    def save(self, *names, wrapped=Run.save):  # before the evaluation, too
        counts.append(len(graphs))
        wrapped(self, *names)

    monkeypatch.setattr(nn.Module, "compile", compile_with)
    monkeypatch.setattr(Run, "finish_epoch", finish)
    monkeypatch.setattr(Run, "save", save)
    torch._dynamo.reset()
    script.main(insert(argv, "--compile", "--output_dir", str(tmp_path)))
    assert counts[0] == 1
    assert len(set(counts[1:])) == 1


def insert(argv: list[str], *options: str) -> list[str]:
    """Return arguments with options before --cfg-options, which takes all that follow it."""
    place = argv.index("--cfg-options") if "--cfg-options" in argv else len(argv)
    return [*argv[:place], *options, *argv[place:]]
