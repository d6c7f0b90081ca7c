"""Orders are whole, shared without overlap, and one for any number of processes."""

import random

import numpy as np
import pytest
import torch

from samplers import EndlessSampler, SampleKey, SeededSet, TrainSampler


def epoch_of(world_size: int, *, num_samples=103, global_batch=12, epoch=0, **kwargs) -> list[list]:
    """Return the keys of each process."""
    parts = []
    for rank in range(world_size):
        sampler = TrainSampler(num_samples, global_batch=global_batch, world_size=world_size, rank=rank, **kwargs)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
        parts.append(list(sampler))
    return parts


def test_each_image_once_and_whole_global_batches():
    (keys,) = epoch_of(1)
    assert len(keys) == 96
    assert len({key.index for key in keys}) == 96
    assert {(key.epoch, key.copy) for key in keys} == {(0, 0)}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_covers_the_same_images_for_any_number_of_processes(world_size):
    (alone,) = epoch_of(1, epoch=5)
    parts = epoch_of(world_size, epoch=5)
    share = 12 // world_size
    for step in range(8):
        together = [key for part in parts for key in part[step * share : (step + 1) * share]]
        assert sorted(together) == sorted(alone[step * 12 : (step + 1) * 12])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("step", [0, 2, 8])
def test_an_epoch_goes_on_where_it_was(world_size, step):
    whole = epoch_of(world_size, epoch=2)
    for rank, part in enumerate(whole):
        sampler = TrainSampler(103, global_batch=12, world_size=world_size, rank=rank)
        sampler.set_epoch(2, step)
        assert list(sampler) == part[12 * step // world_size :]
        assert len(sampler) == len(list(sampler))
        sampler.set_epoch(3)
        assert len(sampler) == 96 // world_size


@pytest.mark.parametrize(
    ("step", "before", "after", "expected"),
    [(4, 12, 12, 4), (4, 12, 24, 2), (4, 12, 6, 8), (4, 12, 10, 4), (8, 12, 24, 4), (8, 12, 6, 16), (0, 12, 5, 0)],
)
def test_another_global_batch_continues_after_as_many_images(step, before, after, expected):
    sampler = TrainSampler(103, global_batch=after)
    assert sampler.nearest_step(step, before) == expected
    sampler.set_epoch(0, expected)
    assert len(sampler) == len(list(sampler)) == after * (sampler.steps - expected)


def test_another_global_batch_continues_at_the_same_step_where_steps_are_counted():
    for global_batch in (3, 6, 60):
        sampler = EndlessSampler(7, steps=5, global_batch=global_batch)
        assert sampler.nearest_step(4, 12) == 4
        sampler.set_epoch(1, 4)
        assert len(sampler) == len(list(sampler)) == global_batch


def test_order_depends_on_seed_and_epoch():
    orders = [epoch_of(1, epoch=epoch, seed=seed)[0] for epoch in (0, 1) for seed in (0, 1)]
    assert len({tuple(key.index for key in order) for order in orders}) == 4
    assert orders[0] == epoch_of(1, epoch=0, seed=0)[0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_repeated_augmentation(world_size):
    keys = [key for part in epoch_of(world_size, repeats=3) for key in part]
    assert len(keys) == 96
    assert len(set(keys)) == 96
    copies: dict[int, set] = {}
    for key in keys:
        copies.setdefault(key.index, set()).add(key.copy)
    assert len(copies) == 32
    assert all(seen == {0, 1, 2} for seen in copies.values())


def test_too_few_images():
    with pytest.raises(ValueError, match="the training set has 7 images, fewer than one global batch of 8"):
        TrainSampler(7, global_batch=8)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_endless_order_is_one_shuffle_after_another(world_size):
    """Seven images, epochs of twelve: they end in the middle of a shuffle, and the next goes on there."""
    options = {"steps": 2, "global_batch": 6, "world_size": world_size}
    samplers = [EndlessSampler(7, rank=rank, **options) for rank in range(world_size)]
    order = []
    for epoch in range(7):
        for sampler in samplers:
            sampler.set_epoch(epoch)
            assert len(sampler) == 12 // world_size
        order += [key for keys in zip(*samplers, strict=True) for key in keys]
    shuffles = [order[i : i + 7] for i in range(0, 84, 7)]
    assert all(sorted(shuffle) == [SampleKey(i, index, 0) for index in range(7)] for i, shuffle in enumerate(shuffles))
    assert len({tuple(key.index for key in shuffle) for shuffle in shuffles}) > 6
    for sampler in samplers:
        sampler.set_epoch(3, step=1)
    rest = [key for keys in zip(*samplers, strict=True) for key in keys]
    assert rest == order[42:48]
    assert [len(sampler) for sampler in samplers] == [6 // world_size] * world_size


def test_samples_are_seeded_by_their_keys_alone():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return random.random(), np.random.rand(), torch.rand(()).item()

    samples = SeededSet(Numbers(), seed=3)
    before = torch.get_rng_state()
    keys = [SampleKey(0, 1, 0), SampleKey(0, 2, 0), SampleKey(1, 1, 0)]
    together = samples.__getitems__(keys)
    assert torch.equal(torch.get_rng_state(), before)
    assert together == [samples[key] for key in reversed(keys)][::-1]
    assert len({number for sample in together for number in sample}) == 9
    assert SeededSet(Numbers(), seed=4)[keys[0]] != together[0]
