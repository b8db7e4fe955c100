"""Samples and batches of training: unreadable files, random numbers, shares of a step, mixing."""

import pytest
import torch
from helpers.extras import require
from helpers.runs import Broken

from cropr_kernels.train import Config
from cropr_kernels.train.data import Batches, Samples, mixing

require("torchmetrics")


def test_a_sample_that_cannot_be_read_is_replaced_and_counted():
    samples = Samples(Broken(10, {3, 4}), seed=0)
    sample = samples[0, 3]
    assert sample.image[0, 0, 0] == 5 and sample.target == 1 and sample.skipped == 2
    assert samples[0, 2].skipped == 0
    with pytest.raises(RuntimeError, match=r"10 samples in a row|16 samples in a row .* truncated"):
        Samples(Broken(40, set(range(40))), seed=0)[0, 0]


def test_random_numbers_of_a_sample_follow_from_seed_epoch_and_index():
    class Noise(Broken):
        def __getitem__(self, index):
            return torch.rand(3), index

    before = torch.random.get_rng_state()
    samples = Samples(Noise(4, set()), seed=1)
    first = samples[0, 2].image
    assert torch.equal(first, samples[0, 2].image) and torch.equal(
        before, torch.random.get_rng_state()
    )
    others = [samples[1, 2], samples[0, 1], Samples(Noise(4, set()), seed=2)[0, 2]]
    assert all(not torch.equal(first, other.image) for other in others)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_takes_the_same_samples_however_it_is_shared(world, accumulate):
    run_config = Config(batch_size=8, accumulate=accumulate)
    alone = [set(batch) for batch in Batches(37, Config(batch_size=8), 3)]
    ranks = [list(Batches(37, run_config, 3, rank=rank, world=world)) for rank in range(world)]
    for step, expected in enumerate(alone):
        parts = [
            part for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate]
        ]
        assert {key for part in parts for key in part} == expected
        assert all(len(part) == 8 // world // accumulate for part in parts)
    rest = list(Batches(37, run_config, 3, world=world, first_step=2))
    assert rest == ranks[0][2 * accumulate :] and len(alone) == 4
    with pytest.raises(
        ValueError, match="batch_size=8 must be a multiple of accumulate x processes = 3"
    ):
        Batches(37, Config(batch_size=8), 0, world=3)
    with pytest.raises(ValueError, match="must be at most the 5 training samples"):
        Batches(5, run_config, 0)


def test_mixing_leaves_smoothing_to_the_loss_and_takes_images_in_pairs():
    mixed = Config(mixup=0.5, smoothing=0.1, batch_size=6, accumulate=2)
    pytest.importorskip("timm", reason="needs the train extra")
    _, target = mixing(mixed, 4)(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]))
    assert (target[:, 2:] == 0).all() and torch.allclose(target.sum(1), torch.ones(4))
    with pytest.raises(
        ValueError,
        match="batch_size=6 must be a multiple of 2 x 2: mixup and cutmix take images in pairs",
    ):
        Batches(37, mixed, 0)
