"""The scripts' defaults with the published commands are the published recipes of the dense tasks."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from core.distributed import Processes
from core.options import choose_amp
from dense.optimisation import build_scaler, parameter_groups
from dense.training import build_experiment, build_state, get_test_parser, get_train_parser, process_batch
from detection import train as detection_train
from detection.network import build_detector
from models.layers import LocallyGroupedAttention
from segmentation import train as segmentation_train
from segmentation.network import build_segmentor
from tests.helpers import ROOT, on_meta
from tests.test_models import DATA

TABLE = json.loads((DATA / "published_recipes.json").read_text())
EXPERIMENTS = [(task, name) for task in ("segmentation", "detection") for name in TABLE[task]]
NOT_FIELDS = {"images_per_gpu", "images_per_step", "window_padding"}  # compared otherwise
EIGHT_GPUS = Processes(torch.device("cuda", 0), rank=0, world_size=8)
STEPS = 1000  # in an epoch of detection


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def load(parser, task: str, name: str, *options: str):
    """Return the options of a command for an experiment on a machine with GPUs, and the experiment."""
    kind = (segmentation_train if task == "segmentation" else detection_train).Experiment
    args = parser.parse_args([str(ROOT / task / "configs" / f"{name}.py"), *options])
    return args, build_experiment(args, kind)


def test_every_published_experiment_is_in_the_table():
    for task in ("segmentation", "detection"):
        names = {path.stem for path in (ROOT / task / "configs").glob("*_*.py")}
        assert names == set(TABLE[task]) | {name for name in names if name.endswith("_shapes")}
    assert (len(TABLE["segmentation"]), len(TABLE["detection"])) == (12, 24)


@pytest.mark.parametrize(("task", "name"), EXPERIMENTS)
def test_docstrings_have_the_published_commands(task, name):
    docstring = (ROOT / task / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert f"bash dist_train.sh configs/{name}.py 8\n" in docstring
    assert f"bash dist_test.sh configs/{name}.py checkpoint_file 8" in docstring


@pytest.mark.parametrize(("task", "name"), EXPERIMENTS)
def test_fields_are_the_published_ones(task, name):
    args, experiment = load(get_train_parser(""), task, name)
    recipe = TABLE[task][name]
    for field in recipe.keys() - NOT_FIELDS:
        value = getattr(experiment, field)
        assert (list(value) if isinstance(value, tuple) else value) == recipe[field], field
    assert process_batch(experiment, EIGHT_GPUS) == recipe["images_per_gpu"]
    assert experiment.global_batch == recipe["images_per_step"] == 8 * recipe["images_per_gpu"]
    precision = {"fp32": None, "fp16": torch.float16}[recipe["precision"]]
    assert choose_amp(args.amp, EIGHT_GPUS.device) == precision
    tested, _ = load(get_test_parser(""), task, name, "checkpoint")
    assert choose_amp(tested.amp, EIGHT_GPUS.device) == precision
    scaler = build_scaler(torch.device("cpu"), experiment.loss_scale, enabled=precision == torch.float16)
    assert scaler.is_enabled() == (precision == torch.float16)
    if "loss_scale" in recipe:
        assert scaler.get_scale() == recipe["loss_scale"]


@pytest.mark.parametrize(("task", "name"), EXPERIMENTS)
def test_learning_rates_are_the_published_ones(task, name):
    args, experiment = load(get_train_parser(""), task, name, "--amp", "off")
    recipe = TABLE[task][name]
    if task == "segmentation":
        end, factor = recipe["iterations"], partial(segmentation_train.lr_factor, experiment=experiment)
    else:
        end = recipe["epochs"] * STEPS
        factor = partial(detection_train.lr_factor, experiment=experiment, steps=STEPS)
    parts = SimpleNamespace(lr_factor=factor, sampler=None)
    state = build_state(args, experiment, torch.nn.Linear(1, 1), parts, torch.device("cpu"))
    for iteration in (0, 1, 250, 499, 500, 1499, 1500, *range(0, end, STEPS // 2), end - 1):
        warmup = recipe["warmup_iterations"]
        start = recipe.get("warmup_ratio", 1.0) if iteration < warmup else 1.0
        scale = start + (1 - start) * iteration / warmup if warmup else 1.0
        if task == "segmentation":
            left = (1 - iteration / end) ** recipe["power"]
            regular = (recipe["lr"] - recipe["min_lr"]) * left + recipe["min_lr"]
        else:
            regular = recipe["lr"] * 0.1 ** sum(iteration >= epoch * STEPS for epoch in recipe["milestones"])
        state.lr_scheduler.step_update(iteration)
        for group in state.optimizer.param_groups:
            assert group["lr"] == pytest.approx(regular * scale, rel=1e-9)


@pytest.mark.parametrize(("task", "name"), EXPERIMENTS)
def test_networks_are_the_published_ones(task, name):
    _, experiment = load(get_train_parser(""), task, name)
    recipe = TABLE[task][name]
    with on_meta():
        if task == "segmentation":
            model = build_segmentor(experiment, 150, pretrained=False)
        else:
            model = build_detector(experiment, 80, pretrained=False)
    backbone = model.backbone if task == "segmentation" else model.backbone.body
    paddings = {layer.window_padding for layer in backbone.modules() if isinstance(layer, LocallyGroupedAttention)}
    assert paddings == ({recipe["window_padding"]} if recipe["window_padding"] else set())
    blocks = [block for stage in backbone.blocks for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx(torch.linspace(0, recipe["drop_path"], len(blocks)).tolist())
    decayed, kept = set(), set()
    for group in parameter_groups(model, experiment.weight_decay, experiment.not_decayed):
        assert group["weight_decay"] in (recipe["weight_decay"], 0.0)
        (decayed if group["weight_decay"] else kept).update(map(id, group["params"]))
    for parameter_name, parameter in model.named_parameters():
        is_kept = any(part in parameter_name for part in recipe["not_decayed"])
        assert (id(parameter) in kept, id(parameter) in decayed) == (is_kept, not is_kept), parameter_name
