"""Processes, signals, logging and seeding, shared by the three tasks."""

import functools
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger("twins")

T = TypeVar("T")


class UserError(ValueError):
    """A fault outside this code: bad input, a missing file, a full disk.

    Its message is one line with the bad value and the remedy, and it is all that a script prints.
    """


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


def init_processes(device: str = "auto", dist_url: str = "env://", patience: float = 600) -> Processes:
    """Join the other processes of the run, if there are any, and choose the device.

    Understood are torchrun, `python -m torch.distributed.launch`, SLURM's srun and a plain process.

    Args:
        device: `"auto"` (CUDA if there is a GPU), `"cuda"`, `"cuda:N"` or `"cpu"`. Several processes take the
            GPU of their local rank and talk through NCCL; on the CPU they talk through gloo.
        dist_url: Where the processes meet.
        patience: Seconds that a process waits for the others before it gives them up.

    Raises:
        UserError: If the device does not exist here.
    """
    _export_slurm_variables()
    rank, world_size = read_variable("RANK", 0), read_variable("WORLD_SIZE", 1)
    chosen = _choose_device(device, read_variable("LOCAL_RANK", 0) if world_size > 1 else None)
    _set_up_logging(rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
    if world_size > 1:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=_meeting_place(dist_url, rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=patience),
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


def gather(value: T) -> list[T]:
    """Return every process's value, by rank. All processes must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(value: T) -> list[T] | None:
    """Return every process's value, by rank, on the main process, and None on the others. All must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Call a function on the main process alone; return its result on all of them.

    Raises:
        SharedError: On all processes together, if the function raised an error. The main process raises an internal
            error as it is, with its traceback, and so does a single process any error.
    """
    if not dist.is_initialized():
        return function()
    outcome, cause = [(None, None)], None
    if get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome, cause = [(None, str(error) or type(error).__name__)], error
    dist.broadcast_object_list(outcome)
    result, message = outcome[0]
    if cause is not None and not isinstance(cause, UserError):
        raise cause
    if message is not None:
        raise SharedError(message) from cause
    return result


class SharedError(Exception):
    """An error that all processes raise together, so that one of them need report it."""


def parallelise(model: nn.Module, processes: Processes) -> nn.Module:
    """Wrap a model in DistributedDataParallel if there are several processes."""
    if processes.world_size == 1:
        return model
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    parallel = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    if processes.device.type == "cpu" and processes.world_size > 2:
        parallel.register_comm_hook(None, _exchange_each_gradient)
    return parallel


def broadcast_buffers(*models: nn.Module) -> None:
    """Give the running statistics of the main process to all, which evaluate with them. All must call it."""
    if dist.is_initialized():
        for model in models:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def _exchange_each_gradient(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average gradients between processes, each parameter by itself.

    The order in which gloo adds three or more numbers depends on their place in the buffer, and
    DistributedDataParallel lays its buffers out anew after the first step of every start, so that a resumed run
    would differ in the last bits. Alone, a parameter has one place always.
    """
    for gradient in bucket.gradients():
        gradient.div_(get_world_size())
    sums = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(sums).then(lambda _: bucket.buffer())


def get_rank() -> int:
    """Return the rank of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores_per_process() -> int:
    """Return this process's share of the cores, at least 1; torchrun tells how many processes share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // read_variable("LOCAL_WORLD_SIZE", 1))


def read_variable(name: str, default: int) -> int:
    """Return an environment variable that a launcher sets.

    Raises:
        UserError: If it is not a whole number.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text}: the environment variable is not a whole number; unset it") from error


def _meeting_place(dist_url: str, rank: int, world_size: int) -> dist.Store:
    """Return the store through which processes find each other, a clean one after each restart by torchrun."""
    try:
        store, *_ = next(dist.rendezvous(dist_url, rank, world_size))
    except (ValueError, RuntimeError) as error:  # a bad address or a missing environment variable
        raise UserError(
            f"--dist_url {dist_url}: the processes cannot meet there ({' '.join(str(error).split())}); start them with "
            "torchrun, which sets the address"
        ) from error
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store  # launchers on several machines may not agree on the number of restarts
    # torchrun keeps its store, and with it the addresses of processes that are dead.
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _export_slurm_variables() -> None:
    """Set what torchrun would set, from srun's variables. A batch script outside srun stays a plain process."""
    env = os.environ
    if "RANK" in env or read_variable("SLURM_STEP_NUM_TASKS", 1) < 2:
        return
    env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
    env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
    if "MASTER_ADDR" not in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
        try:
            listing = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"{' '.join(command)} failed ({error}); export MASTER_ADDR, the first machine") from error
        env["MASTER_ADDR"] = listing.stdout.split()[0]
    env.setdefault("MASTER_PORT", str(20000 + read_variable("SLURM_JOB_ID", 0) % 20000))


def _choose_device(name: str, local_rank: int | None) -> torch.device:
    """Resolve `--device`; processes of a distributed run each take the GPU of their local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is unknown; use auto, cuda, cuda:N or cpu") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name!r} is not supported; use auto, cuda, cuda:N or cpu")
    index = local_rank if local_rank is not None else device.index or 0
    if "SLURM_LOCALID" in os.environ and torch.cuda.device_count() == 1:
        index = 0  # srun --gpus-per-task=1 shows each process its own GPU alone
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: GPU {index} is asked for, but {torch.cuda.device_count()} are visible; "
            "start fewer processes on this machine, or use --device cpu"
        )
    return torch.device("cuda", index)


# ------------------------------------------------------------------------------------------------------ signals


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # schedulers, the keyboard, SLURM's --signal=USR1
_received_signal = 0


class Interrupted(Exception):  # noqa: N818  not an error: the run goes on another time
    """Raised on all processes together when one of them was asked to stop and its work is safe."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def signals_noted() -> Iterator[None]:
    """Have signals that ask this process to stop only noted in the block, for `stop_requested` to tell."""
    global _received_signal
    _received_signal = 0
    handlers = {each: signal.signal(each, _note_signal) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def stop_requested() -> int:
    """Return the number of the signal that asked this process to stop, 0 if none has."""
    return _received_signal


def stop_if_requested(device: torch.device) -> None:
    """Raise `Interrupted` on all processes if any of them was asked to stop. All must call it."""
    number = int(all_reduce(torch.tensor(stop_requested(), device=device), dist.ReduceOp.MAX))
    if number:
        raise Interrupted(number)


def outlive_signals(_worker: int) -> None:
    """Let a data-loading process live on when its whole group is signalled: the step under way needs its images."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def kill_children() -> None:
    """End data-loading processes, even hanging ones, which this process would wait for at its exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the loader would raise an error at each death
    for child in multiprocessing.active_children():
        child.kill()


def _note_signal(number: int, _frame) -> None:
    global _received_signal
    _received_signal = number
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number == signal.SIGINT and get_rank() == 0:
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print may be what was interrupted


# ----------------------------------------------------------------------------- meter, logging, seeding, versions


@dataclass
class EpochMeter:
    """What one process has seen of an epoch: how far it has come, and the sums that its means are made of."""

    step: int = 0  # steps of the epoch behind it, skipped ones included
    taken: int = 0  # steps that the sums are of
    skipped: int = 0
    skipped_in_a_row: int = 0  # just now, from the epochs before as well
    lr_sum: float = 0.0
    names: tuple[str, ...] = ()  # of the losses
    sums: torch.Tensor | None = None  # of the losses, float64 on their device

    def add(self, losses: dict[str, torch.Tensor], lr: float) -> None:
        """Count a step with its losses and learning rate."""
        values = torch.stack(list(losses.values()))
        self.names = tuple(losses)
        self.sums = values if self.sums is None else self.sums + values
        self.lr_sum += lr
        self.step += 1
        self.taken += 1
        self.skipped_in_a_row = 0

    def add_skipped(self) -> None:
        """Count a step that left the weights as they were."""
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1

    def means(self) -> dict[str, float]:
        """Return the means of this process so far; nothing before the first step."""
        if not self.taken:
            return {}
        losses = (self.sums / self.taken).tolist()
        return {"lr": self.lr_sum / self.taken, **dict(zip(self.names, losses, strict=True))}

    def averages(self) -> dict[str, float]:
        """Return the means over all processes. All must call it."""
        means = gather(self.means())
        return {name: sum(each[name] for each in means) / len(means) for name in means[0]}

    def start_epoch(self) -> None:
        """Count from the beginning again, but for a row of skipped steps that the last epoch ended with."""
        self.load_state_dict({**EpochMeter().state_dict(), "skipped_in_a_row": self.skipped_in_a_row})

    @staticmethod
    def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the state that each of another number of processes goes on from: the mean of the old ones."""
        if states[0]["sums"] is None:
            return states[0]
        return {**states[0], "sums": torch.stack([state["sums"] for state in states]).mean(0)}

    def state_dict(self) -> dict[str, Any]:
        """Return the fields, in types that load without executing code."""
        return {**vars(self), "sums": None if self.sums is None else self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)
        if self.sums is not None:
            self.sums = self.sums.to(device)


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


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators from a key."""
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would also queue a CUDA seeding


@contextmanager
def restored_generators() -> Iterator[None]:
    """Leave the generators as they were before the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


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


def make_deterministic() -> None:
    """Have torch use deterministic algorithms alone, and refuse operations that have none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.benchmark = False
    logger.info("deterministic: slower on a GPU, where the fastest algorithms are ruled out; no different on a CPU")


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
