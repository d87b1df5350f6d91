"""Which sample comes when, and with which random numbers: both depend on the seed and the position in the stream only.

So a run that was killed and resumed, or that is split over several processes, sees and draws the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from faceprior.models import to_device

# ---- random numbers


def stable_seed(*parts: int | str) -> int:
    """Hash numbers and names to a 63-bit seed, the same on every machine and in every process."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's global generators from `parts`, and restore them at the end: for dropout and initial weights."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(stable_seed(*parts))
        yield


def sample_generators(seed: int, positions: Tensor | Iterable[int], purpose: str = "noise") -> list[torch.Generator]:
    """Return one CPU generator per sample, seeded by the run's seed, the sample's position and the purpose."""
    return [torch.Generator().manual_seed(stable_seed(seed, int(p), purpose)) for p in positions]


def sample_timesteps(generators: list[torch.Generator], low: int, high: int, device=None) -> Tensor:
    """Draw one timestep in [low, high) per generator -> (B,) int64."""
    drawn = [torch.randint(low, high, (1,), generator=g) for g in generators]
    return to_device(torch.cat(drawn), torch.device(device or "cpu"))


def drop_prompts(prompts: list[str], probability: float, generators: list[torch.Generator]) -> list[str | None]:
    """Replace each prompt by None with `probability`, as classifier-free guidance needs it."""
    drawn = [float(torch.rand((), generator=g)) for g in generators]
    return [None if u < probability else prompt for prompt, u in zip(prompts, drawn, strict=True)]


# ---- the stream of samples


class SampleStream(Dataset):
    """An endless shuffled stream of `dataset`: position p -> the sample, with `position` added.

    Every epoch is a permutation of the dataset drawn from (seed, epoch), so that a run can resume at any position.
    `augment(sample, rng)` may change a sample; its numpy generator depends on (seed, position) only.
    """

    def __init__(self, dataset, seed: int, augment: Callable[[dict, np.random.Generator], dict] | None = None):
        if len(dataset) == 0:
            raise ValueError("the dataset is empty")
        self.dataset, self.seed, self.augment = dataset, seed, augment
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))

    def __getstate__(self):
        return {"dataset": self.dataset, "seed": self.seed, "augment": self.augment}

    def __setstate__(self, state):
        self.__init__(**state)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, place = divmod(position, len(self.dataset))
        sample = dict(self.dataset[int(self._permutation(epoch)[place])])
        if self.augment is not None:
            sample = self.augment(sample, np.random.default_rng(stable_seed(self.seed, position, "augment")))
        return {**sample, "position": position}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors, turn positions into a tensor, and keep everything else as a list."""
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values) if key == "position" else values
    return batch


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch to `device` (except positions, which only seed generators)."""
    return {k: to_device(v, device) if isinstance(v, Tensor) and k != "position" else v for k, v in batch.items()}


def positions(start: int, steps: int, per_step: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """Return the stream positions of every micro-batch of this process, from optimizer step `start` to `steps`.

    One step takes the next per_step * num_processes positions of the stream, whatever the number of processes: two
    processes with batch 2 see what one sees with batch 4.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    micro = per_step // batch_size
    starts = [(number * world + rank) * batch_size for number in range(start * micro, steps * micro)]
    return [range(first, first + batch_size) for first in starts]
