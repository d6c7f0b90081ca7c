"""Processes of a run: devices, collectives and DistributedDataParallel."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, set_up_logging

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Device and rank of this process, and the number of processes of the run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def norm_processes(self) -> int:
        """Number of processes that share the statistics of BatchNorm: all on GPUs, one on CPUs."""
        return self.world_size if self.device.type == "cuda" else 1


def init_processes(device: str = "auto", dist_url: str = "env://", patience: float = 600) -> Processes:
    """Choose the device and, if there are several processes, initialise the process group.

    Works with torchrun, `python -m torch.distributed.launch`, SLURM's srun and a single process. With several processes
    each one uses the GPU of its local rank. The backend is NCCL on GPUs and gloo on the CPU.

    `device` is the value of `--device`; `patience` is the timeout of collectives in seconds.

    Raises:
        UserError: If the device does not exist or the rendezvous fails.
    """
    _export_slurm_variables()
    rank, world_size = read_variable("RANK", 0), read_variable("WORLD_SIZE", 1)
    chosen = choose_device(device, read_variable("LOCAL_RANK", 0) if world_size > 1 else None)
    set_up_logging(rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=_create_store(dist_url, rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=patience),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return Processes(chosen, rank, world_size)


def end_processes() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce a tensor over all processes in place and return it. All processes must call it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather(value: T) -> list[T]:
    """Return the values of all processes in the order of their ranks. All processes must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(value: T) -> list[T] | None:
    """Return the values of all processes on the main process and None on the others. All processes must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Call a function on the main process and return its result on all processes. All processes must call it.

    Raises:
        SharedError: On all processes, if the function raised an error. There are two exceptions: the main process
            raises an internal error itself, with its traceback; a single process raises any error itself.
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
    """An error that all processes raise together, so that only the main process reports it."""


def parallelise(model: nn.Module, processes: Processes) -> nn.Module:
    """Wrap a model in DistributedDataParallel if there are several processes."""
    if processes.world_size == 1:
        return model
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    # `train_one_epoch` copies the buffers at the end of an epoch; they have no effect on the training before.
    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    parallel = DistributedDataParallel(model, device_ids=device_ids, **options)
    if processes.device.type == "cpu" and processes.world_size > 2:
        parallel.register_comm_hook(None, _exchange_each_gradient)
    return parallel


def broadcast_buffers(*models: nn.Module | None) -> None:
    """Copy the buffers of the main process, such as running statistics, to all processes. All must call it."""
    if not dist.is_initialized():
        return
    for model in models:
        if model is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def _exchange_each_gradient(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients over the processes, one parameter at a time.

    The order in which gloo adds three or more numbers depends on their offset in the buffer. DistributedDataParallel
    rebuilds its buffers after the first step of each start, so a resumed run would differ in the last bits. With one
    buffer per parameter the offsets do not change.
    """
    for gradient in bucket.gradients():
        gradient.div_(get_world_size())
    sums = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(sums).then(lambda _: bucket.buffer())


def get_rank() -> int:
    """Return the rank of this process; 0 if there is only one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores_per_process() -> int:
    """Return the number of CPU cores divided by the number of processes on this machine, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // read_variable("LOCAL_WORLD_SIZE", 1))


def read_variable(name: str, default: int) -> int:
    """Return the integer value of an environment variable that a launcher sets, or the default."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text}: the environment variable is not a whole number; unset it") from error


def _create_store(dist_url: str, rank: int, world_size: int) -> dist.Store:
    """Return the store of the rendezvous, without old entries after a restart by torchrun."""
    try:
        store, *_ = next(dist.rendezvous(dist_url, rank, world_size))
    except (ValueError, RuntimeError) as error:  # a bad address or a missing environment variable
        raise UserError(
            f"--dist_url {dist_url}: the rendezvous failed ({' '.join(str(error).split())}); start the processes with "
            "torchrun, which sets the address"
        ) from error
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store  # launchers on several machines may have different restart counts
    # After a restart torchrun reuses its store, which still has the addresses of the dead processes.
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _export_slurm_variables() -> None:
    """Set the variables of torchrun from those of srun. A batch script outside srun remains a single process."""
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


def choose_device(name: str, local_rank: int | None) -> torch.device:
    """Return the device of `--device`; with a local rank, the GPU of that rank."""
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
        index = 0  # with srun --gpus-per-task=1 each process only sees its own GPU
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: GPU {index} is requested, but {torch.cuda.device_count()} are visible; "
            "start fewer processes on this machine, or use --device cpu"
        )
    return torch.device("cuda", index)


def choose_kernels(tf32: bool, one_size: bool) -> None:
    """Choose how GPUs compute.

    Args:
        tf32: True to round the factors of fp32 products and convolutions to the 10 bits of TF32, which is faster.
        one_size: True if almost all batches have the same shape. Only then cuDNN searches for the fastest convolution,
            and may compute attention: for each new shape it repeats the search and builds a plan of the attention.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = one_size
    torch.backends.cuda.enable_cudnn_sdp(one_size)


def synchronise_norms(model: nn.Module, processes: Processes) -> nn.Module:
    """Convert BatchNorms to SyncBatchNorms if there are several processes with GPUs."""
    if processes.norm_processes > 1:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
