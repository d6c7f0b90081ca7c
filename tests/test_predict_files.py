"""Prediction of many files: data-loading processes, tables of all tasks, memory."""

import csv
import json
import os
import pickle

import pytest
import torch
from PIL import Image

import predict
from core import shapes
from predict import load_predictor
from tests.helpers import ROOT, fails, run_bash_in
from tests.test_predict import one_thread, run  # noqa: F401  a fixture


@pytest.mark.slow
def test_tables_of_dense_tasks(segmentor, detector, tmp_path, capsys):
    """The columns are those of the task, also without objects; an image too narrow for a segmentor is named."""
    image = tmp_path / "image.png"
    shapes.draw_scene(3, 96).image.save(image)
    Image.new("RGB", (300, 3)).save(tmp_path / "narrow.png")
    run(detector, image, "--csv", tmp_path / "out.csv", "--json", tmp_path / "out.json", "--score-thr", 1)
    assert (tmp_path / "out.csv").read_text() == "path,name,index,score,x1,y1,x2,y2\n"
    assert json.loads((tmp_path / "out.json").read_text()) == [{"path": str(image), "objects": []}]
    run(detector, image, "--csv", tmp_path / "out.csv", "--json", tmp_path / "out.json", "--score-thr", 0)
    ((entry,), rows) = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.csv").read_text().splitlines()
    assert len(rows) == 1 + len(entry["objects"]) > 1
    assert [float(x) for x in rows[1].split(",")[-4:]] == entry["objects"][0]["box"]
    assert "mask" in entry["objects"][0]
    with pytest.raises(SystemExit):
        run(segmentor, image, tmp_path / "narrow.png", "--csv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().startswith(f"path,name,index,share\n{image},")
    assert f"skipped: {tmp_path / 'narrow.png'}: has 256x3 pixels when resized" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "segmentor", "detector"])
def test_data_loading_processes_get_no_network(kind, request, tmp_path):
    """The input of an image can be prepared in any process; the pickled function is small."""
    network = load_predictor(request.getfixturevalue(kind), device="cpu")
    content = pickle.dumps(network.prepare)
    assert len(content) < 5000
    image = shapes.draw_scene(3, 96).image
    inputs = [prepare(image) for prepare in (pickle.loads(content), network.prepare)]
    first, second = (value[0] if isinstance(value, tuple) else value for value in inputs)
    assert torch.equal(first, second)


@pytest.mark.slow
def test_a_folder_of_many_images(classifier, tmp_path):
    """Through the command line with workers: as many predictions as images."""
    for i in range(30):
        shapes.draw_scene(i, 40 + i).image.save(tmp_path / f"{i}.png")
    command = (
        f"$PYTHON predict.py {classifier} {tmp_path} --csv {tmp_path}/out.csv --topk 1 | head -2; exit $PIPESTATUS"
    )
    result = run_bash_in(ROOT, "-c", command)
    assert result.returncode in (0, 120), result.stderr  # 120: Python itself could not flush its output
    assert "Traceback" not in result.stderr
    run(classifier, tmp_path, "--csv", tmp_path / "one.csv", "--topk", 1)
    tables = [list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("out.csv", "one.csv")]
    assert [row["path"] for row in tables[0]] == sorted(str(path) for path in tmp_path.glob("*.png"))
    for row, expected in zip(*tables, strict=True):
        assert (row["path"], row["index"]) == (expected["path"], expected["index"])
        assert float(row["probability"]) == pytest.approx(float(expected["probability"]), abs=1e-6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(classifier, tmp_path):
    """Peak of a process with 40 images and with 800: entries are written as they come."""
    code = "import resource, sys, predict; predict.main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for count in (40, 800):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            Image.new("RGB", (40 + i % 7, 40)).save(folder / f"{i}.png")
        options = f"--json {tmp_path}/out.json --topk 3 --num_workers 1 --device cpu"
        result = run_bash_in(ROOT, "-c", f"$PYTHON -c '{code}' {classifier} {folder} {options}")
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 25  # MiB


@pytest.mark.slow
def test_reports_of_any_file_name(classifier, tmp_path, capsys):
    """Also of one that is not UTF-8; a report that cannot be opened is named in one line."""
    image = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    Image.new("RGB", (40, 40)).save(image)
    command = f"$PYTHON predict.py {classifier} {tmp_path}/*.png --csv {tmp_path}/out.csv --json {tmp_path}/out.json"
    result = run_bash_in(ROOT, "-c", f"{command} --topk 1 --device cpu >{tmp_path}/log 2>&1")
    assert result.returncode == 0
    assert os.fsencode(image) in (tmp_path / "out.csv").read_bytes()
    assert json.loads((tmp_path / "out.json").read_text())[0]["path"] == image
    os.rename(image, tmp_path / "0.png")
    error = fails(capsys, predict, classifier, tmp_path / "0.png", "--json", "/proc/x.json")
    assert "/proc/x.json: cannot be written" in error
