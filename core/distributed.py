"""The processes of a run: devices, collectives and DistributedDataParallel."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import T, UserError, _set_up_logging


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


def synchronise_norms(model: nn.Module, processes: Processes) -> nn.Module:
    """Have BatchNorms see the batches of all processes, where there are several with GPUs."""
    if processes.world_size > 1 and processes.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
