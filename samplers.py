"""Samplers of training, whose order can continue from any step, and data sets with seeded augmentation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from utils import UserError, restored_generators, seed_generators


class SampleKey(NamedTuple):
    """Key of a training sample. Its augmentation depends on the key and the seed alone."""

    epoch: int
    index: int
    copy: int  # number of the repeated augmentation, from 0


@dataclass
class SeededSet(Dataset):
    """A data set indexed by `SampleKey`; the key and the seed of the run seed the random generators of a sample."""

    dataset: Dataset  # with samples that are tuples
    seed: int  # of the run
    augment: Callable | None = None  # function of the parts of a sample that returns the augmented sample

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list:
        """Return the samples of a batch; the generators are restored once per batch, since that is slow."""
        samples = []
        with restored_generators():
            for key in keys:
                seed_generators(self.seed, *key)
                samples.append(self.get(key))
        return samples

    def get(self, key: SampleKey) -> Any:
        sample = self.dataset[key.index]
        return self.augment(*sample) if self.augment else sample


@dataclass
class EpochSampler(Sampler):
    """Base class of the training samplers: the part of each process, and the step to continue from."""

    steps: int  # in an epoch
    global_batch: int  # images in an optimizer step, over all processes and accumulated batches
    world_size: int = 1  # number of processes, a divisor of `global_batch`
    rank: int = 0  # index of this process
    seed: int = 0  # of the order

    def __post_init__(self):
        assert self.global_batch % self.world_size == 0
        self.set_epoch(0)

    def __len__(self) -> int:
        """Return the number of images that are left for this process in the epoch."""
        return (self.steps - self.step) * self.global_batch // self.world_size

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Set the next epoch and the number of its steps that are already done."""
        self.epoch = epoch
        self.step = step

    def nearest_step(self, step: int, global_batch: int) -> int:
        """Return the step to continue from after `step` steps with another global batch: after about as many images."""
        return min(step * global_batch // self.global_batch, self.steps)


class TrainSampler(EpochSampler):
    """Sampler for epochs over the data set: each process gets its part of one shuffled order.

    The order depends on (seed, epoch) alone. Process `rank` takes every `world_size`-th entry, so a step covers the
    same images for any number of processes. An epoch ends with the last full global batch; the images that are left
    out differ between epochs.

    With repeated augmentation (https://arxiv.org/abs/1901.09335) each image of the `num_samples` appears `repeats`
    times in a row with different augmentations. The length of an epoch stays the same, so it covers 1 / `repeats` of
    the images. The other arguments are those of `EpochSampler`.

    Raises:
        UserError: If the data set has fewer images than a global batch.
    """

    def __init__(self, num_samples: int, *, global_batch: int, repeats: int = 1, **kwargs):
        if num_samples < global_batch:
            raise UserError(
                f"the training set has {num_samples} images, fewer than one global batch of {global_batch}; "
                "lower --batch-size, --global-batch or the number of processes"
            )
        super().__init__(num_samples // global_batch, global_batch=global_batch, **kwargs)
        self.num_samples = num_samples
        self.repeats = repeats

    def __iter__(self) -> Iterator[SampleKey]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        start, end = self.step * self.global_batch, self.steps * self.global_batch
        for position in range(start + self.rank, end, self.world_size):
            index, copy = divmod(position, self.repeats)
            yield SampleKey(self.epoch, int(order[index]), copy)


class EndlessSampler(EpochSampler):
    """Sampler for training that is counted in steps: each process gets its part of an endless order.

    The endless order is one shuffle of the data set after another. An epoch is a fixed number of steps and can begin
    and end anywhere in a shuffle. The order depends on the seed alone. Process `rank` takes every `world_size`-th
    entry. `num_samples` is the number of images; the other arguments are those of `EpochSampler`.
    """

    def __init__(self, num_samples: int, **kwargs):
        super().__init__(**kwargs)
        self.num_samples = num_samples

    def nearest_step(self, step: int, global_batch: int) -> int:
        """Return the same step, since the run and its schedule are counted in steps."""
        return step

    def __iter__(self) -> Iterator[SampleKey]:
        first_step = self.epoch * self.steps
        start = (first_step + self.step) * self.global_batch
        end = (first_step + self.steps) * self.global_batch
        shuffled, order = -1, None
        for position in range(start + self.rank, end, self.world_size):
            round_, index = divmod(position, self.num_samples)
            if round_ != shuffled:
                shuffled, order = round_, np.random.default_rng((self.seed, round_)).permutation(self.num_samples)
            yield SampleKey(round_, int(order[index]), 0)
