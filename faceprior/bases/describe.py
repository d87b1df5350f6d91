"""What a base is, by its configs alone, and whether a method can use it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from faceprior.bases.folder import find_folder
from faceprior.bases.parts import (
    REFINER,
    SD1,
    SD2,
    SDXL,
    VAE_HINT,
    Part,
    architecture_of,
    noise_of,
    parts_of_folder,
    parts_of_pipeline,
    read_json,
)
from faceprior.bases.single_file import parts_of_file
from faceprior.models import resolve_model, weights_variant

logger = logging.getLogger(__name__)
# Method -> (what a refused base cannot do, the architectures that the method takes).
METHODS = {
    "inpaint": ("inpaint faces", (SD1, SD2, SDXL)),
    "tune": ("be tuned with the guidance loss", (SD1, SD2, SDXL)),
    "prior": ("be tuned into a portrait prior", (SDXL,)),
    "restore": ("be the prior of a restorer", (SDXL,)),
}


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


def describe_base(
    base: str | Path | DiffusionPipeline, vae: str | None = None, prediction_type: str = "auto"
) -> BaseInfo:
    """Describe a base by its configs; arguments and errors as those of `load_pipeline`, or a pipeline."""
    variant = ""
    if isinstance(base, DiffusionPipeline):
        name, parts = base.name_or_path or type(base).__name__, parts_of_pipeline(base)
    elif (path := Path(base).expanduser()).is_file():
        name, parts = str(base), parts_of_file(path, prediction_type)
    else:
        folder = find_folder(base, vae)
        name, parts = str(base), parts_of_folder(folder, replaced=("vae",) if vae else ())
        variants = (weights_variant(folder / part) for part in parts)
        variant = next((v for v in variants if v), "")
    if vae:
        parts["vae"] = Part("AutoencoderKL", read_json(resolve_model(vae, "VAE", VAE_HINT) / "config.json"))
    return _describe(name, parts, prediction_type, variant)


def _describe(name: str, parts: dict[str, Part], prediction_type: str, variant: str) -> BaseInfo:
    unet, vae = (parts[part].config if part in parts else {} for part in ("unet", "vae"))
    scheduler = parts.get("scheduler", Part("no scheduler", {}))
    encoders = {part: parts[part] for part in ("text_encoder", "text_encoder_2", "text_encoder_3") if part in parts}
    noise = noise_of(scheduler)
    if prediction_type == "auto":
        prediction_type = scheduler.config.get("prediction_type", "flow_prediction" if noise == "flow" else "epsilon")
    width, size = unet.get("cross_attention_dim", 1280), unet.get("sample_size")
    return BaseInfo(
        name=name,
        architecture=architecture_of(parts),
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
        return f"it has no VAE: {VAE_HINT}"
    if not info.text_encoders or not all(name.startswith("CLIPText") for name in info.text_encoders):
        found = ", ".join(info.text_encoders) or "none"
        return f"its text encoder has to be CLIP's but is {found}: give a whole checkpoint, with its text encoder"
    if info.cross_attention_dim and info.text_width and info.cross_attention_dim != info.text_width:
        return (
            f"its U-Net reads prompts of {info.cross_attention_dim} features, and its text encoders give "
            f"{info.text_width}: give a base whose parts belong together"
        )

    if info.has_latent_statistics and info.architecture != SDXL:
        return f"its VAE has `latents_mean`, which diffusers applies for SDXL only: {VAE_HINT}"

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
