"""The order of the data, and the random numbers of a sample."""

import hashlib

import pytest
import torch
from training_runs import Points, shake

from faceprior.training import (
    SampleStream,
    collate,
    drop_prompts,
    sample_generators,
    sample_timesteps,
    seeded,
    stable_seed,
)
from faceprior.training.samples import move, positions

# random numbers


def test_stable_seed_is_the_same_everywhere():
    """The first eight bytes of the SHA-256 of the parts as JSON, little endian, without the lowest bit."""
    digest = hashlib.sha256(b'[3, "a", 14]').digest()
    assert stable_seed(3, "a", 14) == int.from_bytes(digest[:8], "little") // 2
    assert 0 <= stable_seed("é") < 2**63
    assert len({stable_seed(1, 23), stable_seed(12, 3), stable_seed("1", 23), stable_seed("123")}) == 4


def test_seeded_puts_the_global_generator_back():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(1, "dropout"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(1, "dropout"):
        assert torch.equal(torch.rand(2), inside)


def test_generators_belong_to_the_sample_and_not_to_the_batch():
    together = [torch.rand(3, generator=g) for g in sample_generators(1, torch.tensor([4, 5, 6]))]
    alone = torch.rand(3, generator=sample_generators(1, [5])[0])
    assert torch.equal(together[1], alone)
    others = [sample_generators(2, [5]), sample_generators(1, [4]), sample_generators(1, [5], "other")]
    assert not any(torch.equal(torch.rand(3, generator=g[0]), alone) for g in others)


def test_timesteps_fill_their_range():
    timesteps = sample_timesteps(sample_generators(0, range(400)), 3, 7)
    assert timesteps.dtype == torch.int64 and set(timesteps.tolist()) == {3, 4, 5, 6}
    assert torch.equal(timesteps[10:12], sample_timesteps(sample_generators(0, [10, 11]), 3, 7))


def test_dropped_prompts():
    prompts = [f"prompt {i}" for i in range(400)]
    dropped = drop_prompts(prompts, 0.25, sample_generators(0, range(400)))
    assert all(kept in (None, prompt) for kept, prompt in zip(dropped, prompts, strict=True))
    assert 60 <= dropped.count(None) <= 140  # 100 expected, deviation 8.7
    assert drop_prompts(prompts[:3], 0, sample_generators(0, range(3))) == prompts[:3]
    assert drop_prompts(prompts[:3], 1, sample_generators(0, range(3))) == [None] * 3


# the order of the data


def test_every_epoch_is_the_whole_dataset_once_in_another_order():
    stream = SampleStream(Points(), seed=1)
    epochs = [[stream[7 * epoch + i]["name"] for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == [f"point {i}" for i in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [SampleStream(Points(), seed=2)[i]["name"] for i in range(7)] != epochs[0]


def test_the_stream_is_entered_anywhere():
    walked = SampleStream(Points(), seed=1, augment=shake)
    for position in range(40):
        expected = walked[position]
    entered = SampleStream(Points(), seed=1, augment=shake)[39]
    assert entered["position"] == 39 and entered["name"] == expected["name"]
    assert torch.equal(entered["x"], expected["x"])


def test_augmentation_differs_between_epochs():
    changes = []
    for epoch in range(2):
        rows = [SampleStream(Points(), 1, shake)[7 * epoch + i] for i in range(7)]
        row = next(row for row in rows if row["name"] == "point 0")
        changes.append(row["x"] - Points()[0]["x"])
    assert not torch.equal(*changes)


def test_augmentation_may_not_change_the_dataset():
    class Kept(Points):
        samples = [Points()[i] for i in range(7)]

        def __getitem__(self, index):
            return self.samples[index]

    def rename(sample, rng):
        sample["name"] = "changed"
        return sample

    SampleStream(Kept(), 0, rename)[0]
    assert all(sample["name"].startswith("point") for sample in Kept.samples)


def test_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="the dataset is empty"):
        SampleStream([], seed=0)


def test_collate_and_move():
    batch = collate(
        [{"x": torch.ones(2), "position": 3, "name": "a"}, {"x": torch.zeros(2), "position": 4, "name": "b"}]
    )
    assert batch["x"].tolist() == [[1, 1], [0, 0]] and batch["name"] == ["a", "b"]
    assert batch["position"].tolist() == [3, 4]
    moved = move(batch, torch.device("meta"))
    assert moved["x"].is_meta and not moved["position"].is_meta and moved["name"] == ["a", "b"]


def test_two_processes_see_together_what_one_sees():
    """A step takes the next positions of the stream, whoever takes them: 2 processes x 2 micro-batches x 3 = 12."""

    class Process:
        def __init__(self, rank, world):
            self.process_index, self.num_processes = rank, world

    pair = [positions(5, 7, 6, 3, Process(rank, 2)) for rank in (0, 1)]
    alone = positions(5, 7, 12, 12, Process(0, 1))
    assert [list(batch) for batch in alone] == [list(range(60, 72)), list(range(72, 84))]
    for step in (0, 1):
        together = [p for batches in pair for batch in batches[2 * step : 2 * step + 2] for p in batch]
        assert sorted(together) == list(alone[step])
