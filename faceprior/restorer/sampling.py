"""The denoising of aligned faces under the ControlNet, as `StableDiffusionXLControlNetPipeline` does it, in less time.

Each prompt is encoded once, the pixels of the degraded faces are embedded once for all steps, and neither guidance nor
the ControlNet costs anything in the steps in which it is off. The networks may be offloaded, compiled, in 16 bits or
quantized: they are called as the pipeline calls them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import StableDiffusionXLControlNetPipeline
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from PIL import Image
from torch import Tensor, nn

from faceprior.diffusion import (
    PromptEmbeddings,
    added_conditions,
    decode_latents,
    encode_latents,
    make_sampler,
    noise_like,
    report_long_prompts,
)
from faceprior.models import device_of
from faceprior.restorer.settings import NEGATIVE_PROMPT, PROMPT, RestorerSettings

_KEPT_PROMPTS = 64  # of SDXL's, 0.3 to 0.6 MB each


def to_condition(images: list[Image.Image]) -> Tensor:
    """Images of one size -> (B, 3, H, W) float32 in [0, 1], what the ControlNet reads."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    # contiguous, as the pipeline's: in 16 bits other strides round differently
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous() / 255


def make_generator(settings: RestorerSettings, count: int) -> torch.Generator | list[torch.Generator]:
    """Return the generator of the noise of `count` faces: one for all, or one for each, of the same seed."""
    if settings.noise == "batch":
        return torch.Generator().manual_seed(settings.seed)
    return [torch.Generator().manual_seed(settings.seed) for _ in range(count)]


class FaceSampler:
    """Samples restored faces by a pipeline's networks, with the prompts that were met before already encoded.

    Threads may share it: they sample one after the other.
    """

    def __init__(self, pipeline: StableDiffusionXLControlNetPipeline):
        self.pipeline = pipeline
        self._prompts: dict[tuple[str, int], PromptEmbeddings] = {}
        self._lock = threading.Lock()  # networks and scheduler have a state while they sample

    @torch.no_grad()
    def __call__(
        self,
        controlnet_cond: Tensor,
        settings: RestorerSettings,
        generator: torch.Generator | list[torch.Generator],
        output_type: str = "pixels",
    ) -> Tensor:
        """Restore degraded faces (B, 3, H, W) in [0, 1] -> the same, about [-1, 1]; or their latents (B, C, h, w).

        generator: one for the batch, or a list with one for each face. output_type: `pixels`, decoded in float32 also
        where the networks are in 16 bits, or `latent`: scaled as the U-Net's. H and W may differ; of the settings
        `resolution`, `seed` and `noise` are not read.
        """
        with self._lock:
            try:
                with _embedded_once(self.pipeline.controlnet):
                    latents = self._denoise(controlnet_cond, settings, generator)
                return latents if output_type == "latent" else decode_latents(self.pipeline.vae, latents)
            finally:
                self.pipeline.maybe_free_model_hooks()

    @property
    def device(self) -> torch.device:
        """Where the U-Net works, also while offloading keeps it elsewhere."""
        return get_module_execution_device(self.pipeline.unet)

    def encode(self, prompt: str | None, copies: int = 1) -> PromptEmbeddings:
        """Return a prompt's embeddings, (1, L, D) and (1, P), on the U-Net's device.

        The text encoders visit that device for a prompt that is new, and then are where they were before. None is what
        the stock pipeline takes without a negative prompt: zeros with `force_zeros_for_empty_prompt`, its default.
        copies: encode as one of a batch of so many, which rounds differently.
        """
        dropped = prompt is None and self.pipeline.config.force_zeros_for_empty_prompt
        key = (prompt or "", copies)
        if key not in self._prompts:
            if key[0] not in (PROMPT, NEGATIVE_PROMPT):  # which are cut in the official code, too
                report_long_prompts(self.pipeline, [key[0]])
            options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            with _visiting(self.device, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
                embeds, _, pooled, _ = self.pipeline.encode_prompt([key[0]] * copies, **options)
            self._prompts[key] = PromptEmbeddings(embeds[:1].clone(), pooled[:1].clone())
            if len(self._prompts) > _KEPT_PROMPTS:  # a caption for each face of an archive: the oldest is dropped
                del self._prompts[next(iter(self._prompts))]
        kept = self._prompts[key]
        found = [tensor.to(self.device) for tensor in (kept.prompt_embeds, kept.pooled_prompt_embeds)]
        return PromptEmbeddings(*(torch.zeros_like(tensor) if dropped else tensor for tensor in found))

    def _denoise(self, controlnet_cond: Tensor, settings: RestorerSettings, generator) -> Tensor:
        count, _, height, width = controlnet_cond.shape
        device, cond = self.device, controlnet_cond.to(self.device, self.pipeline.controlnet.dtype)

        # ---- what the networks are told, for the batch (with guidance: without the prompt, and with it)
        # The rounding to float16 makes much of what is little: there prompts are encoded as the official code does
        copies = count if settings.half_residuals else 1
        prompt = self.encode(settings.prompt, copies)
        plain = _Conditions([prompt], cond)
        guidance = settings.guidance_scale > 1
        if guidance:
            guided = _Conditions([self.encode(settings.negative_prompt, copies), prompt], cond)

        # ---- the steps, and x_t of the first one: pure noise, or the degraded latents under noise
        scheduler = make_sampler(settings.scheduler, self.pipeline.scheduler)
        scheduler.set_timesteps(settings.num_inference_steps)
        skipped = settings.num_inference_steps - max(1, round(settings.num_inference_steps * settings.strength))
        timesteps = scheduler.timesteps[skipped * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped * scheduler.order)
        dtype = prompt.prompt_embeds.dtype
        if settings.start == "degraded":
            clean = encode_latents(self.pipeline.vae, 2 * controlnet_cond - 1)
            first = timesteps[:1].expand(count).to(device)
            latents = scheduler.add_noise(clean, noise_like(clean, generator), first).to(dtype)
        else:
            side = self.pipeline.vae_scale_factor
            shape = (count, self.pipeline.unet.config.in_channels, height // side, width // side)
            latents = randn_tensor(shape, generator, device, dtype) * scheduler.init_noise_sigma
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator, "return_dict": False} if draws else {"return_dict": False}

        # ---- x_T -> x_0
        for index, timestep in enumerate(timesteps):
            level = float(timestep) / scheduler.config.num_train_timesteps
            here = guidance and settings.guidance_low <= level <= settings.guidance_high
            conditions = guided if here else plain
            sample = scheduler.scale_model_input(torch.cat([latents] * 2) if here else latents, timestep)
            on = index / len(timesteps) >= settings.control_guidance_start
            on = on and (index + 1) / len(timesteps) <= settings.control_guidance_end
            residuals = self._residuals(sample, timestep, conditions, settings) if on else {}
            model_pred = self.pipeline.unet(sample, timestep, **conditions.texts, **residuals, return_dict=False)[0]
            if here:
                without, with_prompt = model_pred.chunk(2)
                model_pred = without + settings.guidance_scale * (with_prompt - without)
            latents = scheduler.step(model_pred, timestep, latents, **options)[0]
        return latents

    def _residuals(self, sample: Tensor, timestep: Tensor, conditions: _Conditions, settings: RestorerSettings) -> dict:
        """Run the ControlNet -> what it adds to the U-Net, as the U-Net's arguments."""
        down, middle = self.pipeline.controlnet(
            sample,
            timestep,
            controlnet_cond=conditions.cond,
            conditioning_scale=float(settings.controlnet_conditioning_scale),
            **conditions.texts,
            return_dict=False,
        )
        if settings.half_residuals:
            down, middle = [residual.half().to(residual) for residual in down], middle.half().to(middle)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


class _Conditions:
    """What the networks read beside the latents: texts, for both; cond (N B, 3, H, W), for the ControlNet."""

    def __init__(self, prompts: list[PromptEmbeddings], cond: Tensor):
        embeds = torch.cat([prompt.prompt_embeds for prompt in prompts]).repeat_interleave(len(cond), dim=0)
        pooled = torch.cat([prompt.pooled_prompt_embeds for prompt in prompts]).repeat_interleave(len(cond), dim=0)
        added = added_conditions(PromptEmbeddings(embeds, pooled), *cond.shape[-2:])  # (H, W, 0, 0, H, W), each
        self.texts = {"encoder_hidden_states": embeds, "added_cond_kwargs": added}
        self.cond = torch.cat([cond] * len(prompts))


@contextmanager
def _embedded_once(controlnet: nn.Module) -> Iterator[None]:
    """Have the ControlNet's embedding of the pixels, the same in all steps, computed once for each size of batch.

    At 128 pixels it is a tenth to a fifth of a step on a CPU. A compiled ControlNet computes it in its graph.
    """
    if controlnet._compiled_call_impl is not None:
        yield
        return
    embedding, kept = controlnet.controlnet_cond_embedding, {}
    own, replaced = embedding.forward, "forward" in vars(embedding)  # as by hooks

    def remembered(cond: Tensor) -> Tensor:
        if len(cond) not in kept:
            kept[len(cond)] = own(cond)
        return kept[len(cond)]

    embedding.forward = remembered
    try:
        yield
    finally:
        if replaced:
            embedding.forward = own
        else:
            del embedding.forward


@contextmanager
def _visiting(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Have modules on a device, and then again where they were; those with hooks of accelerate move by themselves."""
    places = {module: device_of(module) for module in modules if not hasattr(module, "_hf_hook")}
    for module in places:
        module.to(device)
    try:
        yield
    finally:
        for module, place in places.items():
            module.to(place)
