"""Base models: what one is, by its configs alone; whether a method can use it; how it is loaded.

A folder, a single `.safetensors` file and a hub id go through the same functions. `require_base` reads no weights, so a
base that a method cannot use is refused before any work.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from faceprior.models import as_safetensors, first_line, load_part, require_weights, resolve_model, weights_variant

logger = logging.getLogger(__name__)
SD1, SD2, SDXL, REFINER = "Stable Diffusion 1", "Stable Diffusion 2", "SDXL", "SDXL refiner"
# Method -> (what a refused base cannot do, the architectures that the method takes).
METHODS = {
    "inpaint": ("inpaint faces", (SD1, SD2, SDXL)),
    "tune": ("be tuned with the guidance loss", (SD1, SD2, SDXL)),
    "prior": ("be tuned into a portrait prior", (SDXL,)),
    "restore": ("be the prior of a restorer", (SDXL,)),
}
_VAE_HINT = "name one with `--vae`, such as stabilityai/sd-vae-ft-mse for Stable Diffusion 1.5"


# ---- what a base is


@dataclass(frozen=True)
class BaseInfo:
    """What a base is.

    architecture: SD1, SD2, SDXL, REFINER, or the name of another. prediction_type: what its network predicts. noise:
    its noise schedule, `ddpm`, `zero_snr` (DDPM up to pure noise), `flow`, or the class of another scheduler.
    in_channels, out_channels: of the U-Net; latent_channels: of the VAE, 0 without one. sample_size: side of the
    latents that the U-Net is meant for, None if its config does not say. text_encoders: their classes.
    cross_attention_dim: width of the prompt embeddings that the U-Net reads; text_width: of those that the text
    encoders give, 0 if unknown. has_latent_statistics: whether the VAE's config has `latents_mean`. variant: of the
    weights, such as fp16, where a part has no others; empty: none.
    """

    name: str
    architecture: str
    prediction_type: str
    noise: str
    in_channels: int
    out_channels: int
    latent_channels: int
    sample_size: int | None
    text_encoders: tuple[str, ...]
    cross_attention_dim: int | None
    text_width: int
    has_latent_statistics: bool = False
    variant: str = ""

    def __str__(self) -> str:
        noise = {"ddpm": "DDPM noise", "zero_snr": "DDPM noise to zero SNR", "flow": "flow matching"}
        facts = [self.architecture, self.prediction_type, noise.get(self.noise, self.noise)]
        facts += [f"{self.in_channels} channels", *([f"{self.variant} weights"] if self.variant else [])]
        return f"{self.name}: {', '.join(facts)}"


class _Part(NamedTuple):
    """A part of a pipeline without its weights: the name of its class, and its config."""

    class_name: str
    config: dict[str, Any]


def describe_base(
    base: str | Path | DiffusionPipeline, vae: str | None = None, prediction_type: str = "auto"
) -> BaseInfo:
    """Describe a base by its configs; arguments and errors as those of `load_pipeline`, or a pipeline."""
    variant = ""
    if isinstance(base, DiffusionPipeline):
        name, parts = base.name_or_path or type(base).__name__, _parts_of_pipeline(base)
    elif (path := Path(base).expanduser()).is_file():
        name, parts = str(base), _parts_of_file(path)
    else:
        folder = find_folder(base, vae)
        name, parts = str(base), _parts_of_folder(folder, replaced=("vae",) if vae else ())
        variants = (weights_variant(folder / part) for part in parts)
        variant = next((v for v in variants if v), "")
    if vae:
        parts["vae"] = _Part("AutoencoderKL", _read_json(resolve_model(vae, "VAE", _VAE_HINT) / "config.json"))
    return _describe(name, parts, prediction_type, variant)


def _describe(name: str, parts: dict[str, _Part], prediction_type: str, variant: str) -> BaseInfo:
    unet, vae = (parts[part].config if part in parts else {} for part in ("unet", "vae"))
    scheduler = parts.get("scheduler", _Part("no scheduler", {}))
    encoders = {part: parts[part] for part in ("text_encoder", "text_encoder_2", "text_encoder_3") if part in parts}
    noise = _noise(scheduler)
    if prediction_type == "auto":
        prediction_type = scheduler.config.get("prediction_type", "flow_prediction" if noise == "flow" else "epsilon")
    width, size = unet.get("cross_attention_dim", 1280), unet.get("sample_size")
    return BaseInfo(
        name=name,
        architecture=_architecture(parts),
        prediction_type=prediction_type,
        noise=noise,
        in_channels=unet.get("in_channels", 4),
        out_channels=unet.get("out_channels", 4),
        latent_channels=vae.get("latent_channels", 4) if "vae" in parts else 0,
        sample_size=size if isinstance(size, int) else None,
        text_encoders=tuple(part.class_name for part in encoders.values()),
        cross_attention_dim=width if isinstance(width, int) else None,
        text_width=sum(part.config.get("hidden_size", 0) for part in encoders.values()),
        has_latent_statistics=vae.get("latents_mean") is not None,
        variant=variant,
    )


def _architecture(parts: dict[str, _Part]) -> str:
    network = parts.get("unet") or parts.get("transformer") or _Part("pipeline without U-Net", {})
    if network.class_name != "UNet2DConditionModel":
        known = {"SD3Transformer2DModel": "Stable Diffusion 3", "FluxTransformer2DModel": "FLUX"}
        return known.get(network.class_name, network.class_name)
    if "text_encoder_2" in parts:
        return SDXL if "text_encoder" in parts else REFINER
    return SD2 if network.config.get("cross_attention_dim") == 1024 else SD1


def _noise(scheduler: _Part) -> str:
    if "FlowMatch" in scheduler.class_name or scheduler.config.get("prediction_type") == "flow_prediction":
        return "flow"
    if not _BETAS & scheduler.config.keys():
        return scheduler.class_name
    return "zero_snr" if scheduler.config.get("rescale_betas_zero_snr") else "ddpm"


# One of these is in the config of every scheduler of DDPM's noise, and in none of EDM's.
_BETAS = {"beta_schedule", "beta_start", "trained_betas"}


def _parts_of_pipeline(pipeline: DiffusionPipeline) -> dict[str, _Part]:
    found = {name: part for name, part in pipeline.components.items() if hasattr(part, "config")}
    configs = {n: p.config.to_dict() if hasattr(p.config, "to_dict") else dict(p.config) for n, p in found.items()}
    return {name: _Part(type(part).__name__, configs[name]) for name, part in found.items()}


def _parts_of_folder(folder: Path, replaced: tuple[str, ...] = ()) -> dict[str, _Part]:
    """Return the parts that a folder's model_index.json names, without those that are replaced."""
    try:
        index = _read_json(folder / "model_index.json")
        named = {n: value for n, value in index.items() if isinstance(value, list) and value[0] and n[0] != "_"}
        named = {n: value for n, value in named.items() if n not in ("safety_checker", *replaced)}
        if missing := [name for name in named if not (folder / name).is_dir()]:
            raise ValueError(f"its model_index.json names {', '.join(missing)}, but there is no such folder")
        parts = {}
        for name, (_, class_name) in named.items():
            file = next((f for f in ("config.json", "scheduler_config.json") if (folder / name / f).is_file()), None)
            parts[name] = _Part(class_name, _read_json(folder / name / file) if file else {})
    except ValueError as error:
        raise ValueError(f"the pipeline in {folder} is damaged: {first_line(error)}") from error
    return parts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a valid JSON file") from error


# ---- single files


class _Tensors(NamedTuple):
    """The names and shapes of a file's tensors, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.shapes)

    def size(self, end: str, axis: int, default: int) -> int:
        """Return the size along `axis` of the first tensor whose name ends with `end`."""
        return next((shape[axis] for name, shape in self.shapes.items() if name.endswith(end)), default)


def _read_tensors(path: Path) -> _Tensors:
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} has to be a .safetensors file: a pickle can run code and is not loaded")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return _Tensors(shapes, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _parts_of_file(path: Path) -> dict[str, _Part]:
    """Return the parts of a checkpoint in the original layout, by its tensors and the configs beside it."""
    tensors = _read_tensors(path)
    _require_network(path, tensors)
    parts = _parts_of_folder(path.parent) if (path.parent / "model_index.json").is_file() else {}
    config = parts["unet"].config if "unet" in parts else {}

    # ---- the U-Net and the VAE; the file's tensors overrule the configs beside it
    start = "model.diffusion_model."
    sizes = {
        "in_channels": tensors.size(f"{start}input_blocks.0.0.weight", 1, 4),
        "out_channels": tensors.size(f"{start}out.2.weight", 0, 4),
        "cross_attention_dim": tensors.size("attn2.to_k.weight", 1, 0),
    }
    parts["unet"] = _Part("UNet2DConditionModel", {**config, **sizes})
    parts.pop("vae", None)
    if tensors.has("first_stage_model."):
        channels = tensors.size("first_stage_model.decoder.conv_in.weight", 1, 4)
        parts["vae"] = _Part("AutoencoderKL", {"latent_channels": channels})

    # ---- the text encoders
    for name, starts in _TEXT_ENCODERS.items():
        parts.pop(name, None)
        if start := next((start for start in starts if tensors.has(start)), None):
            ends = ("token_embedding.weight",)
            widths = [shape[1] for n, shape in tensors.shapes.items() if n.startswith(start) and n.endswith(ends)]
            parts[name] = _Part("CLIPTextModel", {"hidden_size": widths[0] if widths else 0})

    # ---- the scheduler
    scheduler = parts.get("scheduler", _Part("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}))
    if tensors.has("edm_mean"):
        scheduler = _Part("EDMDPMSolverMultistepScheduler", {})
    else:
        guess = {} if scheduler.config.get("prediction_type") else {"prediction_type": _guess(sizes)}
        scheduler = _Part(scheduler.class_name, {**scheduler.config, **guess, **_marks(tensors)})
    return {**parts, "scheduler": scheduler}


# How the names of the text encoders' tensors start: Stable Diffusion 1 and 2, SDXL; the second of SDXL, its refiner.
_TEXT_ENCODERS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model."),
}


def _require_network(path: Path, tensors: _Tensors) -> None:
    """Raise ValueError for a file without the U-Net of a whole checkpoint."""
    for block, architecture in (("joint_blocks.", "Stable Diffusion 3"), ("double_blocks.", "FLUX")):
        if any(block in name for name in tensors.shapes):
            raise ValueError(
                f"{path} is a {architecture} checkpoint without a U-Net: give one of Stable Diffusion 1, 2 or SDXL"
            )
    if not tensors.has("model.diffusion_model."):
        raise ValueError(
            f"{path} has no U-Net (`model.diffusion_model`): a whole checkpoint is needed, not a LoRA or a VAE alone"
        )


def _marks(tensors: _Tensors) -> dict[str, Any]:
    """Return the scheduler's settings that a checkpoint states: by its tensors, or by the metadata of its trainer."""
    marks: dict[str, Any] = {}
    if tensors.has("v_pred") or tensors.metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        marks["prediction_type"] = "v_prediction"
    if tensors.has("ztsnr"):
        marks |= _ZERO_SNR
    return marks


_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def _guess(sizes: dict[str, int]) -> str:
    """Return what diffusers takes a file without marks for: Stable Diffusion 2 is published with both."""
    return "v_prediction" if sizes["cross_attention_dim"] == 1024 else "epsilon"


# ---- what a method needs


def require_base(
    base: str | Path | DiffusionPipeline, method: str, vae: str | None = None, prediction_type: str = "auto"
) -> BaseInfo:
    """Describe a base, as `describe_base`; ValueError in one sentence if `method`, a key of METHODS, cannot use it."""
    info = describe_base(base, vae, prediction_type)
    if problem := _problem(info, method):
        raise ValueError(f"the base {info.name} cannot {METHODS[method][0]}: {problem}")
    if not isinstance(base, DiffusionPipeline):  # else it was described when it was loaded
        logger.info("base %s", info)
    return info


def _problem(info: BaseInfo, method: str) -> str | None:
    """Return why `method` cannot use a base, with the way out; None if it can."""
    # ---- the architecture
    taken = METHODS[method][1]
    if info.architecture == REFINER:
        return "it is SDXL's refiner, without the first text encoder: give the SDXL base itself"
    if info.architecture not in taken:
        return f"it has to be of {' or '.join(taken)} type but is {info.architecture}"

    # ---- the parts
    if not info.latent_channels:
        return f"it has no VAE: {_VAE_HINT}"
    if not info.text_encoders or not all(name.startswith("CLIPText") for name in info.text_encoders):
        found = ", ".join(info.text_encoders) or "none"
        return f"its text encoder has to be CLIP's but is {found}: give a whole checkpoint, with its text encoder"
    if info.cross_attention_dim and info.text_width and info.cross_attention_dim != info.text_width:
        return (
            f"its U-Net reads prompts of {info.cross_attention_dim} features, and its text encoders give "
            f"{info.text_width}: give a base whose parts belong together"
        )

    if info.has_latent_statistics and info.architecture != SDXL:
        return f"its VAE has `latents_mean`, which diffusers applies for SDXL only: {_VAE_HINT}"

    # ---- the channels
    inpaints = method == "inpaint" and info.in_channels == 2 * info.latent_channels + 1
    if info.in_channels != info.latent_channels and not inpaints:
        return (
            f"its U-Net has {info.in_channels} input channels (9: for inpainting, 8: image-to-image, 7: upscaling), "
            f"and the latents have {info.latent_channels}: give the text-to-image checkpoint of its kind"
        )
    if info.out_channels != info.latent_channels:
        return f"its U-Net has {info.out_channels} output channels, and the latents have {info.latent_channels}"

    # ---- the noise
    if info.noise not in ("ddpm", "zero_snr"):
        return f"its noise is not DDPM's but of another kind ({info.noise}), which is not supported: give another base"
    if info.noise == "zero_snr" and info.prediction_type == "epsilon":
        return (
            "its last timestep is pure noise (zero terminal SNR), where epsilon says nothing of the image: "
            "give `--prediction_type v_prediction` if it was trained so"
        )
    return None


# ---- loading

# It weighs 1.2 GB and blanks images: research scripts load without it.
_NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}
# What diffusers and transformers raise for missing, truncated and foreign files.
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError)
_TEXT_TO_IMAGE = {
    SD1: StableDiffusionPipeline,
    SD2: StableDiffusionPipeline,
    SDXL: StableDiffusionXLPipeline,
    REFINER: StableDiffusionXLPipeline,
}


def load_pipeline(
    base: str | Path, dtype: torch.dtype = torch.float32, vae: str | None = None, prediction_type: str = "auto"
) -> DiffusionPipeline:
    """Load a text-to-image pipeline from a diffusers folder, a single `.safetensors` file or a hub id.

    A single file holds weights only: its configs are taken from `model_index.json` and its sub-folders beside the file
    if they exist, else from the hub. `vae`: folder or hub id of a VAE that replaces the base's own (Realistic Vision is
    published without one). prediction_type: `epsilon` or `v_prediction` where the files do not say which, or wrongly;
    `auto` takes what they say. Whatever class a folder names, Stable Diffusion and SDXL are loaded as text-to-image.
    Models arrive on the CPU, in `dtype`, the VAE in float32 (SDXL's overflows in float16); the safety checker is not
    loaded.

    Raises FileNotFoundError if there is no such model on disk or on the hub, ValueError if its files are damaged or of
    another kind.
    """
    if prediction_type not in ("auto", "epsilon", "v_prediction"):
        raise ValueError(f"`prediction_type` has to be auto, epsilon or v_prediction but is {prediction_type!r}")
    parts = {"vae": load_part(AutoencoderKL, vae, "VAE")} if vae else {}
    path = Path(base).expanduser()
    if path.is_file():
        pipeline = _load_single_file(path, dtype, parts, prediction_type)
    else:
        pipeline = _load_folder(find_folder(base, vae), dtype, parts)
    if prediction_type != "auto" and _BETAS & pipeline.scheduler.config.keys():
        _set_schedule(pipeline, {"prediction_type": prediction_type})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def find_folder(base: str | Path, vae: str | None = None) -> Path:
    """Return the folder of a base by its name; a hub id is downloaded."""
    return resolve_model(
        base,
        "base model",
        "`--base` takes a diffusers folder, a .safetensors file, a hub id or `tiny`",
        required=("model_index.json",),
        download=partial(_download, without_vae=bool(vae)),
    )


def _download(name: str, without_vae: bool, **options) -> str:
    """Download a pipeline, in half precision if there is nothing else."""
    options |= {**_NO_CHECKER, **({"vae": None} if without_vae else {})}
    folder = DiffusionPipeline.download(name, **options)
    parts = [config.parent for config in Path(folder).glob("*/config.json")]
    if any(weights_variant(part) is None and not (without_vae and part.name == "vae") for part in parts):
        folder = DiffusionPipeline.download(name, variant="fp16", **options)
    return folder


def _load_folder(path: Path, dtype: torch.dtype, parts: dict) -> DiffusionPipeline:
    described = _parts_of_folder(path, replaced=tuple(parts))
    pipeline_class = _TEXT_TO_IMAGE.get(_architecture(described), DiffusionPipeline)
    try:
        config = DiffusionPipeline.load_config(path)
        if "safety_checker" in config:
            parts = {**parts, **_NO_CHECKER}
        if "vae" not in parts and "vae" not in described:
            raise ValueError(f"it has no VAE: {_VAE_HINT}")

        # ---- parts that are there in a variant only
        for name, part in described.items():
            if weights_variant(path / name):
                part_class = getattr(importlib.import_module(config[name][0]), part.class_name)
                parts[name] = load_part(part_class, path / name, name, torch.float32 if name == "vae" else dtype)

        # ---- the others; not loaded in `dtype` and cast back: that would round the VAE's weights
        pipeline = pipeline_class.from_pretrained(path, dtype={"vae": torch.float32, "default": dtype}, **parts)
        _require_complete(path, pipeline)
    except _LOADING_ERRORS as error:
        raise ValueError(f"the pipeline in {path} is damaged: {first_line(error)}") from error
    return pipeline


def _require_complete(path: Path, pipeline: DiffusionPipeline) -> None:
    """Raise ValueError for what the libraries accept: models without some weights, tokenizers without words."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            require_weights(name, part)
        if "tokenizer" in name and part is not None and len(part) <= len(part.all_special_ids):
            raise ValueError(f"{path / name} has no vocabulary")


def _load_single_file(path: Path, dtype: torch.dtype, parts: dict, prediction_type: str) -> DiffusionPipeline:
    # ---- what the file holds, by the names of its tensors
    tensors, found = _read_tensors(path), _parts_of_file(path)
    architecture = _architecture(found)
    if tensors.has("edm_mean"):
        raise ValueError(f"{path} has EDM noise (`edm_mean`), which is not supported: give a base with DDPM noise")
    if architecture == REFINER:
        raise ValueError(f"{path} is SDXL's refiner, without the first text encoder: give the SDXL base itself")
    if "vae" not in {**found, **parts}:
        raise ValueError(f"{path} has no VAE (`first_stage_model`): {_VAE_HINT}")
    if "text_encoder" not in found:
        raise ValueError(
            f"{path} has no text encoder (`cond_stage_model`, `conditioner`): give the whole checkpoint, or a "
            "diffusers folder, whose text_encoder/ holds it"
        )
    pipeline_class = _TEXT_TO_IMAGE[architecture]
    parts = {**parts, **({} if architecture == SDXL else _NO_CHECKER)}

    # ---- the weights, with the configs beside the file or from the hub
    config = str(path.parent) if (path.parent / "model_index.json").is_file() else None
    try:
        with as_safetensors(path) as file:
            pipeline = pipeline_class.from_single_file(str(file), config=config, dtype=torch.float32, **parts)
        _require_complete(path.parent, pipeline)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{path} has weights only, and the hub did not provide the configs that belong to them: connect once, or "
            "put the file into a diffusers folder of the same architecture, beside its model_index.json"
        ) from error
    except _LOADING_ERRORS as error:
        raise ValueError(
            f"{path} does not fit {config or 'the architecture that its tensors show'}: {first_line(error)}"
        ) from error

    # ---- what it predicts: the file's marks, else the configs', which nobody has stated if they come from the hub
    if marks := _marks(tensors):
        _set_schedule(pipeline, marks)
    elif architecture == SD2 and not config and prediction_type == "auto":
        guess = pipeline.scheduler.config.get("prediction_type", "epsilon")
        logger.warning("%s does not say what it predicts: %s is a guess, `--prediction_type` states it", path, guess)

    # ---- `dtype` for all but the VAE
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            part.to(dtype)
    return pipeline


def _set_schedule(pipeline: DiffusionPipeline, settings: dict[str, Any]) -> None:
    """Change settings of the pipeline's scheduler; one that cannot end at zero SNR is replaced by DDIM."""
    scheduler = pipeline.scheduler
    scheduler_class = type(scheduler)
    if not settings.keys() <= inspect.signature(scheduler_class).parameters.keys():
        scheduler_class, settings = DDIMScheduler, {**settings, "clip_sample": False}
    pipeline.scheduler = scheduler_class.from_config(scheduler.config, **settings)
