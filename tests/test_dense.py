"""Experiments, backbones, parameter groups and schedules of the dense tasks."""

import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import pytest
import timm
import torch

from core.options import choose_amp
from dense.experiments import NonNegative, Positive, Rate, Side, change_fields, check_fields, load_experiment
from dense.networks import build_backbone
from dense.optimisation import IterationSchedule, build_scaler, linear_warmup, parameter_groups
from dense.training import build_experiment, build_state, get_test_parser, get_train_parser
from segmentation.configs.recipes import Experiment
from tests.helpers import ROOT, on_meta
from utils import UserError


@dataclass(frozen=True)
class Fields:
    """One field of each type and limit."""

    whole: int = 1
    real: float = 1.0
    text: str = "one"
    flag: bool = False
    pair: tuple[int, int] = (1, 2)
    many: tuple[float, ...] = (0.5,)
    pairs: tuple[tuple[int, int], ...] = ()
    choice: Literal["a", "b"] = "a"
    positive: Positive[int] = 1
    positives: tuple[Positive[float], ...] = ()
    non_negative: NonNegative[float] = 0.0
    rate: Rate = 0.0
    sides: tuple[Side, Side] = (32, 32)

    def __post_init__(self):
        check_fields(self)


def test_fields_are_changed_with_their_types():
    changes = ["whole=2", "real=3", "text=two", "flag=True", "pair=(3, 4)", "many=[1, 2.5]"]
    assert change_fields(Fields(), changes) == Fields(2, 3.0, "two", True, (3, 4), (1.0, 2.5))
    assert type(change_fields(Fields(), ["real=3"]).real) is float
    assert change_fields(Fields(), ["text=1e-3", "real=1e-3"]) == Fields(real=1e-3, text="1e-3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("whole=2.5", "whole=2.5 is not of type int"),
        ("whole=True", "whole=True is not of type int"),
        ("real=1e999", "real=inf is not a finite number"),
        ("real=fast", "real='fast' is not of type float"),
        ("flag=1", "flag=1 is not of type bool"),
        ("pair=(1, 2, 3)", "pair=(1, 2, 3) is not of type tuple[int, int]"),
        ("pair=(1, 2.5)", "pair=(1, 2.5) is not of type tuple[int, int]"),
        ("pair=64", "pair=64 is not of type tuple[int, int]; write it as pair=64,64"),
        ("pair=x", "pair='x' is not of type tuple[int, int]"),
        ("many=0.5", "many=0.5 is not of type tuple[float, ...]; write one value as many=0.5,"),
        ("many='5'", "many='5' is not of type tuple[float, ...]; write one value as many=5,"),
        ("pairs=64", "pairs=64 is not of type tuple[tuple[int, int], ...]; write one value as pairs=(64, 64),"),
        (
            "pairs=64,32",
            "pairs=(64, 32) is not of type tuple[tuple[int, int], ...]; write one value as pairs=(64, 32),",
        ),
        ("pairs=1,2,3", "pairs=(1, 2, 3) is not of type tuple[tuple[int, int], ...]"),
        ("choice=c", "choice='c' is unknown; choose a or b"),
        ("positive=0", "positive=0 is not above 0"),
        ("positives=1,-2", "positives=(1.0, -2.0): -2.0 is not above 0"),
        ("non_negative=-1", "non_negative=-1.0 is not at least 0"),
        ("rate=1", "rate=1.0 is not at least 0 and below 1"),
        ("rate=-0.1", "rate=-0.1 is not at least 0 and below 1"),
        ("sides=64,31", "sides=(64, 31): 31 is not at least 32 pixels"),
        ("wole=1", "--cfg-options wole: there is no such key; configs/recipes.py lists them; did you mean whole?"),
        ("whole", "--cfg-options 'whole' is not of the form key=value"),
    ],
)
def test_bad_changes_are_refused(change, message):
    with pytest.raises(UserError) as error:
        change_fields(Fields(), [change])
    assert str(error.value) == message


def test_the_limits_of_fields_are_allowed():
    changes = ["positive=1", "positives=0.1,", "non_negative=0", "rate=0.99", "sides=32,33", "choice=b"]
    changed = change_fields(Fields(), changes)
    assert changed == Fields(positive=1, positives=(0.1,), rate=0.99, sides=(32, 33), choice="b")
    assert Fields(pair=[3, 4], real=2) == Fields(pair=(3, 4), real=2.0)


@pytest.mark.parametrize(("task", "own"), [("segmentation", "folder"), ("detection", "coco")])
def test_the_data_set_for_ones_own_data_is_named(task, own):
    config = next((ROOT / task / "configs").glob("*_alt_gvt_tiny_shapes.py"))
    with pytest.raises(UserError, match=f"dataset='mine' is unknown; choose .* for your own data, choose {own}$"):
        load_experiment(config, ["dataset=mine"])


@pytest.mark.parametrize("option", ["--lr=1", "--warmup-iterations", "--batch_size"])
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_options_that_are_fields_are_set_by_cfg_options(task, option, capsys):
    config = next((ROOT / task / "configs").glob("*_alt_gvt_tiny_shapes.py"))
    field = option[2:].replace("-", "_").removesuffix("=1")
    for parser, files in ((get_train_parser(""), [config]), (get_test_parser(""), [config, "weights.pth"])):
        with pytest.raises(SystemExit):
            parser.parse_args([*map(str, files), option, "1"])
        assert f"error: unknown argument {option}; use --cfg-options {field}=...\n" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            parser.parse_args([str(ROOT / "main.py"), *map(str, files[1:]), option, "1"])
        assert f"error: unknown argument {option}" in capsys.readouterr().err


def test_files_without_an_experiment_are_refused(tmp_path):
    configs = ROOT / "segmentation/configs"
    with pytest.raises(ValueError, match=r"there is no such config; did you mean fpn_pcpvt_s_512x512_80k_ade20k\.py"):
        load_experiment(configs / "fpn_pcpvt_s_512x512_80k_ade20.py")
    with pytest.raises(ValueError, match=r"recipes\.py: defines no experiment"):
        load_experiment(configs / "recipes.py")
    recipe = "from segmentation.configs.recipes import fpn_pvt_setting\nconfig = fpn_pvt_setting('pcpvt_tiny', {})\n"
    faults = {
        "chanels=3": r"there is no such key: chanels; configs/recipes\.py lists them",
        "channels=": "SyntaxError: .*invalid syntax",
        "lr=int('x')": "ValueError: invalid literal for int",
        "pretrained=open('/nonexistent')": "FileNotFoundError: .*No such file or directory",
        "lr=float('inf')": "lr=inf is not a finite number",
        "crop_size=(128, 96)": r"crop_size=\(128, 96\) is not of type int",
        "scale=64": r"scale=64 is not of type tuple\[int, int\]; write it as scale=64,64",
        "head=None": "head=None is unknown; choose upernet or fpn",
        "pretrained=3": "pretrained=3 is not of type str",
    }
    for fault, message in faults.items():
        (tmp_path / "mine.py").write_text(recipe.format(fault))
        with pytest.raises(ValueError, match=rf"mine\.py: .*{message}"):
            load_experiment(tmp_path / "mine.py")


def test_files_that_are_no_experiment_of_the_task_are_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from segmentation.configs import recipes\nconfig = recipes.nothing()\n")
    with pytest.raises(UserError, match=r"mine\.py: AttributeError: module .* has no attribute 'nothing'"):
        load_experiment(path)
    path.write_text("from segmentation.configs.recipes import Experiment\nconfig = Experiment\n")
    with pytest.raises(UserError, match=r"mine\.py: defines no experiment"):
        load_experiment(path)
    config = ROOT / "detection/configs/retinanet_alt_gvt_tiny_shapes.py"
    with pytest.raises(
        UserError, match=r"tiny_shapes\.py: is an experiment of another task; choose one of segmentatio"
    ):
        load_experiment(config, kind=Experiment)
    with pytest.raises(UserError, match="there is no such config"):
        load_experiment("x" * 5000)


def test_internal_errors_of_experiments_keep_their_traceback(monkeypatch):
    def fail(*_):
        raise TypeError("internal")

    monkeypatch.setattr("dense.experiments._as_type", fail)
    with pytest.raises(TypeError, match="internal"):
        load_experiment(ROOT / "segmentation/configs/upernet_alt_gvt_tiny_shapes.py")


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("is_test", [False, True])
def test_experiments_are_run_in_their_precision_on_a_gpu(is_test, monkeypatch):
    parser, files = (get_test_parser(""), ["weights"]) if is_test else (get_train_parser(""), [])

    def choose(config: str, *options: str) -> str:
        args = parser.parse_args([str(ROOT / config), *files, *options])
        build_experiment(args, object)
        return args.amp

    half = "detection/configs/mask_rcnn_pcpvt_s_fpn_3x_coco_swin_setting.py"
    full = "segmentation/configs/fpn_pcpvt_s_512x512_80k_ade20k.py"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (
        choose(half) == choose(half, "--device", "cuda:1") == choose(full, "--cfg-options", "precision=fp16") == "fp16"
    )
    assert choose(full) == choose(half, "--cfg-options", "precision=fp32") == "fp32"
    assert choose(half, "--device", "cpu") == "off"
    assert [choose(half, "--amp", name) for name in ("off", "bf16", "auto")] == ["off", "bf16", "auto"]
    assert choose(half, "--amp") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(half) == "off"
    gpu = torch.device("cuda", 0)
    assert [choose_amp(name, gpu) for name in ("fp32", "fp16", "bf16")] == [None, torch.float16, torch.bfloat16]


def step_scaled(scaler: torch.amp.GradScaler, model: torch.nn.Module, value: float) -> float:
    """Take a step with an input; return the scale of the next step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.zero_grad()
    scaler.scale(model(torch.full((1, 1), value)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale()


def test_a_published_loss_scale_is_an_upper_limit():
    cpu, model = torch.device("cpu"), torch.nn.Linear(1, 1)
    scaler = build_scaler(cpu, 512.0, enabled=True)
    scaler.set_growth_interval(2)
    assert [step_scaled(scaler, model, 1.0) for _ in range(3)] == [512, 512, 512]
    before = model.weight.clone()
    assert step_scaled(scaler, model, math.inf) == 256
    assert torch.equal(model.weight, before)
    assert [step_scaled(scaler, model, 1.0) for _ in range(4)] == [256, 512, 512, 512]
    assert step_scaled(scaler, model, math.inf) == 256
    for saved in (scaler.state_dict(), build_scaler(cpu, 0.0, enabled=True).state_dict()):  # 256, and 65536
        resumed = build_scaler(cpu, 512.0, enabled=True)
        resumed.load_state_dict(saved)
        assert resumed.get_scale() == min(saved["scale"], 512)
        resumed.set_growth_interval(2)
        assert [step_scaled(resumed, model, 1.0) for _ in range(4)][1:] == [512, 512, 512]
    adaptive = build_scaler(cpu, 0.0, enabled=True)
    adaptive.set_growth_interval(1)
    assert step_scaled(adaptive, model, 1.0) == 2 * 65536
    assert not build_scaler(cpu, 512.0, enabled=False).is_enabled()


def test_a_published_loss_scale_reaches_the_training(monkeypatch):
    monkeypatch.setattr("dense.training.choose_amp", lambda name, device: torch.float16)
    for config, scale in (
        ("mask_rcnn_pcpvt_s_fpn_3x_coco_swin_setting", 512),
        ("retinanet_pcpvt_s_fpn_3x_ms_coco", 65536),
    ):
        experiment = load_experiment(ROOT / f"detection/configs/{config}.py")
        args = get_train_parser("").parse_args(["x"])
        task = SimpleNamespace(lr_factor=lambda step: 1.0, sampler=None)
        state = build_state(args, experiment, torch.nn.Linear(1, 1), task, torch.device("cpu"))
        assert (state.scaler.is_enabled(), state.scaler.get_scale()) == (True, scale)


# ------------------------------------------------------------------------------------------------------- networks


def test_a_backbone_starts_from_the_weights_of_a_classifier(tmp_path, caplog):
    classifier = timm.create_model("alt_gvt_tiny", num_classes=7)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    with caplog.at_level("INFO", "twins"):
        backbone = build_backbone("alt_gvt_tiny", str(tmp_path / "classifier.pth"))
    state = backbone.state_dict()
    norms = {f"norm_list.{stage}.{name}" for stage in range(4) for name in ("weight", "bias")}
    assert set(classifier.state_dict()) - set(state) == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert set(state) - set(classifier.state_dict()) == norms
    for name, tensor in state.items():
        expected = classifier.state_dict().get(name, torch.full_like(tensor, float(name.endswith("weight"))))
        assert torch.equal(tensor, expected), name
    assert f"loaded {len(state) - 8} tensors; skipped head.weight" in caplog.text.replace(
        "norm.weight, norm.bias, ", ""
    )
    assert "new norm_list.0.weight" in caplog.text


@pytest.mark.parametrize("change", ["rename", "other depth"])
def test_weights_that_do_not_fit_a_backbone_are_refused(tmp_path, change):
    state = timm.create_model("pcpvt_tiny").state_dict()
    if change == "rename":
        state["blocks.0.0.mlp.fc3.weight"] = state.pop("blocks.0.0.mlp.fc1.weight")
    else:
        state = timm.create_model("pcpvt_tiny", depths=(1, 2, 3, 2)).state_dict()
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: these weights do not fit the model"):
        build_backbone("pcpvt_tiny", str(tmp_path / "other.pth"))


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="backbone 'pcpvt_smal' is unknown; did you mean pcpvt_small"):
        build_backbone("pcpvt_smal", "")


# --------------------------------------------------------------------------------------------------- optimisation


@pytest.mark.parametrize("name", ["pcpvt_small", "alt_gvt_small"])
def test_norms_and_positional_encodings_are_not_decayed(name):
    with on_meta():
        backbone = build_backbone(name, "")
    groups = parameter_groups(backbone, 0.01, ("norm", "pos_block"))
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    expected = {
        id(p) for module in backbone.modules() if isinstance(module, torch.nn.LayerNorm) for p in module.parameters()
    }
    expected |= {id(parameter) for parameter in backbone.pos_block.parameters()}
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert {names[id(p)] for p in groups[1]["params"]} == {names[parameter] for parameter in expected}
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(names)


def rates(iterations, lr, factor) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = IterationSchedule(optimizer, factor)
    found = []
    for iteration in iterations:
        scheduler.step_update(iteration)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_learning_rates_depend_on_the_iteration_alone():
    """In any order of iterations they are the same, so a resumed run needs the iteration alone."""

    def factor(iteration: int) -> float:
        return linear_warmup(iteration, 10, 0.1) * (1 - iteration / 100) ** 0.9

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch expects steps of the optimizer between those of its schedulers
        forwards = rates(range(100), 1e-3, factor)
        backwards = rates(reversed(range(100)), 1e-3, factor)
    assert backwards == forwards[::-1]
    assert max(forwards) == forwards[10]
    assert forwards[0] == pytest.approx(1e-4)


def test_a_schedule_overrides_rates_and_keeps_its_peak():
    """A checkpoint restores the rates of an old step, and perhaps of other options."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = IterationSchedule(optimizer, lambda iteration: 1 / (iteration + 1))
    scheduler.step_update(3)
    optimizer.param_groups[0]["lr"] = 7.0
    scheduler.step(0)
    scheduler.step_update(1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert scheduler.state_dict() == {}
