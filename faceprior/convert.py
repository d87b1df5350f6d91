"""
Find released weights and rename them to our names: files, state dicts and configs only, no model classes.

Face Score (arXiv 2406.17100) and ImageReward publish one BLIP layout, `blip.visual_encoder`,
`blip.text_encoder` and a reward `mlp`; `FaceScorer` holds the same tensors as `vision_model`, `text_model`
(the transformers library's BLIP) and `mlp`. AuthFace publishes stock diffusers folders: nothing to convert.
"""

import json
import math
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faceprior.models import MODEL_FILES, first_line, resolve_model

# (official name, our name): the first pair whose start matches renames the start
_STARTS = (
    ("blip.visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision_model.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision_model.encoder.layers."),
    ("blip.text_encoder.", "text_model."),
    ("mlp.layers.", "mlp."),
)
# the same inside a block of the vision tower; `mlp.fc1` and `mlp.fc2` are called the same in both
_VISION_PARTS = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
# in the official files, but not part of the reward
_DROPPED = re.compile(r"blip\.(vision|text)_proj\.(weight|bias)|.*\.position_ids")

# weights of a released checkpoint -> (mean, std) by which its reward is normalised
_OFFICIAL_FILES = {
    "FS_model.pt": (0.0, 1.0),
    "FaceScore_model/FS_model.pt": (0.0, 1.0),
    "ImageReward.pt": (0.1672, 1.0333),
}
_MED_CONFIG = "med_config.json"
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_NAMES_SHOWN = 64  # in an error, per kind, layers folded: enough for every name of a face scorer


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The files of a released Face Score or ImageReward model, and its reward's mean and standard deviation."""

    weights: Path
    med_config: Path
    reward_mean: float
    reward_std: float


def find_checkpoint_folder(name: str | Path, subfolder: str | None = None, **hub_options: Any) -> Path:
    """Return the folder of a scorer, ours or a released one, by its name; rule and errors as in `resolve_model`."""
    return resolve_model(
        name,
        "scorer",
        "`python stages/02_train_scorer.py` trains one; on the command line `tiny` is the small one that ships",
        required=("config.json", *_OFFICIAL_FILES),
        subfolder=subfolder,
        patterns=(*MODEL_FILES, *_OFFICIAL_FILES),
        **hub_options,
    )


def find_official_checkpoint(folder: str | Path) -> OfficialCheckpoint | None:
    """Find a released checkpoint in a folder; None if there is none.

    It is `FS_model.pt`, `FaceScore_model/FS_model.pt` or `ImageReward.pt`, each with `med_config.json` beside it.

    Raises:
        FileNotFoundError: the weights have no `med_config.json` beside them.
    """
    for name, (reward_mean, reward_std) in _OFFICIAL_FILES.items():
        weights = Path(folder) / name
        if not weights.is_file():
            continue
        med_config = weights.with_name(_MED_CONFIG)
        if not med_config.is_file():
            raise FileNotFoundError(
                f"no {_MED_CONFIG} beside {weights}: it holds the number of attention heads, which the weights do not "
                "show; it is published in the same place as the weights"
            )
        return OfficialCheckpoint(weights, med_config, reward_mean, reward_std)
    return None


def read_official_checkpoint(checkpoint: OfficialCheckpoint) -> tuple[dict[str, Tensor], dict]:
    """Read a released checkpoint: (state dict in our names, configuration of a `FaceScorer`).

    Raises:
        ValueError: a file is broken or belongs to another model; see `load_official_state_dict`,
            `official_face_score_to_ours` and `face_score_config`.
    """
    source = str(checkpoint.weights)
    state_dict = official_face_score_to_ours(load_official_state_dict(checkpoint.weights), source)
    config = face_score_config(state_dict, read_med_config(checkpoint.med_config), source)
    return state_dict, {
        **config,
        "reward_mean": checkpoint.reward_mean,
        "reward_std": checkpoint.reward_std,
    }


def load_official_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Load a `.pt` file of tensors onto the CPU; a pickle with anything else in it is refused, not run.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, holds code, or is not a mapping from names to tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about another pickle protocol: it is refused or it works
            state_dict = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        # not torch's own message: it advises to load the file without the safeguard
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is refused: only tensors are loaded from a checkpoint, and this file holds something else "
            f"({f'it asks for {code[1]}' if code else 'code, or it is damaged'}): download it from its publisher"
        ) from error
    except Exception as error:  # a damaged file fails as RuntimeError, EOFError, KeyError, struct.error...
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no torch checkpoint: download it again. "
            f"torch says: {first_line(error).split('. ')[0]}"
        ) from error
    _require_tensors(state_dict, path)
    return dict(state_dict)


def read_med_config(path: str | Path) -> dict:
    """Read `med_config.json`, the text encoder's configuration in the official layout.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        med_config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(med_config, dict):
        raise ValueError(f"{path} has to hold a JSON object but holds a {type(med_config).__name__}")
    return med_config


def official_face_score_to_ours(state_dict: Mapping[str, Tensor], source: str = "the checkpoint") -> dict[str, Tensor]:
    """Rename an official Face Score or ImageReward state dict, key by key.

    A leading `module.` is stripped. The two projections of BLIP's contrastive loss and `position_ids`, which
    the reward does not use, are dropped. Tensors are shared, not copied.

    Args:
        source: name of the state dict in errors.

    Raises:
        ValueError: keys have no counterpart; they are counted and named.
    """
    stripped = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    kept = {name: tensor for name, tensor in stripped.items() if not _DROPPED.fullmatch(name)}
    unexpected = [name for name in kept if not _starts_with_any(name, (start for start, _ in _STARTS))]
    if unexpected:
        missing = [start for start, _ in _STARTS if not any(name.startswith(start) for name in kept)]
        raise ValueError(describe_mismatch(source, missing, unexpected))
    return {_rename(name, _STARTS, _VISION_PARTS): tensor for name, tensor in kept.items()}


def ours_to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a `FaceScorer` state dict to the official names: the inverse of `official_face_score_to_ours`.

    Without the dropped projections, which the official code (strict=False) accepts. Tensors are shared.

    Raises:
        ValueError: a key is not one of a `FaceScorer`.
    """
    starts = tuple((ours, official) for official, ours in _STARTS)
    parts = tuple((ours, official) for official, ours in _VISION_PARTS)
    unexpected = [name for name in state_dict if not _starts_with_any(name, (start for start, _ in starts))]
    if unexpected:
        raise ValueError(describe_mismatch("the state dict of the scorer", [], unexpected))
    return {_rename(name, starts, parts): tensor for name, tensor in state_dict.items()}


def face_score_config(state_dict: Mapping[str, Tensor], med_config: Mapping, source: str = "the checkpoint") -> dict:
    """Return the configuration of the `FaceScorer` whose state dict, in our names, is given.

    Every size is read from the tensors' shapes; vision heads = width // 64, as in every ViT of BLIP;
    `med_config` gives what shapes do not show: the text heads, the dropout, the epsilon.

    Raises:
        ValueError: a tensor that shows a size is missing or misshapen, or `med_config` has no number of heads
            or an activation other than GELU.
    """
    _require_shapes(state_dict, source)
    if "num_attention_heads" not in med_config:
        raise ValueError(f"{_MED_CONFIG} has to give `num_attention_heads` but has only {sorted(med_config)}")
    if med_config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{_MED_CONFIG}: `hidden_act` has to be 'gelu' but is {med_config['hidden_act']!r}")
    width, _, patch_size, _ = state_dict["vision_model.embeddings.patch_embedding.weight"].shape
    patches = state_dict["vision_model.embeddings.position_embedding"].shape[1] - 1
    vocab_size, text_width = state_dict["text_model.embeddings.word_embeddings.weight"].shape
    return {
        "vision_hidden_size": width,
        "vision_layers": _count_layers(state_dict, "vision_model.encoder.layers."),
        "vision_heads": max(1, width // 64),
        "vision_intermediate": state_dict["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "image_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "text_hidden_size": text_width,
        "text_layers": _count_layers(state_dict, "text_model.encoder.layer."),
        "text_heads": med_config["num_attention_heads"],
        "text_intermediate": state_dict["text_model.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "vocab_size": vocab_size,
        "max_positions": state_dict["text_model.embeddings.position_embeddings.weight"].shape[0],
        "text_dropout": med_config.get("hidden_dropout_prob", 0.1),
        "text_layer_norm_eps": med_config.get("layer_norm_eps", 1e-12),
    }


def require_same_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str = "the checkpoint"
) -> None:
    """Raise a ValueError with every difference unless both have the same names and shapes."""
    misshapen = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected or misshapen:
        raise ValueError(describe_mismatch(source, missing, unexpected, misshapen))


def describe_mismatch(
    source: str,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    misshapen: Iterable[str] = (),
) -> str:
    """Return the error message for a checkpoint of another model; layers are folded to `layer.{0-11}.name`."""
    kinds = {"missing": list(missing), "unexpected": list(unexpected), "misshapen": list(misshapen)}
    found = [f"{kind} ({len(names)}): {_shorten(names)}" for kind, names in kinds.items() if names]
    return f"{source} is not a checkpoint of this face scorer: {'; '.join(found)}"


def _shorten(names: list[str]) -> str:
    folded = _fold_layers(names)
    shown = ", ".join(folded[:_NAMES_SHOWN])
    return shown if len(folded) <= _NAMES_SHOWN else f"{shown} and {len(folded) - _NAMES_SHOWN} more"


def _fold_layers(names: list[str]) -> list[str]:
    """Join names that differ only in their first number: `a.{0,2-5}.b`."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        layer = _LAYER.search(name)
        numbers.setdefault(_LAYER.sub("{}", name, count=1), []).append(int(layer[0]) if layer else 0)
    return [name.replace("{}", _ranges(own), 1) for name, own in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """7 -> 7; 0, 2, 3, 4 -> {0,2-4}."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"


def _rename(name: str, starts: Iterable[tuple[str, str]], vision_parts: Iterable[tuple[str, str]]) -> str:
    old, new = next((old, new) for old, new in starts if name.startswith(old))
    rest = name.removeprefix(old)
    if "vision_model.encoder.layers." in (old, new):
        for part, replacement in vision_parts:
            rest = rest.replace(part, replacement)
    return new + rest


def _starts_with_any(name: str, starts: Iterable[str]) -> bool:
    return any(name.startswith(start) for start in starts)


def _count_layers(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Return the largest layer number plus one; a gap in the numbers shows up as missing keys later."""
    numbers = [int(n) for name in state_dict for n in re.findall(re.escape(prefix) + r"(\d+)\.", name)]
    return max(numbers) + 1


# the tensors whose shapes show the sizes -> their number of dimensions
_SIZED = {
    "vision_model.embeddings.patch_embedding.weight": 4,
    "vision_model.embeddings.position_embedding": 3,
    "vision_model.encoder.layers.0.mlp.fc1.weight": 2,
    "text_model.embeddings.word_embeddings.weight": 2,
    "text_model.embeddings.position_embeddings.weight": 2,
    "text_model.encoder.layer.0.intermediate.dense.weight": 2,
}


def _require_shapes(state_dict: Mapping[str, Tensor], source: str) -> None:
    missing = [name for name in _SIZED if name not in state_dict]
    if missing:
        raise ValueError(describe_mismatch(source, missing))
    misshapen = [
        f"{name} has {state_dict[name].ndim} dimensions instead of {dimensions}"
        for name, dimensions in _SIZED.items()
        if state_dict[name].ndim != dimensions
    ]
    if misshapen:
        raise ValueError(describe_mismatch(source, misshapen=misshapen))


def _require_tensors(state_dict: object, path: Path) -> None:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{path} has to hold a mapping from names to tensors, not {type(state_dict).__name__}")
    strange = [str(name) for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{path} has to hold a mapping from names to tensors, but these are none: {_shorten(strange)}")
