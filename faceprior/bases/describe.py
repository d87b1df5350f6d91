"""What a base is, by its configs alone, and whether a method can use it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from faceprior.bases.folder import find_folder
from faceprior.bases.parts import (
    FLUX,
    REFINER,
    SD1,
    SD2,
    SD3,
    SDXL,
    VAE_HINT,
    Part,
    architecture_of,
    class_problem,
    noise_of,
    parts_of_folder,
    parts_of_pipeline,
    pipeline_class_of_folder,
    read_json,
)
from faceprior.bases.single_file import parts_of_file
from faceprior.models import resolve_model, weights_variant

logger = logging.getLogger(__name__)
# Method -> (what a refused base cannot do, the architectures that the method takes).
METHODS = {
    "inpaint": ("inpaint faces", (SD1, SD2, SDXL)),
    "tune": ("be tuned with the guidance loss", (SD1, SD2, SDXL, SD3, FLUX)),
    "prior": ("be tuned into a portrait prior", (SDXL,)),
    "restore": ("be the prior of a restorer", (SDXL,)),
}
# Of transformers only a LoRA is trained: float32 copies and moments of FLUX's attention alone would take 40 GB.
TRANSFORMERS = (SD3, FLUX)


@dataclass(frozen=True)
class BaseInfo:
    """What a base is.

    architecture: SD1, SD2, SDXL, REFINER, SD3, FLUX, or the name of another. prediction_type: what its network
    predicts. noise: its noise schedule, `ddpm`, `zero_snr` (DDPM up to pure noise), `flow`, or the class of another
    scheduler. in_channels, out_channels: of the U-Net or transformer, as channels of latents: FLUX's tokens hold 2 x 2
    of them, so they have four times as many; latent_channels: of the VAE, 0 without one. sample_size: side of the
    latents that the network is meant for, None if its config does not say. text_encoders: their classes.
    cross_attention_dim: width of the prompt embeddings that the network reads; text_width: of those that the text
    encoders give, 0 if unknown. pooled_dim, pooled_width: likewise of a transformer's pooled embeddings, 0 for others.
    has_latent_statistics: whether the VAE's config has `latents_mean`. variant: of the weights, such as fp16, where a
    part has no others; empty: none. pipeline_class: its class by name, empty for a single file.
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
    pipeline_class: str = ""
    pooled_dim: int = 0
    pooled_width: int = 0

    def __str__(self) -> str:
        noise = {"ddpm": "DDPM noise", "zero_snr": "DDPM noise to zero SNR", "flow": "flow matching"}
        facts = [self.architecture, *([] if self.prediction_type == "flow_prediction" else [self.prediction_type])]
        facts += [noise.get(self.noise, self.noise), f"{self.in_channels} channels"]
        facts += ["without T5"] if self.architecture == SD3 and len(self.text_encoders) == 2 else []
        facts += [f"{self.variant} weights"] if self.variant else []
        return f"{self.name}: {', '.join(facts)}"

    def require(self, method: str, train: str | None = None) -> None:
        """Raise ValueError in one sentence if `method`, a key of METHODS, cannot use the base.

        train: what the method trains of it, as GuidanceTuner's, where it trains anything.
        """
        if problem := _problem(self, method, train):
            raise ValueError(f"the base {self.name} cannot {METHODS[method][0]}: {problem}")


def describe_base(
    base: str | Path | DiffusionPipeline, vae: str | None = None, prediction_type: str = "auto"
) -> BaseInfo:
    """Describe a base by its configs; arguments and errors as those of `load_pipeline`, or a pipeline."""
    variant = pipeline_class = ""
    if isinstance(base, DiffusionPipeline):
        name, parts = base.name_or_path or type(base).__name__, parts_of_pipeline(base)
        own = (cls.__name__ for cls in type(base).__mro__ if cls.__module__.startswith("diffusers."))
        pipeline_class = next(own, "")
    elif (path := Path(base).expanduser()).is_file():
        name, parts = str(base), parts_of_file(path, prediction_type)
    else:
        folder = find_folder(base, vae)
        name, parts = str(base), parts_of_folder(folder, replaced=("vae",) if vae else ())
        pipeline_class = pipeline_class_of_folder(folder)
        variants = (weights_variant(folder / part) for part in parts)
        variant = next((v for v in variants if v), "")
    if vae:
        parts["vae"] = Part("AutoencoderKL", read_json(resolve_model(vae, "VAE", VAE_HINT) / "config.json"))
    return _describe(name, parts, prediction_type, variant, pipeline_class)


def _describe(name: str, parts: dict[str, Part], prediction_type: str, variant: str, pipeline_class: str) -> BaseInfo:
    architecture = architecture_of(parts)
    vae = parts["vae"].config if "vae" in parts else {}
    scheduler = parts.get("scheduler", Part("no scheduler", {}))
    encoders = {part: parts[part] for part in ("text_encoder", "text_encoder_2", "text_encoder_3") if part in parts}
    noise = noise_of(scheduler)
    if prediction_type == "auto":
        flow = "flow_prediction" if noise == "flow" else "epsilon"
        prediction_type = scheduler.config.get("prediction_type") or flow
    read = _transformer_sizes if architecture in TRANSFORMERS else _unet_sizes
    sizes = read(parts.get("unet") or parts.get("transformer") or Part("", {}), encoders)
    size = sizes.pop("sample_size")
    return BaseInfo(
        name=name,
        architecture=architecture,
        prediction_type=prediction_type,
        noise=noise,
        latent_channels=vae.get("latent_channels", 4) if "vae" in parts else 0,
        sample_size=size if isinstance(size, int) else None,
        text_encoders=tuple(part.class_name for part in encoders.values()),
        has_latent_statistics=vae.get("latents_mean") is not None,
        variant=variant,
        pipeline_class=pipeline_class,
        **sizes,
    )


def _unet_sizes(network: Part, encoders: dict[str, Part]) -> dict[str, Any]:
    unet, width = network.config, network.config.get("cross_attention_dim", 1280)
    return {
        "in_channels": unet.get("in_channels", 4),
        "out_channels": unet.get("out_channels", 4),
        "sample_size": unet.get("sample_size"),
        "cross_attention_dim": width if isinstance(width, int) else None,
        "text_width": sum(part.config.get("hidden_size", 0) for part in encoders.values()),
    }


def _transformer_sizes(network: Part, encoders: dict[str, Part]) -> dict[str, Any]:
    """T5 gives the prompt embeddings, CLIP the pooled ones: both projected ones (SD3), or its pooler's (FLUX)."""
    config, flux = network.config, network.class_name == "FluxTransformer2DModel"
    in_channels = config.get("in_channels") or (64 if flux else 16)
    out_channels = config.get("out_channels") or in_channels
    clip = [part.config for part in encoders.values() if part.class_name.startswith("CLIPText")]
    t5 = [part.config for part in encoders.values() if part.class_name.startswith("T5")]
    pooled = [text.get("hidden_size" if flux else "projection_dim", 0) for text in clip]
    return {
        "in_channels": in_channels // 4 if flux else in_channels,
        "out_channels": out_channels // 4 if flux else out_channels,
        "sample_size": config.get("sample_size"),
        "cross_attention_dim": config.get("joint_attention_dim", 4096),
        "text_width": t5[0].get("d_model", 0) if t5 else 0,
        "pooled_dim": config.get("pooled_projection_dim", 768 if flux else 2048),
        "pooled_width": sum(pooled) if all(pooled) else 0,
    }


# ---- what a method needs


def require_base(
    base: str | Path | DiffusionPipeline,
    method: str,
    vae: str | None = None,
    prediction_type: str = "auto",
    train: str | None = None,
) -> BaseInfo:
    """Describe a base, as `describe_base`; ValueError if `method` cannot use it, as `BaseInfo.require`."""
    info = describe_base(base, vae, prediction_type)
    info.require(method, train)
    if not isinstance(base, DiffusionPipeline):  # else it was described when it was loaded
        logger.info("base %s", info)
    return info


def _problem(info: BaseInfo, method: str, train: str | None) -> str | None:
    """Return why `method` cannot use a base, with the way out; None if it can."""
    # ---- the architecture
    taken = METHODS[method][1]
    if info.architecture == REFINER:
        return "it is SDXL's refiner, without the first text encoder: give the SDXL base itself"
    if info.architecture not in taken:
        others = f"{', '.join(taken[:-1])} or " if len(taken) > 1 else ""
        return f"it has to be of {others}{taken[-1]} type but is {info.architecture}"
    if problem := class_problem(info.pipeline_class, info.architecture):
        return problem
    if info.architecture in TRANSFORMERS and train not in (None, "lora"):
        return f"`train` is {train}, and of a transformer only a LoRA is trained: give `--train lora`"

    # ---- the parts
    if not info.latent_channels:
        return f"it has no VAE: {VAE_HINT}"
    if info.has_latent_statistics and info.architecture != SDXL:
        return f"its VAE has `latents_mean`, which diffusers applies for SDXL only: {VAE_HINT}"
    return _text_problem(info) or _channel_problem(info, method) or _noise_problem(info)


def _text_problem(info: BaseInfo) -> str | None:
    families = ["CLIP" if n.startswith("CLIPText") else "T5" if n.startswith("T5") else n for n in info.text_encoders]
    wanted, fitting = {
        SD3: ("encoders have to be CLIP's twice and T5's, which may be missing,", ["CLIP", "CLIP", "T5"]),
        FLUX: ("encoders have to be CLIP's and T5's", ["CLIP", "T5"]),
    }.get(info.architecture, ("encoder has to be CLIP's", ["CLIP"] * max(1, len(families))))
    without_t5 = info.architecture == SD3 and families == ["CLIP", "CLIP"]
    if families != fitting and not without_t5:
        found, verb = ", ".join(info.text_encoders) or "none", "are" if "encoders" in wanted else "is"
        return f"its text {wanted} but {verb} {found}: give a whole checkpoint, with its text encoder"
    network = "transformer" if info.architecture in TRANSFORMERS else "U-Net"
    if info.cross_attention_dim and info.text_width and info.cross_attention_dim != info.text_width:
        return (
            f"its {network} reads prompts of {info.cross_attention_dim} features, and its text encoders give "
            f"{info.text_width}: give a base whose parts belong together"
        )
    if info.pooled_width and info.pooled_dim != info.pooled_width:
        return (
            f"its {network} reads pooled prompts of {info.pooled_dim} features, and its text encoders give "
            f"{info.pooled_width}: give a base whose parts belong together"
        )


def _channel_problem(info: BaseInfo, method: str) -> str | None:
    network, others = "U-Net", "9: for inpainting, 8: image-to-image, 7: upscaling"
    if info.architecture in TRANSFORMERS:
        network, others = "transformer", "of FLUX.1, 96: Fill, 32: Depth and Canny"
    inpaints = method == "inpaint" and info.in_channels == 2 * info.latent_channels + 1
    if info.in_channels != info.latent_channels and not inpaints:
        return (
            f"its {network} has {info.in_channels} input channels ({others}), and the latents have "
            f"{info.latent_channels}: give the text-to-image checkpoint of its kind"
        )
    if info.out_channels != info.latent_channels:
        return f"its {network} has {info.out_channels} output channels, and the latents have {info.latent_channels}"


def _noise_problem(info: BaseInfo) -> str | None:
    if info.architecture in TRANSFORMERS:
        if info.noise != "flow" or info.prediction_type != "flow_prediction":
            return (
                f"it is trained with flow matching, and its noise is given as {info.noise}, predicted by "
                f"{info.prediction_type}: give the base with its own scheduler, and leave `prediction_type` at auto"
            )
        return None
    if info.noise not in ("ddpm", "zero_snr"):
        return f"its noise is not DDPM's but of another kind ({info.noise}), which is not supported: give another base"
    if info.prediction_type not in ("epsilon", "v_prediction"):
        return (
            f"its scheduler's `prediction_type` is {info.prediction_type}, which no Stable Diffusion is trained with: "
            "give `--prediction_type` epsilon or v_prediction, whichever its network predicts"
        )
    if info.noise == "zero_snr" and info.prediction_type == "epsilon":
        return (
            "its last timestep is pure noise (zero terminal SNR), where epsilon says nothing of the image: "
            "give `--prediction_type v_prediction` if it was trained so"
        )
    return None
