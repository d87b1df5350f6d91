"""Single `.safetensors` files: what one holds, by the names of its tensors, and its loading without a hub.

A file holds weights only. Its configs are those of the diffusers folder that it lies in, else the package's own
(`configs/`: Stable Diffusion 1.5 and 2.1, SDXL), to which the vocabulary of CLIP's tokenizers belongs.
"""

from __future__ import annotations

import gzip
import inspect
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from faceprior.bases.parts import (
    LOADING_ERRORS,
    SD2,
    TEXT_TO_IMAGE,
    VAE_HINT,
    Part,
    architecture_of,
    left_out,
    parts_of_folder,
    read_json,
    require_complete,
)
from faceprior.models import first_line, load_part, weights_variant

logger = logging.getLogger(__name__)
CONFIGS = Path(__file__).with_name("configs")
# Width of the prompts that a U-Net reads -> the folder of its architecture in CONFIGS.
_ARCHITECTURES = {768: "sd15", 1024: "sd21", 2048: "sdxl"}

_UNET = "model.diffusion_model."
# Part -> how the names of its tensors start, and a tensor that tells; the original layouts come before diffusers' own.
_LAYOUTS = {
    "unet": ((_UNET, "input_blocks.0.0.weight"), ("unet.", "conv_out.weight"), ("", "conv_out.weight")),
    "vae": (("first_stage_model.", "decoder.conv_in.weight"), ("vae.", "decoder.conv_in.weight")),
    "text_encoder": (
        ("cond_stage_model.transformer.", "text_model.embeddings.token_embedding.weight"),
        ("cond_stage_model.transformer.", "embeddings.token_embedding.weight"),  # as transformers 4.0 wrote it
        ("cond_stage_model.model.", "token_embedding.weight"),
        ("conditioner.embedders.0.transformer.", "text_model.embeddings.token_embedding.weight"),
        ("text_encoder.", "text_model.embeddings.token_embedding.weight"),
    ),
    "text_encoder_2": (
        ("conditioner.embedders.1.model.", "token_embedding.weight"),
        ("text_encoder_2.", "text_model.embeddings.token_embedding.weight"),
    ),
}
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_LENDER = "put it into the diffusers folder of a base of its architecture, beside the model_index.json"


# ---- what a file holds


class _Tensors(NamedTuple):
    """The names and shapes of a file's tensors, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.shapes)

    def layout(self, part: str) -> tuple[str, str] | None:
        """Return the entry of _LAYOUTS that the names of a part's tensors follow, None if the part is not there."""
        return next((layout for layout in _LAYOUTS[part] if "".join(layout) in self.shapes), None)

    def size(self, end: str, axis: int, default: int) -> int:
        """Return the size along `axis` of the first tensor whose name ends with `end`."""
        return next((shape[axis] for name, shape in self.shapes.items() if name.endswith(end)), default)


def _read_tensors(path: Path) -> _Tensors:
    """Read the header of a checkpoint; ValueError if it is none, or one of a kind that is not loaded from one file."""
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} has to be a .safetensors file: a pickle can run code and is not loaded")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            tensors = _Tensors(shapes, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error

    for block, architecture in (("joint_blocks.", "Stable Diffusion 3"), ("double_blocks.", "FLUX")):
        if any(block in name for name in tensors.shapes):
            raise ValueError(
                f"{path} is a {architecture} checkpoint: give its diffusers folder or hub id; one file can be of "
                "Stable Diffusion 1, 2 or SDXL"
            )
    if tensors.layout("unet") is None:
        raise ValueError(f"{path} has no U-Net (`{_UNET}`): a whole checkpoint is needed, not a LoRA or a VAE alone")
    if tensors.has("edm_mean"):
        raise ValueError(f"{path} has EDM noise (`edm_mean`), which is not supported: give a base with DDPM noise")
    if tensors.has("conditioner.embedders.0.model."):
        raise ValueError(f"{path} is SDXL's refiner, without the first text encoder: give the SDXL base itself")
    return tensors


def _find_configs(path: Path, tensors: _Tensors) -> Path:
    """Return the folder of the configs that belong to a checkpoint."""
    if (path.parent / "model_index.json").is_file():
        return path.parent
    width = tensors.size("attn2.to_k.weight", 1, 0)
    if width not in _ARCHITECTURES:
        raise ValueError(
            f"{path} has a U-Net that reads prompts of {width} features, not Stable Diffusion 1's 768, 2's 1024 or "
            f"SDXL's 2048: {_LENDER}"
        )
    return CONFIGS / _ARCHITECTURES[width]


def configs_of_file(path: Path) -> Path:
    """Return the folder of the configs that belong to a checkpoint: the one that it lies in, or one of CONFIGS."""
    return _find_configs(path, _read_tensors(path))


def parts_of_file(path: Path, prediction_type: str = "auto") -> dict[str, Part]:
    """Return the parts of a checkpoint: its configs, overruled by the sizes of its tensors.

    A part that the file lacks is there if the folder that the file lies in has its weights; a VAE may be missing.

    Raises ValueError for a file that is no checkpoint, of another kind, or without a text encoder.
    """
    tensors = _read_tensors(path)
    folder = _find_configs(path, tensors)
    parts = parts_of_folder(folder)

    # ---- the parts that are neither in the file nor beside it
    absent = [name for name in _LAYOUTS if tensors.layout(name) is None and weights_variant(folder / name) is None]
    for name in absent:
        if parts.pop(name, None) and name != "vae":
            raise ValueError(
                f"{path} has no text encoder (`{name}`; in one file `cond_stage_model` or `conditioner`): give the "
                f"whole checkpoint, or {_LENDER}, which lends its own"
            )

    # ---- the sizes
    marks = _marks(tensors)
    for name in _LAYOUTS:
        if layout := tensors.layout(name):
            class_name, config = parts.get(name, Part(_CLASSES.get(name, "CLIPTextModel"), {}))
            parts[name] = Part(class_name, {**config, **_sizes(name, tensors, *layout)})
    scheduler = parts.get("scheduler", Part("no scheduler", {}))
    parts["scheduler"] = Part(scheduler.class_name, {**scheduler.config, **marks})
    stated = marks.get("prediction_type") if prediction_type == "auto" else prediction_type
    if folder.name == "sd21" and folder.parent == CONFIGS and stated == "epsilon":
        parts["unet"].config["sample_size"] = 64  # the base of 512 pixels; what predicts v has 768
    return parts


def _sizes(part: str, tensors: _Tensors, start: str, first: str) -> dict[str, int]:
    """Return what the shapes of a part's tensors say of its config."""
    if part == "unet":
        entry, end = (first, "out.2.weight") if start == _UNET else ("conv_in.weight", first)
        return {
            "in_channels": tensors.shapes[start + entry][1],
            "out_channels": tensors.shapes.get(start + end, (4,))[0],
            "cross_attention_dim": tensors.size("attn2.to_k.weight", 1, 0),
        }
    return {"latent_channels" if part == "vae" else "hidden_size": tensors.shapes[start + first][1]}


def _marks(tensors: _Tensors) -> dict[str, Any]:
    """Return the scheduler's settings that a checkpoint states: by its tensors, or by the metadata of its trainer."""
    marks: dict[str, Any] = {}
    stated = tensors.metadata.get("modelspec.prediction_type")
    if tensors.has("v_pred") or stated in ("v", "v_prediction"):
        marks["prediction_type"] = "v_prediction"
    elif stated == "epsilon" or _sizes("unet", tensors, *tensors.layout("unet"))["in_channels"] == 9:
        marks["prediction_type"] = "epsilon"  # as all inpainting models do, Stable Diffusion 2's too
    if tensors.has("ztsnr"):
        marks |= _ZERO_SNR
    return marks


_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


# ---- loading


def load_single_file(path: Path, dtype: torch.dtype, parts: dict, prediction_type: str) -> DiffusionPipeline:
    """Load a checkpoint; `parts` are used in place of its own. Its weights are mapped and read once, in their dtype."""
    described = parts_of_file(path, prediction_type)
    tensors = _read_tensors(path)
    folder = _find_configs(path, tensors)
    if "vae" not in {**described, **parts}:
        raise ValueError(f"{path} has no VAE (`first_stage_model`): {VAE_HINT}")
    if tensors.has("model_ema.diffusion_model"):
        logger.info("%s holds averaged weights too (model_ema): the plain ones are used, to be trained on", path)

    # ---- the parts that are not given: from the file, or from the folder that it lies in
    parts, architecture, shipped = dict(parts), architecture_of(described), folder.parent == CONFIGS
    try:
        for name in [name for name in _LAYOUTS if name in described and name not in parts]:
            kept = torch.float32 if name == "vae" else dtype
            if tensors.layout(name):
                parts[name] = _load_part(path, tensors, name, described[name], kept)
            else:
                logger.info("%s: not in %s, taken from %s", name, path, folder)
                part_class = AutoencoderKL if name == "vae" else getattr(transformers, described[name].class_name)
                parts[name] = load_part(part_class, folder / name, name, kept)
        if shipped:
            for name in [name for name in described if name.startswith("tokenizer")]:
                parts[name] = make_tokenizer(folder / name)

        # ---- the pipeline, with the scheduler of the configs
        parts |= left_out(folder, described)
        pipeline = TEXT_TO_IMAGE[architecture].from_pretrained(folder, dtype=dtype, **parts)
        require_complete(path.parent, pipeline)
    except LOADING_ERRORS as error:
        kind, way_out = (architecture, f": {_LENDER}") if shipped else (folder, "")
        raise ValueError(f"{path} does not fit the configs of {kind}: {first_line(error)}{way_out}") from error
    pipeline.register_to_config(_name_or_path=str(path))

    # ---- what it predicts: the file's marks, else the configs', which nobody has stated if they are the package's
    marks = _marks(tensors)
    if marks:
        set_schedule(pipeline, marks)
    if shipped and architecture == SD2 and "prediction_type" not in marks and prediction_type == "auto":
        guess = pipeline.scheduler.config.prediction_type
        logger.warning("%s does not say what it predicts: %s is a guess, `--prediction_type` states it", path, guess)
    return pipeline


def _load_part(path: Path, tensors: _Tensors, name: str, part: Part, dtype: torch.dtype) -> torch.nn.Module:
    """Load one part from a checkpoint, on the CPU.

    ValueError if tensors are missing, of other shapes, or (of the U-Net) of no use.
    """
    # ---- the model without weights, and the weights by its names
    with init_empty_weights():
        if name in ("unet", "vae"):
            model = (UNet2DConditionModel if name == "unet" else AutoencoderKL).from_config(part.config)
        else:
            model_class = getattr(transformers, part.class_name)
            model = model_class(model_class.config_class(**part.config))
    start, _ = tensors.layout(name)
    with safe_open(path, "pt") as file:  # mapped: a tensor is read when it is used
        held = {key: file.get_tensor(key) for key in tensors.shapes if key.startswith(start)}
    state = _translate(name, held, start, model)

    # ---- nothing is missing, of another shape, or dropped
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"the weights of {name} lack {', '.join(missing[:3])} ({len(missing)} in all)")
    if other := next((key for key, shape in shapes.items() if state[key].shape != shape), None):
        raise ValueError(f"{other} of {name} has the shape {tuple(state[other].shape)}, not {tuple(shapes[other])}")
    used = {id(state[key]) for key in shapes}
    if name == "unet" and (idle := [key for key, tensor in held.items() if id(tensor) not in used]):
        raise ValueError(f"its U-Net has no place for {', '.join(idle[:3])} ({len(idle)} in all)")
    model.load_state_dict({key: state[key].to(dtype) for key in shapes}, assign=True)
    return model.eval()


def _translate(name: str, held: dict[str, torch.Tensor], start: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a part's tensors by the names of diffusers and transformers; `start`: how those in the file start."""
    inner = {key.removeprefix(start): tensor for key, tensor in held.items()}
    if name == "unet":
        return convert_ldm_unet_checkpoint(held, model.config) if start == _UNET else inner
    if name == "vae":
        own = "decoder.up_blocks.0.resnets.0.conv1.weight" in inner
        return inner if own else convert_ldm_vae_checkpoint(inner, model.config)

    # ---- text encoders: transformers has `text_model.` before the names where there is a projection, as older files do
    if "token_embedding.weight" in inner:
        inner = convert_open_clip_checkpoint(model, held, prefix=start)
    wrapper = "text_model." if hasattr(model, "text_model") else ""
    inner = {key.removeprefix("text_model."): tensor for key, tensor in inner.items()}
    return {key if key.startswith("text_projection.") else wrapper + key: tensor for key, tensor in inner.items()}


def set_schedule(pipeline: DiffusionPipeline, settings: dict[str, Any]) -> None:
    """Change settings of the pipeline's scheduler; one that cannot end at zero SNR is replaced by DDIM."""
    scheduler = pipeline.scheduler
    scheduler_class = type(scheduler)
    if not settings.keys() <= inspect.signature(scheduler_class).parameters.keys():
        scheduler_class, settings = DDIMScheduler, {**settings, "clip_sample": False}
    pipeline.scheduler = scheduler_class.from_config(scheduler.config, **settings)


# ---- CLIP's tokenizers


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Build a tokenizer of CLIP's vocabulary with the config in `folder`.

    OpenCLIP's pads with "!", id 0, as its training did; transformers then also reads every "!" of a prompt as this
    token, alike for the folders on the hub.
    """
    vocab, merges = _read_vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, **read_json(folder / "tokenizer_config.json"))


@cache
def _read_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's tokens with their ids, and the byte pairs that it merges, in this order.

    Tokens: 256 bytes, the same at the end of a word, one per merge, start and end of the text. The file holds more
    merges than CLIP uses, below a line that names them.
    """
    text = gzip.decompress((CONFIGS / "clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
    merges = [tuple(line.split()) for line in text.split("\n")[1 : _MERGES + 1]]
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


_MERGES = 49_408 - 2 * 256 - 2
