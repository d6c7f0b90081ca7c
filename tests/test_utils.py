"""Tests of random states, launchers, devices and versions."""

import random

import numpy as np
import pytest
import torch

import utils
from core import distributed


def draw():
    return random.random(), np.random.standard_normal(), torch.rand(1).item()


def test_random_state_is_restored_from_a_checkpoint(tmp_path):
    utils.seed_everything(3)
    np.random.standard_normal()  # NumPy caches a second value
    torch.save(utils.get_random_state(), tmp_path / "state.pth")
    expected = draw()
    utils.seed_everything(4)
    assert draw() != expected
    utils.set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw() == expected


def test_single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # Variables of a SLURM batch script that starts a process without srun.
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert distributed.init_processes("cpu") == distributed.Processes(torch.device("cpu"), 0, 1)


def test_srun_sets_the_variables_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    srun = {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16", "SLURM_JOB_ID": "123456"}
    for name, value in (srun | {"MASTER_ADDR": "node0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.os, "environ", dict(distributed.os.environ))
    distributed._export_slurm_variables()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [distributed.os.environ[name] for name in names] == ["11", "3", "16", "node0", "23456"]


@pytest.mark.parametrize("name", ["gpu", "cuda:x"])
def test_unknown_device(name):
    with pytest.raises(ValueError, match=f"--device '{name}' is unknown"):
        distributed.init_processes(name)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_bad_variables_of_a_launcher_are_named(name, monkeypatch):
    for other in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "many")
    with pytest.raises(utils.UserError, match=f"{name}=many: the environment variable is not a whole number"):
        distributed.init_processes("cpu")


def test_missing_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--device cuda:5: GPU 5 is requested, but 2 are visible"):
        distributed.init_processes("cuda:5")


def test_a_single_process_gathers_its_own_value():
    assert distributed.gather_on_main(3) == distributed.gather(3) == [3]


def test_versions():
    found = utils.versions()
    assert found["torch"] == torch.__version__
    assert set(found) == {"python", "torch", "torchvision", "timm", "numpy", "pillow", "git"}


def test_versions_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    utils.versions.cache_clear()
    assert utils.versions()["git"] is None
    utils.versions.cache_clear()


def test_srun_without_scontrol(monkeypatch):
    srun = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
    monkeypatch.setattr(distributed.os, "environ", {**srun, "PATH": ""})
    with pytest.raises(ValueError, match=r"scontrol show hostnames .* failed .*; export MASTER_ADDR"):
        distributed._export_slurm_variables()
