"""Latents, masks and prompt embeddings of a training set: computed once, kept on the disk, memory-mapped.

    dataset = cache_dataset(PairDataset(pairs, 512), "data/cache", "pairs", pipeline, encode, accelerator)

An entry is a safetensors file with the tensors of one sample or of one prompt. Its name is a hash of all that they
depend on: of the contents of the image files, the crop, the resolution, the prompt and its tokens; the name of its
folder is a hash of the weights and the config of the VAE, or of the text encoders. So what changes gets a new entry,
runs that agree in all of this share theirs, and a folder of pairs or a model may be moved. Old entries stay until
somebody deletes them: nothing refers to an entry but its name.

Entries appear whole or not at all. After a kill the same command goes on with the entries that are missing. Each holds
a checksum, which is compared when it is first read: one that a disk or a copy has spoilt ends the run and is deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from faceprior.diffusion import PromptEmbeddings, encode_prompts, networks_of
from faceprior.files import atomic_write, remove_leftovers, size_text
from faceprior.memory import ENCODING, Rehearsal
from faceprior.models import placed
from faceprior.training import collate

logger = logging.getLogger(__name__)
# Part of every folder's name: raise it when the code makes other tensors than before of the same images and prompts.
FORMAT = 1
DROPPED = "dropped_"  # before the names of the dropped prompt's tensors
CHECKSUM = "crc32"  # key in an entry's metadata; entries of former versions have none
_PROMPTS_AT_ONCE = 8


# ---- the dataset


class CachedDataset(Dataset):
    """Samples that are read from files: the values that are no tensors, and the tensors of a sample's entries.

    values: of each sample; files: the entries of each sample. The tensors are views of memory-mapped files, which the
    processes of a machine share and which take memory only while they are used.
    """

    def __init__(self, values: list[dict[str, Any]], files: list[tuple[Path, ...]]):
        self.values, self.files = values, files
        self._checked: set[Path] = set()

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self.values[index])
        for file in self.files[index]:
            try:
                sample |= self._read(file)
            except (OSError, SafetensorError) as error:
                raise OSError(f"the cache's {file} is gone or damaged ({error}): the same command makes it") from error
        return sample

    def _read(self, file: Path) -> dict[str, Tensor]:
        with safe_open(file, "pt") as entry:
            tensors = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118
            stated = (entry.metadata() or {}).get(CHECKSUM)
        if file not in self._checked and stated not in (None, _checksum(tensors)):
            file.unlink(missing_ok=True)  # by its length it is whole, so that nothing else would make it again
            raise OSError("its bytes are not those that were written")
        self._checked.add(file)
        return tensors


def cache_dataset(
    dataset,
    folder: str | Path,
    kind: str,
    pipeline: DiffusionPipeline,
    encode: Callable[[dict[str, Any]], dict[str, Tensor]],
    accelerator: Accelerator,
    batch_size: int = 1,
    num_workers: int = 0,
    prompt: str | None = "prompt",
) -> CachedDataset:
    """Return `dataset` with tensors from the cache in `folder`, where those that are missing are computed first.

    encode: makes of a batch of the dataset's samples, on the CPU, named tensors (B, ...) by `pipeline.vae`; kind: a
    word for what it makes, part of a folder's name; batch_size: samples encoded at once; num_workers: processes that
    load them; prompt: the sample's key that holds the prompt, None if the samples have none: then there are no
    embeddings either.

    The dataset may have `source(index)`, which returns the sample's values that are no tensors, and what its tensors
    depend on: numbers, texts and paths of files, whose contents count. Without it every sample is loaded, and its
    tensors count. A dataset that draws another sample each time cannot be cached.

    Each sample of the result has those values, the tensors of `encode`, and the prompt's embeddings: `prompt_embeds`
    (L, D) and, where the base has them, `pooled_prompt_embeds` (P,); under the same names after `dropped_`, those of a
    dropped prompt. All are in the dtype in which the models give them. See `cached_prompts`.

    The VAE and the text encoders are on the accelerator's device while they encode and come back afterwards. Its
    processes share the work. Raises OSError if the folder cannot be written or its disk is too small.
    """
    folder = Path(folder)

    # ---- The entries, by what they depend on
    sources = [_source(dataset, index) for index in range(len(dataset))]
    texts = [values[prompt] for values, _ in sources] if prompt else []
    place = folder / f"{kind}-{fingerprint(pipeline.vae)}"
    samples = [_file(place, name) for name in _sample_names([identity for _, identity in sources])]
    prompts = _prompt_files(folder, pipeline, texts) if prompt else {}

    # ---- Those that are missing
    def encode_samples(indices: list[int]) -> Iterator[dict[str, Tensor]]:
        loader = DataLoader(Subset(dataset, indices), batch_size, num_workers=num_workers, collate_fn=collate)
        for batch in loader:
            yield from _rows(encode(batch))

    def encode_texts(texts: list[str | None]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(texts), _PROMPTS_AT_ONCE):
            chunk = texts[start : start + _PROMPTS_AT_ONCE]
            rows = _rows(vars(encode_prompts(pipeline, chunk)))
            for text, row in zip(chunk, rows, strict=True):
                yield {f"{DROPPED if text is None else ''}{name}": tensor for name, tensor in row.items()}

    # the prompts first: they take the least time, and may take the most space
    encoders = text_encoders(pipeline)
    _fill(dict(zip(prompts.values(), prompts, strict=True)), encode_texts, "prompts", accelerator, encoders)
    _fill({file: index for index, file in enumerate(samples)}, encode_samples, kind, accelerator, [pipeline.vae])

    of_prompts = [(prompts[text], prompts[None]) for text in texts] or [()] * len(samples)
    files = [(file, *own) for file, own in zip(samples, of_prompts, strict=True)]
    size = sum(file.stat().st_size for file in {file for row in files for file in row})
    if accelerator.is_main_process:
        logger.info("%s holds %s for this run: it is kept for others, and may be deleted", folder, size_text(size))
    return CachedDataset([values for values, _ in sources], files)


def cached_prompts(batch: dict[str, Any], prompts: list[str | None]) -> PromptEmbeddings:
    """Return the embeddings of a batch of a `CachedDataset`; `prompts`: its own texts, with None for the dropped ones.

    Equal to `encode_prompts(pipeline, prompts)`.
    """
    embeds = {}
    for name in (field.name for field in dataclasses.fields(PromptEmbeddings) if field.name in batch):
        rows = zip(prompts, batch[name], batch[DROPPED + name], strict=True)
        embeds[name] = torch.stack([dropped if prompt is None else own for prompt, own, dropped in rows])
    return PromptEmbeddings(**embeds)


def rehearse_cache(
    rehearsal: Rehearsal,
    pipeline: DiffusionPipeline,
    encode: Callable[[dict[str, Any]], dict[str, Tensor]],
    batch: dict[str, Any],
    device: torch.device,
    prompt: str | None = "prompt",
) -> dict[str, Any]:
    """Return what a batch of the cached dataset holds in place of `batch`, and count what `cache_dataset` takes for it.

    To plan with (see `faceprior.memory`); `encode`, `prompt` as in `cache_dataset`.
    """
    networks = networks_of(pipeline)

    def alone(*models: nn.Module) -> AbstractContextManager[None]:
        return rehearsal.away(*(network for network in networks if network not in models))

    encoders, rows = text_encoders(pipeline), {}
    with torch.no_grad():
        if prompt:
            with alone(*encoders), placed(encoders, device), rehearsal.phase(ENCODING):
                rows = vars(encode_prompts(pipeline, [str(number) for number in range(_PROMPTS_AT_ONCE)]))
        with alone(pipeline.vae), placed([pipeline.vae], device), rehearsal.phase(ENCODING):
            encoded = encode(batch)
    for name, rows_of in rows.items():
        for start in ("", DROPPED) if rows_of is not None else ():
            encoded[f"{start}{name}"] = rows_of.new_zeros(len(batch[prompt]), *rows_of.shape[1:])
    return {**encoded, prompt: batch[prompt]} if prompt else encoded


# ---- names: what an entry depends on


def fingerprint(*models: nn.Module, settings: Any = None) -> str:
    """Return a hash of the models' classes, configs and weights, all of them, and of `settings`: 16 hex digits.

    Threads hash 2 GB a second each where the processor has instructions for SHA-256.
    """
    described = [FORMAT, settings]
    with ThreadPoolExecutor() as pool:
        for model in models:
            weights = model.state_dict()
            digests = pool.map(_tensor_digest, weights.values())
            described.append([type(model).__name__, _config(model), dict(zip(weights, digests, strict=True))])
    return _hash(described)[:16]


def _config(model: nn.Module) -> dict[str, Any]:
    """Return a model's config without what says where it came from: its path, and the libraries' versions."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return {key: value for key, value in config.items() if key[0] != "_" and key != "transformers_version"}


def _tensor_digest(tensor: Tensor) -> str:
    return _hash([str(tensor.dtype), list(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest()])


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _hash(value: Any, default: Callable[[Any], Any] = str) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()


def _source(dataset, index: int) -> tuple[dict[str, Any], Any]:
    """Return a sample's values that are no tensors, and what its tensors depend on."""
    if hasattr(dataset, "source"):
        return dataset.source(index)
    sample = dataset[index]
    tensors = {key: value for key, value in sample.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in sample.items() if key not in tensors}
    return values, {key: _tensor_digest(tensor) for key, tensor in tensors.items()}


def _sample_names(identities: list[Any]) -> list[str]:
    """Return the names of samples' entries; a path among what a sample depends on stands for its file's contents."""
    paths: set[Path] = set()
    for identity in identities:
        json.dumps(identity, default=lambda path: paths.add(path))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), paths)
        bar = tqdm(digests, "hashing files", len(paths), delay=2, leave=False)
        contents = dict(zip(paths, bar, strict=True))
    return [_hash(identity, contents.__getitem__) for identity in identities]


def _prompt_files(folder: Path, pipeline: DiffusionPipeline, texts: list[str]) -> dict[str | None, Path]:
    """Return the entries of the distinct prompts and of the dropped one, None; tokens stand for the tokenizers."""
    tokenizers = [part for name, part in pipeline.components.items() if "tokenizer" in name and part is not None]
    settings = [
        type(pipeline).__name__,
        pipeline.config.get("force_zeros_for_empty_prompt", False),
        [[type(t).__name__, t.model_max_length, t.pad_token_id, t.padding_side] for t in tokenizers],
    ]
    folder = folder / f"prompts-{fingerprint(*text_encoders(pipeline), settings=settings)}"
    prompts = [None, *dict.fromkeys(texts)]
    tokens = [t([prompt or "" for prompt in prompts], verbose=False).input_ids for t in tokenizers]
    return {prompt: _file(folder, _hash([prompt, ids])) for prompt, *ids in zip(prompts, *tokens, strict=True)}


def text_encoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """Return the pipeline's text encoders."""
    return [part for name, part in pipeline.components.items() if "text_encoder" in name and part is not None]


def _file(folder: Path, name: str) -> Path:
    return folder / name[:2] / f"{name[:32]}.safetensors"  # at most 256 folders, for file systems that list them slowly


# ---- filling


def _fill(
    files: dict[Path, Any],
    encode: Callable[[list[Any]], Iterator[dict[str, Tensor]]],
    what: str,
    accelerator: Accelerator,
    models: list[nn.Module],
) -> None:
    """Write the entries that are missing, each of what `encode` makes of its item.

    Each process does its share, and then what others left: nothing, but on disks that the processes do not share.
    """
    own = set(list(files)[accelerator.process_index :: accelerator.num_processes])
    for share in (own, files.keys() - own):
        missing = [file for file in files if file in share and not _is_whole(file)]
        if missing:
            with placed(models, accelerator.device), torch.no_grad():
                entries = encode([files[file] for file in missing])
                _write(missing, entries, what, accelerator)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the encoders took, for other processes, too
        accelerator.wait_for_everyone()


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(_bytes(tensor), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _is_whole(file: Path) -> bool:
    """Tell whether an entry exists; a damaged one does not, and is named."""
    try:
        with safe_open(file, "pt"):  # it compares the file's length with the header
            return True
    except FileNotFoundError:
        return False
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s) and is made again", file, error)
        return False


def _write(files: list[Path], entries: Iterable[dict[str, Tensor]], what: str, accelerator: Accelerator) -> None:
    folder = files[0].parent.parent
    for place in {file.parent for file in files}:
        remove_leftovers(place)
    bar = tqdm(total=len(files), desc=f"caching {what}", disable=not accelerator.is_main_process)
    with bar:
        for number, (file, entry) in enumerate(zip(files, entries, strict=True)):
            tensors = {name: tensor.cpu().contiguous() for name, tensor in entry.items()}
            data = save(tensors, {CHECKSUM: _checksum(tensors)})
            try:
                if number == 0:
                    _require_space(folder, len(data) * len(files) * accelerator.num_processes)
                with atomic_write(file) as stream:
                    stream.write(data)
            except OSError as error:
                raise OSError(
                    f"the cache {folder} cannot be written ({error}): free space, or give another folder; the same "
                    f"command goes on after {number} of {len(files)} {what}"
                ) from error
            bar.update()


def _require_space(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    with tqdm.external_write_mode():  # a bar is on the line
        logger.info("%s: about %s are to be written, %s are free", folder, size_text(size), size_text(free))
    if size > free:
        raise OSError(f"about {size_text(size)} are needed, {size_text(free)} are free")


def _rows(batch: dict[str, Tensor | None]) -> Iterator[dict[str, Tensor]]:
    """Take a batch of tensors (B, ...) apart into its B samples."""
    tensors = {name: tensor.unbind() for name, tensor in batch.items() if tensor is not None}
    for row in zip(*tensors.values(), strict=True):
        yield dict(zip(tensors, row, strict=True))
