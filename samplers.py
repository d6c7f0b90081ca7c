"""The order of samples: training orders, one for any number of processes and from any step, and evaluation shards."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from utils import UserError, restored_generators, seed_generators


class SampleKey(NamedTuple):
    """What the training set is asked for. A sample's augmentation depends on this and the seed alone."""

    epoch: int
    index: int
    copy: int  # which of the repeated augmentations


class SeededSet(Dataset):
    """A data set asked by `SampleKey`, under random generators seeded from it and the seed of the run."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list:
        """Return a whole batch, as a loader asks for it: the generators are restored once, which takes longest."""
        samples = []
        with restored_generators():
            for key in keys:
                seed_generators(self.seed, *key)
                samples.append(self.get(key))
        return samples

    def get(self, key: SampleKey) -> Any:
        """Return one sample."""
        return self.dataset[key.index]


class EpochSampler(Sampler):
    """What training orders share: the part of a process, and a place to go on from.

    Args:
        steps: Steps of an epoch.
        global_batch: Images of one optimizer step, of all processes and accumulated batches together.
        world_size: Number of processes; divides `global_batch`.
        rank: This process.
        seed: Seed of the order.
    """

    def __init__(self, steps: int, global_batch: int, world_size: int, rank: int, seed: int):
        assert global_batch % world_size == 0
        self.steps = steps
        self.global_batch = global_batch
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self.step = 0

    def __len__(self) -> int:
        """Return the images of this process that are left of the epoch."""
        return (self.steps - self.step) * self.global_batch // self.world_size

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Choose the epoch whose order comes next, and how many of its steps are done already."""
        self.epoch = epoch
        self.step = step

    def nearest_step(self, step: int, global_batch: int) -> int:
        """Return the step to continue at where `step` steps of an epoch were done with another global batch.

        Here it is the one up to which about as many images of the epoch have been seen.
        """
        return min(step * global_batch // self.global_batch, self.steps)


class TrainSampler(EpochSampler):
    """Hands every process its part of one shuffled order.

    The order depends on (seed, epoch) alone. Process `rank` takes each `world_size`-th entry, so a step of all
    processes together covers one run of consecutive entries, whatever their number. An epoch ends at the last
    whole global batch; what is left over differs from epoch to epoch.

    With `repeats` n each drawn image appears n times in a row under different augmentations, and an epoch
    keeps its length, so it sees 1/n of the images (repeated augmentation, https://arxiv.org/abs/1901.09335).

    Args:
        num_samples: Images of the data set.
        global_batch: Images of one optimizer step, of all processes and accumulated batches together.
        world_size: Number of processes; divides `global_batch`.
        rank: This process.
        seed: Seed of the order.
        repeats: Augmentations of each drawn image.

    Raises:
        UserError: If there are fewer images than one global batch takes.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeats: int = 1,
    ):
        if num_samples < global_batch:
            raise UserError(
                f"the training set has {num_samples} images, fewer than one global batch of {global_batch}; "
                "lower --batch-size, --global-batch or the number of processes"
            )
        super().__init__(num_samples // global_batch, global_batch, world_size, rank, seed)
        self.num_samples = num_samples
        self.repeats = repeats

    def __iter__(self) -> Iterator[SampleKey]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        start, end = self.step * self.global_batch, self.steps * self.global_batch
        for position in range(start + self.rank, end, self.world_size):
            index, copy = divmod(position, self.repeats)
            yield SampleKey(self.epoch, int(order[index]), copy)


class EndlessSampler(EpochSampler):
    """Hands every process its part of an order without end: the data set shuffled anew again and again.

    Made for training that is counted in steps: an "epoch" is a fixed number of steps, wherever in the data set
    it begins and ends. The order depends on the seed alone; process `rank` takes each `world_size`-th entry.

    Args:
        num_samples: Images of the data set.
        steps: Steps of one epoch.
        global_batch: Images of one optimizer step, of all processes and accumulated batches together.
        world_size: Number of processes; divides `global_batch`.
        rank: This process.
        seed: Seed of the order.
    """

    def __init__(
        self, num_samples: int, *, steps: int, global_batch: int, world_size: int = 1, rank: int = 0, seed: int = 0
    ):
        super().__init__(steps, global_batch, world_size, rank, seed)
        self.num_samples = num_samples

    def nearest_step(self, step: int, global_batch: int) -> int:
        """Return the same step: the run is counted in steps, and so is its schedule."""
        return step

    def __iter__(self) -> Iterator[SampleKey]:
        begin, shuffled, order = self.epoch * self.steps, -1, None
        start, end = ((begin + step) * self.global_batch for step in (self.step, self.steps))
        for position in range(start + self.rank, end, self.world_size):
            round_, index = divmod(position, self.num_samples)
            if round_ != shuffled:
                shuffled, order = round_, np.random.default_rng((self.seed, round_)).permutation(self.num_samples)
            yield SampleKey(round_, int(order[index]), 0)


class EvalSampler(Sampler[int]):
    """Hands every process its share of `0 .. num_samples - 1`, each index to exactly one of them.

    Shares differ by at most one; none is padded, so sums over all processes are exact.
    """

    def __init__(self, num_samples: int, *, world_size: int = 1, rank: int = 0):
        self.indices = range(rank, num_samples, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
