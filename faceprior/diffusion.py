"""What the methods need of a base model, in the order of the data: prompt embeddings, latents, noise, prediction, x_0.

The U-Nets of Stable Diffusion 1, 2 and SDXL and the flow matching transformers of Stable Diffusion 3 and FLUX go
through the same functions: `encode_prompts`, `encode_latents`, `add_noise`, `predict`, `pred_original_sample`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5EncoderModel

from faceprior.images import to_pil
from faceprior.models import to_device

logger = logging.getLogger(__name__)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


# ---- the network


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    """Return the network that is trained: the pipeline's U-Net or transformer."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def networks_of(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """Return all networks of a pipeline: that which is trained, the VAE, the text encoders."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def is_flux(pipeline: DiffusionPipeline) -> bool:
    """Tell whether the pipeline is of FLUX.1 type, whose transformer takes latents as tokens and timesteps as s."""
    return isinstance(getattr(pipeline, "transformer", None), FluxTransformer2DModel)


def is_xl(pipeline: DiffusionPipeline) -> bool:
    """Tell whether the pipeline is of SDXL type: a U-Net with two text encoders."""
    return hasattr(pipeline, "unet") and getattr(pipeline, "text_encoder_2", None) is not None


def native_side(pipeline: DiffusionPipeline) -> int | None:
    """Return the size in pixels of the images that a base is meant for; None if its config does not say."""
    size = denoiser_of(pipeline).config.get("sample_size", getattr(pipeline, "default_sample_size", None))
    return size * pipeline.vae_scale_factor if isinstance(size, int) else None


def require_side(pipeline: DiffusionPipeline, side: int) -> None:
    """Raise ValueError where a base cannot make squares of `side` pixels: its VAE's factor, doubled by 2 x 2 tokens."""
    multiple = pipeline.vae_scale_factor * (1 if hasattr(pipeline, "unet") else 2)
    if side % multiple:
        raise ValueError(f"`resolution` has to be a multiple of {multiple} for this base but is {side}")


def report_small_side(pipeline: DiffusionPipeline, side: int) -> None:
    """Log it where `side`, in pixels, is less than half of the side that a base is meant for: it draws no faces there.

    Nothing is logged of a base whose config does not say its side.
    """
    native = native_side(pipeline) or 0
    if 2 * side < native:
        logger.warning(
            "`resolution` is %d, and this base is meant for %d pixels: its faces will be poor; give `--resolution %d`, "
            "or a preset of its kind",
            side,
            native,
            native,
        )


# ---- the training scheduler


def make_noise_scheduler(pipeline: DiffusionPipeline):
    """Return the training scheduler that belongs to the pipeline's own: DDPM with its betas and prediction type.

    For a flow matching pipeline it is FlowMatchEulerDiscreteScheduler with its shift: its 1000 timesteps are the noise
    levels s = shift u / (1 + (shift - 1) u) of u = 1/1000 ... 1, times 1000. Stable Diffusion 3 has shift 3, FLUX.1
    schnell 1. FLUX.1 dev shifts by the image's size as it samples, and is trained at s = u, unshifted; drawn uniformly,
    that is what diffusers' training scripts draw for both (`weighting_scheme` none).

    Raises ValueError for any other without betas, such as EDM's, whose noise is not DDPM's.
    """
    scheduler = pipeline.scheduler
    if prediction_type(scheduler) == "flow_prediction":
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))  # multistep solvers' name
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)
    if not hasattr(scheduler, "betas"):
        raise ValueError(f"{type(scheduler).__name__} has other noise than DDPM: no method here trains with it")
    return DDPMScheduler.from_config(scheduler.config)


def timesteps_below(noise_scheduler, t_end: float = 1.0) -> Tensor:
    """Return the training scheduler's timesteps up to t_end, (N,), from little noise to much.

    t_end: (0, 1], the first fraction of a DDPM schedule's timesteps. For flow matching it is a level of noise, that
    of Stable Diffusion's schedule there, as s = sigma / (alpha + sigma): 0.25, 0.5 and 0.75 are s = 0.41, 0.62 and
    0.80, just below 1 it is 0.94, and 1 is all timesteps.
    """
    if prediction_type(noise_scheduler) != "flow_prediction":
        return torch.arange(max(1, int(t_end * noise_scheduler.config.num_train_timesteps)))
    timesteps = noise_scheduler.timesteps.flip(0)
    sigmas = noise_scheduler.sigmas[: len(timesteps)].flip(0)
    if t_end >= 1:
        return timesteps
    return timesteps[: max(1, int((sigmas <= _flow_level(t_end)).sum()))]


@lru_cache
def _flow_level(t_end: float) -> float:
    """Return s = sigma / (alpha + sigma) of Stable Diffusion's scaled linear schedule at t_end."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)[max(0, int(t_end * 1000) - 1)]
    return float((1 - alpha_bar) ** 0.5 / (alpha_bar**0.5 + (1 - alpha_bar) ** 0.5))


# ---- prompts


@dataclass
class PromptEmbeddings:
    """A batch of encoded prompts: prompt_embeds (B, L, D), and for all but Stable Diffusion 1 and 2 pooled (B, P)."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None

    def __getitem__(self, index) -> PromptEmbeddings:
        pooled = self.pooled_prompt_embeds
        return PromptEmbeddings(self.prompt_embeds[index], None if pooled is None else pooled[index])


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: list[str | None]) -> PromptEmbeddings:
    """Encode `prompts` with the pipeline's text encoder(s); equal prompts are encoded once.

    None is a dropped prompt: what classifier-free guidance samples without a negative prompt, which is zeros for an
    SDXL base with `force_zeros_for_empty_prompt`, and the encoding of the empty prompt for others. (FLUX.1 has its
    guidance distilled and is sampled with the prompt alone: there a dropped prompt only regularizes.)
    """
    texts = [prompt or "" for prompt in prompts]
    unique = sorted(set(texts))
    device = get_module_execution_device(pipeline.text_encoder)  # where it works, if it is offloaded otherwise
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if is_xl(pipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(unique, **options)
    elif hasattr(pipeline, "unet"):
        embeds, pooled = pipeline.encode_prompt(unique, **options)[0], None
    elif is_flux(pipeline):
        embeds, pooled, _ = pipeline.encode_prompt(unique, None, device, max_sequence_length=t5_length(pipeline))
    else:
        options["max_sequence_length"] = t5_length(pipeline)
        embeds, _, pooled, _ = pipeline.encode_prompt(unique, None, None, **options)
    index = torch.tensor([unique.index(text) for text in texts], device=embeds.device)
    embeddings = PromptEmbeddings(embeds, pooled)[index]  # (B, L, D) and (B, P)
    if pooled is not None and pipeline.config.get("force_zeros_for_empty_prompt", False):
        dropped = torch.tensor([prompt is None for prompt in prompts], device=embeds.device)
        embeddings.prompt_embeds.masked_fill_(dropped[:, None, None], 0)
        embeddings.pooled_prompt_embeds.masked_fill_(dropped[:, None], 0)
    return embeddings


def t5_length(pipeline: DiffusionPipeline) -> int:
    """Return how many tokens T5 reads: 512 for FLUX.1 dev, 256 for schnell and Stable Diffusion 3, as in their code."""
    return 512 if is_flux(pipeline) and pipeline.transformer.config.guidance_embeds else 256


def report_long_prompts(pipeline: DiffusionPipeline, prompts: Iterable[str]) -> None:
    """Log how many of the distinct prompts are cut, with the first of them; nothing if all are read to their end.

    CLIP reads 77 tokens. Where a base has T5, too (Stable Diffusion 3, FLUX), T5 reads on, see `t5_length`.
    """
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    clip, t5 = [], []
    for suffix in ("", "_2", "_3"):
        encoder, tokenizer = (getattr(pipeline, name + suffix, None) for name in ("text_encoder", "tokenizer"))
        if encoder is not None and tokenizer is not None:
            (t5 if isinstance(encoder, T5EncoderModel) else clip).append(tokenizer)
    limit = min(tokenizer.model_max_length for tokenizer in clip)
    long = _longer(prompts, clip, limit)
    if t5 and long:
        shortened = f"{len(long)} of {len(prompts)} prompts are longer than the {limit} tokens that CLIP reads"
        limit = t5_length(pipeline)
        logger.info("%s: T5 reads up to %d", shortened, limit)
        long = _longer(prompts, t5, limit)
    if long:
        count, first = f"{len(long)} of {len(prompts)} prompts", long[0][:_SHOWN] + "..." * (len(long[0]) > _SHOWN)
        logger.warning('%s are longer than %d tokens and were cut: "%s"', count, limit, first)


def _longer(prompts: list[str], tokenizers: list, limit: int) -> list[str]:
    """Return the prompts of which one of the tokenizers makes more than `limit` tokens."""
    if not prompts:
        return []
    lengths = [[len(ids) for ids in t(prompts, verbose=False).input_ids] for t in tokenizers]
    return [prompt for prompt, *counts in zip(prompts, *lengths, strict=True) if max(counts) > limit]


_SHOWN = 80  # characters of a long prompt


def added_conditions(embeddings: PromptEmbeddings, height: int, width: int) -> dict[str, Tensor] | None:
    """Return SDXL's `added_cond_kwargs` for uncropped images of (height, width) pixels; None for other models."""
    pooled = embeddings.pooled_prompt_embeds
    if pooled is None:
        return None
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=pooled.dtype)
    return {"text_embeds": pooled, "time_ids": to_device(time_ids, pooled.device).repeat(len(pooled), 1)}


# ---- latents


def encode_latents(vae: AutoencoderKL, pixel_values: Tensor, generator=None) -> Tensor:
    """Encode (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w): z = (E(x) - mean) scale / std.

    mean is the VAE's `latents_mean` or its `shift_factor`, std its `latents_std`; most have neither.

    `generator` (one, or a list with one per sample) samples E(x) from the posterior; without it the mean is taken.
    """
    return latents_from_moments(vae, *encode_moments(vae, pixel_values), generator)


def encode_moments(vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Encode (B, 3, H, W) in [-1, 1] to the posterior's mean and standard deviation, (B, C, h, w) each, unscaled."""
    device = get_module_execution_device(vae)
    with torch.autocast(device.type, enabled=False):  # SDXL's VAE overflows in float16, a caller's autocast too
        posterior = vae.encode(pixel_values.to(device, vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def latents_from_moments(vae: AutoencoderKL, mean: Tensor, std: Tensor, generator=None) -> Tensor:
    """Return scaled latents (B, C, h, w) of a posterior by `encode_moments`, as `encode_latents` does."""
    latents = mean if generator is None else mean + std * noise_like(mean, generator)
    mean, scale = _latent_statistics(vae, latents)
    return (latents - mean) * scale


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode scaled latents (B, C, h, w) to (B, 3, H, W), about [-1, 1]: x = D(z std / scale + mean)."""
    latents = latents.to(vae.dtype)
    mean, scale = _latent_statistics(vae, latents)
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents / scale + mean).sample


def decode_checkpointed(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """`decode_latents` with gradients in little memory: nothing of the decoder is kept for the backward pass.

    Image by image it is computed again there, and within an image block by block (checkpoints inside a checkpoint). At
    512 px two images of Stable Diffusion's VAE take 3.1 GB in place of 11.6, at 1024 px one takes 12.2 GB in place of
    23.2, in float32.
    """

    def decode(latents: Tensor) -> Tensor:
        vae.enable_gradient_checkpointing()  # here, as the backward pass comes through again
        return decode_latents(vae, latents)

    return torch.cat([checkpoint(decode, one, use_reentrant=False) for one in latents.split(1)])


def _latent_statistics(vae: AutoencoderKL, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return (mean, scale / std) of the VAE's latents: numbers, or (1, C, 1, 1) where each channel has its own."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None:
        mean = getattr(vae.config, "shift_factor", None) or 0.0
    else:
        mean = latents.new_tensor(mean).view(1, -1, 1, 1)
    scale = vae.config.scaling_factor
    return mean, scale if std is None else scale / latents.new_tensor(std).view(1, -1, 1, 1)


def downsample_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a face mask (B, 1, H, W) to the latent grid `size`: a cell counts as face if any of its pixels does."""
    return F.adaptive_max_pool2d(mask.float(), size)


# ---- noise, and what the network predicts


def noise_like(latents: Tensor, generator) -> Tensor:
    """Draw normal noise of the latents' shape (B, C, h, w); with a list of B generators each sample has its own."""
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) not in (1, len(latents)):
        raise ValueError(f"`generator` has to be one or {len(latents)}, one per sample, but is {len(generators)}")
    shape = (len(latents) // len(generators), *latents.shape[1:])
    noise = [torch.randn(shape, generator=g, device=g.device) for g in generators]
    return to_device(torch.cat(noise), latents.device).to(latents.dtype)


def add_noise(noise_scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the noisy latents z_t: sqrt(a) z_0 + sqrt(1 - a) e (DDPM, Eq. 4), of flow matching (1 - s) z_0 + s e."""
    if prediction_type(noise_scheduler) == "flow_prediction":
        sigmas = _flow_sigmas(noise_scheduler, timesteps, latents)
        return (1 - sigmas) * latents + sigmas * noise
    return noise_scheduler.add_noise(latents, noise, timesteps)


def prediction_type(noise_scheduler) -> str:
    """Return what the network predicts, one of PREDICTION_TYPES; `flow_prediction` for flow matching schedulers."""
    if "FlowMatch" in type(noise_scheduler).__name__:
        return "flow_prediction"
    kind = noise_scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` has to be one of {', '.join(PREDICTION_TYPES)} but is {kind!r}")
    return kind


def training_target(noise_scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network has to predict: the noise, the velocity, the flow e - x_0, or x_0."""
    kind = prediction_type(noise_scheduler)
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return {"epsilon": noise, "sample": latents, "flow_prediction": noise - latents}[kind]


def predict(
    pipeline: DiffusionPipeline,
    noisy_latents: Tensor,
    timesteps: Tensor,
    embeddings: PromptEmbeddings,
    denoiser: Callable | None = None,
) -> Tensor:
    """Run a base's network once, whatever its kind -> what it predicts, (B, C, h, w).

    noisy_latents: (B, C, h, w), scaled; timesteps: (B,), the training scheduler's; denoiser: the network in another
    form (prepared for several processes, with other weights), by default the pipeline's own.
    """
    denoiser = denoiser or denoiser_of(pipeline)
    prompt_embeds, pooled = embeddings.prompt_embeds, embeddings.pooled_prompt_embeds
    if hasattr(pipeline, "unet"):
        height, width = (side * pipeline.vae_scale_factor for side in noisy_latents.shape[-2:])
        conditions = added_conditions(embeddings, height, width) if is_xl(pipeline) else None
        return denoiser(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample
    given = {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled}
    if not is_flux(pipeline):
        return denoiser(noisy_latents, timestep=timesteps, **given).sample

    # ---- FLUX: 2 x 2 latents are a token, which knows its place; timesteps are s; -dev is trained at guidance 1
    height, width = (side // 2 for side in noisy_latents.shape[-2:])
    model_pred = denoiser(
        pack_latents(noisy_latents),
        timestep=timesteps / 1000,
        guidance=torch.ones_like(timesteps) if pipeline.transformer.config.guidance_embeds else None,
        img_ids=torch.cartesian_prod(*map(torch.arange, (1, height, width))).to(noisy_latents),  # (h w / 4, 3)
        txt_ids=noisy_latents.new_zeros(prompt_embeds.shape[1], 3),
        **given,
    ).sample
    return unpack_latents(model_pred, height, width)


def pack_latents(latents: Tensor) -> Tensor:
    """Make FLUX's tokens of 2 x 2 latents: (B, C, h, w) -> (B, h w / 4, 4 C)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack_latents`, of `height` x `width` tokens: (B, height width, 4 C) -> (B, C, 2 height, 2 width)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


# ---- x_0


def pred_original_sample(noise_scheduler, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
    """Predict x_0 from x_t in one step (DDPM, Eq. 15; Face Score, Eq. 4), for every prediction type.

    timesteps: (B,), int64 steps of a discrete scheduler, or the flow scheduler's own; model_output, sample:
    (B, C, H, W). Returns (B, C, H, W) float32. With a for alpha_bar_t and s for the flow scheduler's sigma_t:

        epsilon          x_t = sqrt(a) x_0 + sqrt(1 - a) e      x_0 = (x_t - sqrt(1 - a) e) / sqrt(a)
        v_prediction     v = sqrt(a) e - sqrt(1 - a) x_0        x_0 = sqrt(a) x_t - sqrt(1 - a) v
        flow_prediction  x_t = (1 - s) x_0 + s e, v = e - x_0   x_0 = x_t - s v
        sample                                                  x_0 itself
    """
    sample, model_output = sample.float(), model_output.float()
    kind = prediction_type(noise_scheduler)
    if kind == "sample":
        return model_output
    if kind == "flow_prediction":
        return sample - _flow_sigmas(noise_scheduler, timesteps, sample) * model_output
    alpha_bar = noise_scheduler.alphas_cumprod.to(sample.device, torch.float32)[timesteps].view(-1, 1, 1, 1)
    if kind == "v_prediction":
        return alpha_bar.sqrt() * sample - (1 - alpha_bar).sqrt() * model_output
    return (sample - (1 - alpha_bar).sqrt() * model_output) / alpha_bar.sqrt()


def _flow_sigmas(noise_scheduler, timesteps: Tensor, sample: Tensor) -> Tensor:
    """Return the noise level s of each of the scheduler's timesteps -> (B, 1, 1, 1)."""
    found = noise_scheduler.timesteps.to(sample.device) == timesteps.to(sample.device)[:, None]  # (B, steps)
    if not found.any(dim=1).all():
        raise ValueError("`timesteps` have to be among the scheduler's own (`noise_scheduler.timesteps`)")
    sigmas = noise_scheduler.sigmas.to(sample.device, sample.dtype)
    return sigmas[found.int().argmax(dim=1)].view(-1, 1, 1, 1)


# ---- sampling


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    size: int,
    steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
) -> list[Image.Image]:
    """Sample one size x size image per prompt, each from the noise of its own seed.

    guidance_scale: of classifier-free guidance, or that FLUX.1 dev was distilled with; FLUX.1 schnell has none.
    negative_prompt: what classifier-free guidance leads away from; FLUX.1 has none. The latents are decoded here and
    not by the pipeline, whose networks may run in another dtype than the VAE.
    """
    if negative_prompt and is_flux(pipeline):
        raise ValueError(f"`negative_prompt` is {negative_prompt!r}, which FLUX.1 cannot use: leave it out")
    latents = pipeline(
        prompts,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **({"negative_prompt": [negative_prompt] * len(prompts)} if negative_prompt else {}),
        **({} if hasattr(pipeline, "unet") else {"max_sequence_length": t5_length(pipeline)}),
    ).images
    if is_flux(pipeline):
        side = size // (2 * pipeline.vae_scale_factor)
        latents = unpack_latents(latents, side, side)
    return to_pil(decode_latents(pipeline.vae, latents.float()))


SAMPLERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # the linear multistep alone, as Stable Diffusion uses it
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # clipping is meant for pixels and would damage latents
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


def make_sampler(name: str, scheduler):
    """Return the scheduler to sample by, with the noise schedule and prediction type of a base's own `scheduler`.

    name: `base` (its own), `pndm` (arXiv 2202.09778; Face Score, section 6.1), `ddim` (2010.02502), `ddpm` (2006.11239;
    AuthFace), `euler` (2206.00364), `dpm++` (2211.01095) or `sde-dpm++`, which draws fresh noise in each step. Raises
    ValueError for another name, and where the sampler does not know what the base was trained with.
    """
    if name == "base":
        return scheduler
    if name not in SAMPLERS:
        raise ValueError(f"`sampler` has to be base or one of {', '.join(SAMPLERS)} but is {name!r}")
    class_name, options = SAMPLERS[name]
    own, sampler_class = type(scheduler).__name__, getattr(diffusers, class_name)
    known = inspect.signature(sampler_class.__init__).parameters
    needs_snr = scheduler.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known
    if prediction_type(scheduler) == "flow_prediction" or "EDM" in own or needs_snr:
        reason = "zero terminal SNR" if needs_snr else own
        raise ValueError(f"`sampler` is {name}, which cannot sample a base with {reason}: use base")
    return sampler_class.from_config(scheduler.config, **options)


@contextmanager
def sampled_with(name: str, pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """Give the pipeline with another sampler (see `make_sampler`); afterwards it has its own again, which is saved."""
    own = pipeline.scheduler
    pipeline.scheduler = make_sampler(name, own)
    try:
        yield pipeline
    finally:
        pipeline.scheduler = own
