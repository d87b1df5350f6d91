"""
The scorer's frozen vision layers, run once per face crop: training then starts from what they gave.

Right only for crops that come back unchanged, and worth it for those that come back at all. The text tower's frozen
layers cannot be kept so; `FaceScorer.encode_prefix` says why.
"""

import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from faceprior.images import atomic_write
from faceprior.training import collate

logger = logging.getLogger(__name__)


class PrefixCache(Dataset):
    """The crops of a dataset as {side: what the frozen layers make of the crop, (1 + patches, hidden_size)}.

    crops: a dataset of {side: crop} whose `name(index)` tells a crop from every other, and from what its file held
    before. key: of the weights, see `prefix_key`. folder: for a file per item, whole or not there; files of another key
    or name are never read, so nothing stale is. None keeps the items in memory.
    """

    def __init__(self, crops: Any, key: str, folder: str | Path | None = None):
        self.crops, self._kept = crops, {}
        self.folder = None if folder is None else Path(folder) / key
        if self.folder is not None:
            names = (hashlib.sha256(crops.name(i).encode()).hexdigest()[:32] for i in range(len(crops)))
            self._files = [self.folder / f"{name}.safetensors" for name in names]

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.folder is None:
            return self._kept[index]
        try:
            return load_file(self._files[index])
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self._files[index]} is damaged ({error}): delete it, it is made anew") from error

    def fill(
        self,
        prepare: Callable[[dict], dict[str, Tensor]],
        encode: Callable[[Tensor], Tensor],
        batch_size: int,
        num_workers: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Make what is missing; killed and called again, it goes on in its folder.

        prepare: a sample of `crops` -> {side: pixels (3, S, S)}; encode: pixels (B, 3, S, S) -> (B, 1 + patches, C);
        share: (rank, number) of this process among those that fill one folder.
        """
        rank, number = share if self.folder is not None else (0, 1)
        missing = [i for i in range(rank, len(self), number) if not self._has(i)]
        logger.info("vision prefixes in %s: %d of %d to make", self.folder or "memory", len(missing), len(self))
        todo = iter(missing)
        loader = DataLoader(
            Subset(self.crops, missing), batch_size, num_workers=num_workers, collate_fn=partial(_collate, prepare)
        )
        with tqdm(total=len(missing), desc="vision prefixes", unit="pair", disable=rank > 0 or not missing) as bar:
            for batch in loader:
                states = encode(torch.cat(list(batch.values()))).cpu().chunk(len(batch))
                for rows in zip(*states, strict=True):
                    self._keep(next(todo), dict(zip(batch, rows, strict=True)))
                    bar.update()

    def _has(self, index: int) -> bool:
        return index in self._kept if self.folder is None else self._files[index].is_file()

    def _keep(self, index: int, item: dict[str, Tensor]) -> None:
        item = {side: state.clone() for side, state in item.items()}  # not a view that holds its whole batch
        if self.folder is None:
            self._kept[index] = item
            return
        with atomic_write(self._files[index]) as file:
            file.write(save(item))


def _collate(prepare: Callable, samples: list[dict]) -> dict[str, Tensor]:
    return collate([prepare(sample) for sample in samples])


def prefix_key(scorer: Any, dtype: torch.dtype) -> str:
    """Hash what a crop's prefix depends on: the frozen vision weights, the preprocessing, the dtype that is kept.

    scorer: a `FaceScorer`, frozen. The preprocessing is known by what it makes of one picture.
    """
    sizes = {name: value for name, value in scorer.config.items() if name.startswith(("vision_", "image_", "patch_"))}
    digest = hashlib.sha256(f"{dtype} {sorted(sizes.items())}".encode())
    for part in scorer.vision_parts[: scorer.frozen_vision_parts]:
        for name, tensor in sorted(part.state_dict().items()):
            numbers = tensor.detach().cpu().flatten().view(torch.uint8)  # numpy has no bfloat16
            digest.update(name.encode() + numbers.numpy().tobytes())
    picture = np.random.default_rng(0).integers(0, 256, (61, 47, 3), np.uint8)
    digest.update(scorer.preprocess(picture).numpy().tobytes())
    return digest.hexdigest()[:16]
