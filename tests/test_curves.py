"""Tests of what runs log step by step, of `analyze.py curves`, and of the comparison with the published runs."""

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

import pytest

import analyze
import main
from analysis import curves
from analysis.published import estimate_noise, find_published, judge
from analysis.runs import RunLog, read_run
from core.options import ArgumentParser
from core.recipes import PUBLISHED
from dense.experiments import load_experiment
from tests.helpers import BACKBONES, ROOT, fails, read_log
from tests.test_dense_options import TASKS
from tests.test_options import BASE, options_of
from utils import UserError

pytestmark = pytest.mark.usefixtures("small_sets")

OPTIONS = {
    "runs": "test_the_table_of_two_runs",
    "out": "test_the_picture_of_two_runs",
    "text": "test_the_table_of_two_runs",
    "traceback": "test_bad_runs_end_with_one_line",
}


def write_run(folder: Path, history=(), steps=(), **options) -> Path:
    """Write the files of a run."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": options}))
    for name, lines in (("log.txt", history), ("metrics.jsonl", steps)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- what runs log


def test_metrics_are_those_of_the_log_lines(tmp_path, capsys):
    main.main([*BASE, "--epochs", "2", "--batch-size", "2", "--print-freq", "3", "--output_dir", str(tmp_path)])
    lines = read_metrics(tmp_path)
    places = [(line["epoch"], line["step"], line["steps"], line["global_step"]) for line in lines]
    assert places == [(0, 1, 4, 1), (0, 4, 4, 4), (1, 1, 4, 5), (1, 4, 4, 8)]
    shown = re.findall(r"epoch (\d) \[(\d)/4\]  loss (\S+)  lr (\S+) ", capsys.readouterr().out)
    assert shown == [(str(v["epoch"]), str(v["step"]), f"{v['loss']:.4f}", f"{v['lr']:.4g}") for v in lines]
    assert [lines[1]["loss"], lines[3]["loss"]] == [line["train_loss"] for line in read_log(tmp_path)]
    assert set(lines[0]) == {"epoch", "step", "steps", "global_step", "taken", "loss", "lr"}


def test_metrics_hold_all_losses_of_a_dense_task(tmp_path):
    script, config, setting = TASKS["segmentation"]
    script.main([str(ROOT / config), "--device", "cpu", "--work-dir", str(tmp_path), "--cfg-options", *setting.split()])
    line, log = read_metrics(tmp_path)[-1], read_log(tmp_path)[0]
    assert [line[name] for name in ("loss", "decode", "aux")] == [
        log[f"train_{name}"] for name in ("loss", "decode", "aux")
    ]


def start_training(task: str, folder: Path) -> None:
    options = ["--output_dir", str(folder), "--print-freq", "1", "--save-every", "1", "--keep", "9", "--auto-resume"]
    options += ["--tensorboard", "--device", "cpu", "--num_workers", "0"]
    if task == "classification":
        main.main([*BASE, *options, "--epochs", "2"])
    else:
        script, config, setting = TASKS[task]
        longer = ["iterations=4"] if task == "segmentation" else ["epochs=2"]
        script.main([str(ROOT / config), *options, "--cfg-options", *setting.split(), *longer])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_tensorboard_shows_the_lines_of_the_logs(task, tmp_path):
    """Repeat the last step of the first epoch and all of the second; each place must be there once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    start_training(task, tmp_path)
    for name in ("checkpoint.pth", *(f"checkpoint.{age}.pth" for age in range(1, 5))):
        (tmp_path / name).unlink()  # the one left is that of the first step
    start_training(task, tmp_path)
    lines = {"steps": read_metrics(tmp_path), "epochs": read_log(tmp_path)}
    assert [line["global_step"] for line in lines["steps"]] == [1, 2, 3, 4]
    for unit, place in (("steps", "global_step"), ("epochs", "epoch")):
        assert len(list((tmp_path / "tensorboard" / unit).iterdir())) == 2  # both sessions
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / unit)).Reload()
        names = set(lines[unit][0]) - {"epoch", "step", "steps", "global_step", "taken", "n_parameters"}
        assert set(events.Tags()["scalars"]) == names
        for name in names:
            found = [(event.step, event.value) for event in events.Scalars(name)]
            assert found == [(line[place], pytest.approx(line[name], rel=1e-6)) for line in lines[unit]]


def test_optional_packages_are_named(tmp_path, capsys, monkeypatch):
    for name in ("tensorboard", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    message = fails(capsys, main, *BASE, "--output_dir", tmp_path / "run", "--tensorboard")
    assert "--tensorboard needs the package tensorboard, which is not installed; install it: pip install" in message
    assert not (tmp_path / "run").exists()
    assert "--tensorboard needs --output_dir" in fails(capsys, main, *BASE, "--tensorboard")
    run = write_run(tmp_path / "a", [{"epoch": 0, "train_loss": 1.0}])
    message = fails(capsys, analyze, "curves", run)
    assert "the picture (--text prints the table only) needs the package matplotlib" in message
    analyze.main(["curves", str(run), "--text"])


# ------------------------------------------------------------------------------------------------- reading, printing


def test_every_option_has_a_test():
    parser = ArgumentParser()
    curves.add_options(parser)
    assert options_of(parser) == set(OPTIONS)
    assert set(OPTIONS.values()) <= set(globals())


def test_losses_of_steps_are_means_since_the_line_before():
    """The log has means since the start of the epoch: of step 1, of 1 to 3, and of 1 to 4."""
    means = [(0, 1, 8.0), (0, 3, 4.0), (0, 4, 4.5), (1, 1, 1.0), (1, 3, None)]
    steps = [{"epoch": epoch, "step": step, "steps": 4, "loss": loss, "lr": step} for epoch, step, loss in means]
    places, values = RunLog("", {}, [], steps).step_series("loss")
    assert values == [8.0, 2.0, 6.0, 1.0]
    assert places == [0.125, 0.5, 0.875, 1.125]
    assert RunLog("", {}, [], steps).step_series("lr") == ([0.25, 0.75, 1.0, 1.25, 1.75], [1, 3, 4, 1, 3])


def test_the_table_of_two_runs(tmp_path, capsys):
    history = [{"epoch": i, "train_loss": 2.0 - i, "test_acc1": acc} for i, acc in enumerate((10.0, 80.5, 45.0))]
    first = write_run(tmp_path / "a" / "run", history, model="alt_gvt_tiny", epochs=5)
    history = [{"epoch": 0, "train_loss": None, "test_mIoU": 0.425}, {"epoch": 1, "test_mIoU": -1}]
    second = write_run(tmp_path / "b" / "run", history, head="fpn", iterations=40, eval_interval=20)
    analyze.main(["curves", str(first), str(second / "log.txt"), "--text"])
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["run", "epochs", "loss", "best accuracy", "by epoch"],
        [str(first), "3 of 5", "0.0000", "test_acc1 80.50 in epoch 1", "▁█▄"],
        [str(second / "log.txt"), "2 of 2", "-", "test_mIoU 42.50 in epoch 0", "▁"],
    ]
    assert not list(tmp_path.rglob("curves.*"))


def test_skipped_steps_have_no_part_in_the_losses():
    """Losses 8 and 2, with a step between them that was skipped; means are over the steps taken."""
    steps = [
        {"epoch": 0, "steps": 3, "step": step, "taken": taken, "loss": loss}
        for step, taken, loss in ((1, 1, 8.0), (2, 1, 8.0), (3, 2, 5.0))
    ]
    assert RunLog("", {}, [], steps).step_series("loss")[1] == [8.0, 2.0]


def test_long_series_are_averaged():
    assert curves.average_parts(list(range(10)), 4) == [1, 4, 7, 9]
    assert curves.average_parts([1.0, 5.0], 4) == [1.0, 5.0]
    assert len(curves.draw_blocks(range(300))) == 38


def test_a_run_in_its_first_epoch(tmp_path, capsys):
    steps = [{"epoch": 0, "step": 1, "steps": 9, "loss": 2.5, "lr": 0.1}]
    analyze.main(["curves", str(write_run(tmp_path / "a", [], steps)), "--text"])
    assert capsys.readouterr().out.splitlines()[1].split() == [str(tmp_path / "a"), "0", "2.5000", "-"]


def test_only_a_damaged_last_line_is_skipped(tmp_path):
    run = write_run(tmp_path / "a", [{"epoch": 0, "train_loss": 1.0}])
    log = run / "log.txt"
    log.write_text(log.read_text() + '{"epoch": 1, "tra')
    assert [line["epoch"] for line in read_run(run).history] == [0]
    for line in ('{"epoch": 1, "tra', "[]", '{"train_loss": 1.0}', ""):
        log.write_text(f'{line}\n{{"epoch": 2}}\n')
        with pytest.raises(UserError, match=r"log.txt: line 1 is not a line of a log: .*; repair or remove it"):
            read_run(run)


def test_bad_runs_end_with_one_line(tmp_path, capsys):
    missing = fails(capsys, analyze, "curves", tmp_path / "none")
    assert "none: there is no line of log.txt or metrics.jsonl; name the output folder of a training run" in missing
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe")
    assert "log.txt: cannot be read as a log (" in fails(capsys, analyze, "curves", tmp_path, "--text")
    run = write_run(tmp_path / "a", [{"epoch": 0}])
    (run / "args.json").write_text("[]")
    assert "args.json: are not the options of a run" in fails(capsys, analyze, "curves", run, "--text")
    assert "required: COMMAND" in fails(capsys, analyze)
    with pytest.raises(UserError, match="none: there is no line"):
        analyze.main(["curves", str(tmp_path / "none"), "--text", "--traceback"])


# --------------------------------------------------------------------------------------------------------- pictures


def classifier(name: str, **changes) -> dict:
    return {"model": name, "epochs": 300, "global_batch": PUBLISHED[name]["global_batch"]} | changes


def segmentor(name: str, **changes) -> dict:
    setting = {"global_batch": 32 if name == "pcpvt_small" else 16, "iterations": 160_000, "eval_interval": 16_000}
    return {"head": "upernet", "backbone": name} | setting | changes


@pytest.mark.slow
def test_the_picture_of_two_runs(tmp_path):
    """A run of a published model with its log lines, and one that has none; the published run is drawn once."""
    pytest.importorskip("matplotlib")
    published = find_published(RunLog("", classifier("alt_gvt_small"), [], []))
    steps = [{"epoch": i // 2, "step": i % 2 + 1, "steps": 2, "loss": 7.0, "lr": 0.5} for i in range(8)]
    first = write_run(tmp_path / "a", published.history[:4], steps, **classifier("alt_gvt_small"))
    second = write_run(tmp_path / "b", published.history[:6], **classifier("alt_gvt_small"))
    analyze.main(["curves", str(first), str(second)])
    analyze.main(["curves", str(first), str(second), "--out", str(tmp_path / "pictures")])
    for folder in (first, tmp_path / "pictures"):
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / "curves.svg").read_text()
    assert not (second / "curves.png").exists()
    loss, lr, accuracy = curves.draw([read_run(first), read_run(second)], [published, published]).axes
    assert [line.get_label() for line in accuracy.lines] == [
        "published alt_gvt_small (test_acc1)",
        f"{first} (test_acc1)",
        f"{second} (test_acc1)",
    ]
    assert [len(line.get_xdata()) for line in loss.lines] == [300, 8, 6]
    rates = [list(line.get_ydata()) for line in lr.lines]
    assert rates[1:] == [[0.5] * 8, list(read_run(second).series("train_lr").values())]
    assert list(accuracy.lines[2].get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert accuracy.get_xlabel() == "completed epochs"


@pytest.mark.slow
def test_runs_in_iterations_share_their_axis(tmp_path):
    pytest.importorskip("matplotlib")
    published = find_published(RunLog("", segmentor("alt_gvt_small"), [], []))
    run = read_run(write_run(tmp_path / "a", published.history[:2], **segmentor("alt_gvt_small")))
    loss, _, accuracy = curves.draw([run], [published]).axes
    assert accuracy.get_xlabel() == "iterations in thousands"
    assert [list(line.get_xdata()) for line in accuracy.lines] == [[16 * i for i in range(1, 11)], [16, 32]]
    assert list(loss.lines[0].get_xdata()) == [2 * i + 1 for i in range(80)]
    assert list(accuracy.lines[1].get_ydata()) == pytest.approx([39.71, 42.05])
    run.options["eval_interval"] = 4000  # the published run keeps its own axis
    accuracy = curves.draw([run], [published]).axes[2]
    assert [list(line.get_xdata()) for line in accuracy.lines] == [[16 * i for i in range(1, 11)], [4, 8]]


# --------------------------------------------------------------------------------------------------- published runs

PUBLISHED_RUNS = [classifier(name) for name in PUBLISHED] + [segmentor(name) for name in PUBLISHED]
of_all_runs = pytest.mark.parametrize("options", PUBLISHED_RUNS, ids=lambda run: run.get("model") or run["backbone"])


def make_run(options: dict, figures: dict[str, list[float]]) -> tuple[RunLog, RunLog]:
    """Return a run with these figures, accuracies in percent, and the published run of its model."""
    factor = 100 if "head" in options else 1
    columns = {name: [v / factor if name.startswith("test") else v for v in column] for name, column in figures.items()}
    rows = zip(*columns.values(), strict=True)
    history = [dict(zip(columns, row, strict=True)) | {"epoch": epoch} for epoch, row in enumerate(rows)]
    run = RunLog("run", options, history, [])
    return run, find_published(run)


def published_figures(options: dict) -> dict[str, dict[int, float]]:
    log = find_published(RunLog("", options, [], []))
    return {name: log.series(name) for name in (log.figure, "train_loss")}


def at(curve: dict[int, float], place: float) -> float:
    """Return the value of a curve at a fraction of an epoch; before its first epoch, the first value."""
    place = max(place, min(curve))
    left = int(place)
    return curve[left] + (place - left) * (curve.get(left + 1, curve[left]) - curve[left])


@of_all_runs
def test_runs_within_the_noise_are_on_track(options):
    figures = published_figures(options)
    length = 10 if "head" in options else 300
    for seed in range(5):
        draw = random.Random(seed)
        noise = {name: estimate_noise(curve) for name, curve in figures.items()}
        noisy = {
            name: [at(curve, e) + 1.5 * draw.gauss(0, at(noise[name], e)) for e in range(length)]
            for name, curve in figures.items()
        }
        assert judge(*make_run(options, noisy)).startswith(f"run: on track up to epoch {length - 1}, compared with the")


@of_all_runs
def test_runs_at_half_the_pace_are_not_on_track(options):
    """The first epoch after the warm-up is behind; two later, it is known."""
    figures = published_figures(options)
    if "head" in options:  # after each interval the figures of half of the iterations
        start, places = 2, [(epoch + 1) / 2 - 1 for epoch in range(10)]
    else:
        start = {"pcpvt_large": 6, "alt_gvt_large": 20}.get(options["model"], 5)
        places = [epoch / 2 for epoch in range(300)]
    slow = {name: [at(curve, place) for place in places] for name, curve in figures.items()}
    expected = f"run: not on track from epoch {start} on, as known after epoch {start + 2}: "
    assert judge(*make_run(options, slow)).startswith(expected)
    soon = {name: column[: start + 3] for name, column in slow.items()}
    assert judge(*make_run(options, soon)).startswith(expected)
    sooner = {name: column[: start + 2] for name, column in slow.items()}
    assert "not on track" not in judge(*make_run(options, sooner))


def test_a_run_without_figures_is_not_judged():
    options = classifier("alt_gvt_small")
    verdict = judge(*make_run(options, {"test_acc1": [float("nan")] * 20, "train_loss": [None] * 20}))
    assert "too early to compare" in verdict


def test_the_shortfall_is_named_until_the_run_recovers():
    options = classifier("alt_gvt_small")
    figures = published_figures(options)
    accuracies = [value - 2 * (100 <= epoch < 110) for epoch, value in figures["test_acc1"].items()]

    def judge_until(epochs: int, figure="test_acc1", values=accuracies) -> str:
        return judge(*make_run(options, {figure: values[:epochs]}))

    assert judge_until(102) == "run: on track up to epoch 101, compared with the published alt_gvt_small"
    assert judge_until(103) == (
        "run: not on track from epoch 100 on, as known after epoch 102: test_acc1 is below the published alt_gvt_small "
        "by 2.00 in epoch 100 (72.49, not 74.49) and by 2.00 in epoch 102 (72.68, not 74.68)"
    )
    assert "not on track" in judge_until(112)
    assert "on track up to epoch 112" in judge_until(113)
    assert "too early" in judge_until(7)
    assert "on track up to" in judge_until(8)
    losses = [value + 0.5 for value in figures["train_loss"].values()]
    assert "train_loss is above the published alt_gvt_small by 0.50" in judge_until(20, "train_loss", losses)
    better = [value + 5 for value in figures["test_acc1"].values()]
    assert "on track up to" in judge_until(300, values=better)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (classifier("alt_gvt_small", epochs=100), "epochs 100 (published: 300)"),
        (classifier("alt_gvt_small", global_batch=1024), "global-batch 1024 (published: 2048)"),
        (classifier("alt_gvt_small", data_set="INAT", mixup=0.0), "mixup 0.0 (published: 0.8)"),
        (segmentor("alt_gvt_large", drop_path=0.2), "drop-path 0.2 (published: 0.3)"),
        (segmentor("alt_gvt_small", scale=[512, 512]), "scale [512, 512] (published: [2048, 512])"),
    ],
)
def test_other_recipes_are_not_judged(options, reason):
    verdict = judge(*make_run(options, {"train_loss": [9.0] * 20}))
    assert "run: not judged, because it differs from the published" in verdict
    assert verdict.endswith(reason)


def test_the_published_run_is_found():
    """A log alone is recognised by its number of parameters; unknown options are not compared."""
    log = [{"epoch": epoch, "n_parameters": 56070952, "test_acc1": 1.0} for epoch in range(9)]
    run = RunLog("run", {}, log, [])
    assert find_published(run).name == "published alt_gvt_base"
    assert "not on track from epoch 5" in judge(run, find_published(run))
    run = RunLog("run", classifier("alt_gvt_base", global_batch=None), log, [])
    assert "not on track from epoch 5" in judge(run, find_published(run))
    for options in ({"model": "resnet50"}, {"head": "fpn", "backbone": "alt_gvt_small"}, {"detector": "retinanet"}):
        assert find_published(RunLog("run", options, log, [])) is None
    assert find_published(RunLog("run", segmentor("alt_gvt_tiny"), log, [])) is None
    assert find_published(RunLog("run", {}, [], [])) is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_have_their_recipe(name):
    """The options of the published commands, as args.json has them."""
    backbone = next(short for short, full in BACKBONES.items() if full == name)
    config = ROOT / f"segmentation/configs/upernet_{backbone}_512x512_160k_ade20k_swin_setting.py"
    experiment = dataclasses.asdict(load_experiment(config).resolve())
    for options in (vars(main.parse_args(["--recipe", "published", "--model", name])), experiment):
        run, published = make_run(json.loads(json.dumps(options)), {"train_loss": [1.0]})
        assert published.options.items() <= run.options.items()
        assert "too early to compare" in judge(run, published)
