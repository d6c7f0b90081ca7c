"""Shared by the tests: small data sets on disk, functions that run scripts, and comparisons of runs."""

import importlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from core import shapes
from main import main
from tests import forks
from tests.small_data import write_ade20k, write_coco

ROOT = Path(__file__).parents[1]
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the test processes share the CPU cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
TINY = ["--model", "alt_gvt_tiny", "--input-size", "32", "--batch-size", "4", "--num_workers", "0", "--device", "cpu"]
# Backbones by their names in the experiments of the dense tasks.
BACKBONES = {
    "pcpvt_s": "pcpvt_small",
    "pcpvt_b": "pcpvt_base",
    "pcpvt_l": "pcpvt_large",
    "alt_gvt_s": "alt_gvt_small",
    "alt_gvt_b": "alt_gvt_base",
    "alt_gvt_l": "alt_gvt_large",
}
# What a training of a dense task leaves in its folder.
DENSE_RUN_FILES = {"args.json", "log.txt", "metrics.jsonl", "checkpoint.pth", "checkpoint.1.pth", "checkpoint_best.pth"}
DENSE_RUN_FILES |= {".lock"}
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run"],
    "launch": ["-m", "torch.distributed.launch", "--use_env"],
    "launch without --use_env": ["-m", "torch.distributed.launch"],
}


@pytest.fixture(autouse=True)
def _client(request, record_property):
    """Skip a test of other software that is not installed, and record its row of the table."""
    marker = request.node.get_closest_marker("client")
    if marker is not None:
        package, module = marker.args
        pytest.importorskip(module)
        version = importlib.metadata.version(package).split("+")[0]
        record_property("client", [package, version, request.function.__doc__.strip()])


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Folder of JPEG files like ImageNet: three classes of 8 training and 7 validation images, of several sizes."""
    root = tmp_path_factory.mktemp("imagenet")
    for side, (split, count) in enumerate({"train": 8, "val": 7}.items()):
        for label, name in enumerate(("n01440764", "n01443537", "n01484850")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = shapes.draw_scene((side, label, i), 72 + 5 * i, labels=[label]).image
                image.resize((90, 72 + 5 * i)).save(folder / f"{i}.JPEG")
    return root


@pytest.fixture(scope="session")
def ade20k_folder(tmp_path_factory) -> Path:
    """Small data set in the layout of ADEChallengeData2016."""
    root = tmp_path_factory.mktemp("ADEChallengeData2016")
    write_ade20k(root)
    return root


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory) -> Path:
    """Small data set in the layout of COCO 2017."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root)
    return root


def train_dense(task: str, config: str, options: list[str], folder: Path, data: Path) -> Path:
    """Train a small network of segmentation or detection for a few steps and return its checkpoint."""
    script = importlib.import_module(f"{task}.train")
    command = [str(ROOT / task / config), "--device", "cpu", "--num_workers", "0", "--data-root", str(data)]
    script.main([*command, "--work-dir", str(folder), "--cfg-options", *options])
    return folder / "checkpoint.pth"


@pytest.fixture(scope="session")
def classifier(image_folder, tmp_path_factory) -> Path:
    """Checkpoint of a classifier of `image_folder`."""
    folder = tmp_path_factory.mktemp("classifier")
    main([*TINY, "--epochs", "1", "--data-path", str(image_folder), "--output_dir", str(folder)])
    return folder / "checkpoint.pth"


@pytest.fixture(scope="session")
def segmentor(ade20k_folder, tmp_path_factory) -> Path:
    """Checkpoint of a segmentation network of `ade20k_folder`."""
    from tests.test_segmentation_runs import SMALL, UPERNET

    options = [*SMALL, "iterations=1", "eval_interval=1"]
    return train_dense("segmentation", UPERNET, options, tmp_path_factory.mktemp("segmentor"), ade20k_folder)


@pytest.fixture(scope="session")
def detector(coco_folder, tmp_path_factory) -> Path:
    """Checkpoint of a Mask R-CNN of `coco_folder`."""
    from tests.test_detection_runs import MASK, SMALL

    options = [*SMALL, "epochs=1", "score_threshold=0.0"]
    return train_dense("detection", MASK, options, tmp_path_factory.mktemp("detector"), coco_folder)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: sums depend on the number of threads, and the tests compare runs bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def on_meta() -> Iterator[None]:
    """Build networks on the meta device, without drawing their weights, which would take most of the time."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.twins.trunc_normal_", lambda weight, std: weight)
        yield


@pytest.fixture
def run_in_process(capsys):
    """Function that runs main.py in this process, on one thread, and returns the output and the error (or None)."""

    def run(*args) -> tuple[str, str | None]:
        try:
            main([str(arg) for arg in args])
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return out, err if code else None

    with one_thread():
        yield run


@pytest.fixture(scope="module")
def small_sets():
    """Use few shapes, and one thread."""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.SHAPES_TRAIN", 8)
        patch.setattr("datasets.SHAPES_VAL", 4)
        for module in ("segmentation.data", "detection.data"):
            patch.setattr(f"{module}.SHAPES_TRAIN", 8)
            patch.setattr(f"{module}.SHAPES_VAL", 2)
        yield


@pytest.fixture
def compiled(monkeypatch) -> list[nn.Module]:
    """List of the modules that are compiled."""
    modules = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: modules.append(self))
    return modules


@pytest.fixture
def recomputed(monkeypatch) -> list[nn.Module]:
    """List of the blocks that use gradient checkpointing, in each step."""
    blocks = []

    def checkpoint(block, x, **_):
        blocks.append(block)
        return block(x)

    monkeypatch.setattr("models.layers.checkpoint", checkpoint)
    return blocks


def run_bash_in(folder: Path, *command) -> subprocess.CompletedProcess:
    """Run a bash script in a folder, as in the README, and capture the output."""
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", *map(str, command)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)


def fails(capsys, script, *argv) -> str:
    """Run a script in this process and return its one-line error message."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(arg) for arg in argv])
    assert stop.value.code in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script.__name__.split('.')[-1]}.py: error: ")
    return line


def damage_jpeg(path: Path) -> None:
    """Truncate a JPEG file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def read_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def launch(launcher: str, processes: int, *argv, script="main.py") -> subprocess.CompletedProcess:
    """Run a script with a launcher on several processes, and capture the output."""
    command = [sys.executable, *LAUNCHERS[launcher], *torchrun_options(processes), script, *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


def run_processes(processes: int, command: list) -> subprocess.CompletedProcess:
    """Run a script in a fork, or under torchrun in several, and capture the output."""
    return forks.run(command, torchrun_options(processes) if processes > 1 else None)


def torchrun_options(processes: int) -> list[str]:
    return [f"--nproc_per_node={processes}", f"--master_port={free_port()}"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


class Run:
    """A script in the background, in a fork or under torchrun in several, with its output in a file."""

    def __init__(self, processes: int, options: list, output_dir: Path, launcher_options=(), script="main.py"):
        launcher = [*torchrun_options(processes), *launcher_options] if processes > 1 else None
        self.folder = output_dir
        self.under_torchrun = processes > 1
        self.log = output_dir.with_name(f"{output_dir.name}-{time.monotonic_ns()}.out")
        self.log.touch()
        self.process = forks.start([script, *options, "--output_dir", output_dir], self.log, self.log, launcher)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition, what: str, timeout: float = 120) -> None:
        """Wait until `condition(self)` is true; fail if the run ends before."""
        end = time.monotonic() + timeout
        while not condition(self):
            assert self.process.exitcode is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < end, f"no {what} in {timeout} s:\n{self.output}"
            time.sleep(0.001)

    def processes(self) -> dict[int, int]:
        """Return the process ids of the run by rank; torchrun starts its processes in the order of their ranks."""
        if not self.under_torchrun:
            return {0: self.process.pid}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return dict(enumerate(map(int, children)))

    def kill(self) -> None:
        """Kill all processes of the run at the same time, like a power failure."""
        if self.process.exitcode is not None:
            return
        for pid in {*self.processes().values(), self.process.pid}:
            os.kill(pid, signal.SIGKILL)
        self.process.join()

    def end(self, timeout: float = 240) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s:\n{self.output}"
        return self.process.exitcode


@pytest.fixture
def start(tmp_path):
    """Function that starts runs in one folder. Processes that a failed test leaves running are killed."""
    runs = []

    def start(processes: int, options: list, **kwargs) -> Run:
        runs.append(Run(processes, options, tmp_path / "run", **kwargs))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


CHECKPOINTS = ("checkpoint.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth")


def assert_same_run(folder: Path, other: Path, checkpoints=CHECKPOINTS) -> None:
    """Compare the checkpoints, log.txt and metrics.jsonl of two runs bit for bit."""
    for name in checkpoints:
        states = [torch.load(path / name, weights_only=True) for path in (folder, other)]
        assert_equal(*({key: state[key] for key in set(state) - {"args", "versions"}} for state in states), name)
    for name in ("log.txt", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def assert_equal(a, b, where=""):
    """Compare nested states bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
