"""Process set-up, logging, seeding and checkpoints, shared by the three tasks."""

import functools
import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn

logger = logging.getLogger("twins")

CHECKPOINT, BEST_CHECKPOINT, BEST_EMA_CHECKPOINT = "checkpoint.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth"


# ---------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and its device."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_processes(device: str = "auto", dist_url: str = "env://") -> Processes:
    """Join the other processes of the run, if there are any, and choose the device.

    Understood are torchrun, `python -m torch.distributed.launch`, SLURM's srun and a plain process.

    Args:
        device: `"auto"` (CUDA if there is a GPU), `"cuda"`, `"cuda:N"` or `"cpu"`. Several processes take the
            GPU of their local rank and talk through NCCL; on the CPU they talk through gloo.
        dist_url: Where the processes meet.

    Raises:
        ValueError: If the device does not exist here.
    """
    _export_slurm_variables()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = _choose_device(device, int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else None)
    _set_up_logging(rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
    if world_size > 1:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            init_method=dist_url,
            rank=rank,
            world_size=world_size,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return Processes(chosen, rank, world_size)


def end_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce a tensor over all processes in place and return it; one process leaves it as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def get_rank() -> int:
    """Return the rank of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores_per_process() -> int:
    """Return this process's share of the cores, at least 1; torchrun tells how many processes share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _export_slurm_variables() -> None:
    """Set what torchrun would set, from srun's variables. A batch script outside srun stays a plain process."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
    env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
    if "MASTER_ADDR" not in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
        try:
            listing = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"{' '.join(command)} failed ({error}); export MASTER_ADDR, the first machine") from error
        env["MASTER_ADDR"] = listing.stdout.split()[0]
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))


def _choose_device(name: str, local_rank: int | None) -> torch.device:
    """Resolve `--device`; processes of a distributed run each take the GPU of their local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is unknown; use auto, cuda, cuda:N or cpu") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"--device {name!r} is not supported; use auto, cuda, cuda:N or cpu")
    index = local_rank if local_rank is not None else device.index or 0
    if "SLURM_LOCALID" in os.environ and torch.cuda.device_count() == 1:
        index = 0  # srun --gpus-per-task=1 shows each process its own GPU alone
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: GPU {index} is asked for, but {torch.cuda.device_count()} are visible; "
            "start fewer processes on this machine, or use --device cpu"
        )
    return torch.device("cuda", index)


# ------------------------------------------------------------------------------------- logging, seeding, versions


def _set_up_logging(rank: int) -> None:
    """Print messages on standard output, from the main process alone; warnings from all."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[process {rank}] %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_random_state() -> dict[str, Any]:
    """Return the states of all generators, in types that load without executing code."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `get_random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def gather_random_states() -> list[dict[str, Any]]:
    """Return every process's generator states, by rank. All processes must call it."""
    state = get_random_state()
    if not dist.is_initialized():
        return [state]
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on, and the git revision of this code if it is known."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        revision = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        revision = None
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np, "pillow": PIL}
    return {
        "python": sys.version.split()[0],
        **{name: str(module.__version__) for name, module in modules.items()},
        "git": revision or None,
    }


# -------------------------------------------------------------------------------------------------- checkpoints


CHECKPOINT_KEYS = {
    *("model", "model_ema", "optimizer", "scheduler", "scaler"),
    *("epoch", "best", "history", "random_states", "args", "versions"),
}


@dataclass
class TrainState:
    """Everything that a run changes as it goes: what a checkpoint holds beside arguments and versions."""

    model: nn.Module  # bare: neither DistributedDataParallel nor anything else around it
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any  # one of timm's
    scaler: torch.amp.GradScaler
    model_ema: nn.Module | None = None  # timm's ModelEmaV3
    epoch: int = 0  # epochs done
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of log.txt

    def to_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        """Return a dict that loads with `weights_only=True`. All processes must call it together."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.model_ema.module.state_dict() if self.model_ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "random_states": gather_random_states(),
            "args": args,
            "versions": versions(),
        }

    def load_training(self, checkpoint: dict[str, Any]) -> None:
        """Restore everything but the weights, which `models.load_state_dict` loads with its checks."""
        chosen = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, options in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(options)  # the options of this run; with those of the old run they are the same
        if checkpoint["scaler"]:  # empty where the old run had no use for it
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"]
        if self.epoch > 0:  # a schedule depends on the options and the epoch alone
            self.lr_scheduler.step(self.epoch - 1)
        self.best = checkpoint["best"]
        self.history = checkpoint["history"]
        states = checkpoint["random_states"]
        if len(states) == get_world_size():
            set_random_state(states[get_rank()])


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a kill at any instant leaves the old file or the new one, whole."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def write_log(history: list[dict[str, Any]], path: Path) -> None:
    """Write log.txt: one JSON line for each epoch."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in history))


def write_text(path: Path, text: str) -> None:
    """Write a text file as `save_checkpoint` writes a checkpoint: the old one stays until the new one is whole."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file in the same folder, flush it to disk and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself last
    finally:
        os.close(folder)
