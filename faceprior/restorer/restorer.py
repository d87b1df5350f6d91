"""`AuthFaceRestorer`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from faceprior.align import paste_face
from faceprior.color import adain_color_fix, keep_tone, wavelet_color_fix
from faceprior.detect import Face, detect_faces
from faceprior.diffusion import decode_latents, encode_latents, is_xl, noise_like, report_long_prompts
from faceprior.files import atomic_write
from faceprior.images import ImageSource, SourceImage, read_source, to_pil, to_pixel_values
from faceprior.models import (
    MODEL_FILES,
    RESTORER_ID,
    load_part,
    quantization_of,
    quantize,
    require_quantization,
    resolve_model,
)
from faceprior.restorer.photographs import align_faces
from faceprior.restorer.results import RestoredFace, RestoredImage
from faceprior.restorer.settings import SETTINGS_FILE, RestorerSettings, read_settings

COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix, "none": lambda content, style: content}


class AuthFaceRestorer:
    """A portrait prior of SDXL type with a ControlNet that reads the degraded face (AuthFace, 3.2).

    pipeline: the SDXL ControlNet pipeline, with its VAE in float32. settings: how it is sampled.
    """

    def __init__(self, pipeline: StableDiffusionXLControlNetPipeline, settings: RestorerSettings | None = None):
        self.pipeline, self.settings = pipeline, settings or RestorerSettings()
        # DDPM, as in the official code, whatever scheduler the folder has. Clipping, the default, is meant for pixels
        # and would damage latents.
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.set_progress_bar_config(disable=True)
        self._reported: set[str] = set()  # prompts whose length was looked at

    @classmethod
    def from_prior(
        cls, prior: DiffusionPipeline, controlnet: ControlNetModel, settings: RestorerSettings | None = None
    ) -> AuthFaceRestorer:
        """Join an SDXL type pipeline and a ControlNet that was trained on it. The prior itself is not changed."""
        if not is_xl(prior):
            raise ValueError(
                f"the prior has to be of SDXL type, with two text encoders, but is a {type(prior).__name__}"
            )
        parts = {k: prior.components[k] for k in ("vae", "unet", "scheduler", *_TEXT_PARTS)}
        pipeline = StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet, add_watermarker=False)
        return cls(pipeline, settings)

    @classmethod
    def from_pretrained(
        cls, path_or_id: str = RESTORER_ID, dtype: torch.dtype = torch.float32, quantization: str = "none"
    ) -> AuthFaceRestorer:
        """Load a folder that `save_pretrained` wrote, a folder of the official layout, or a hub id.

        Every part lies in its sub-folder (`unet/`, `controlnet/`, `vae/`, ...); a `model_index.json` is not needed. The
        VAE is loaded in float32. quantization: `none`, `8bit` or `nf4`, of all networks but the VAE, for less memory
        (see `models.quantize`). Raises FileNotFoundError that names the missing part, ValueError for a damaged one.
        """
        require_quantization(quantization)
        folder = resolve_model(
            path_or_id,
            "restorer",
            "`python stages/06_train_restorer.py` trains one, and `--checkpoint tiny` takes the small one that ships",
            required=("unet/config.json",),
            patterns=(SETTINGS_FILE, *(f"{part}/{file}" for part in _PARTS for file in MODEL_FILES)),
        )
        parts = {}
        for name, part_class in _PARTS.items():
            part_dtype = torch.float32 if name == "vae" else dtype
            parts[name] = load_part(part_class, folder, name, part_dtype, name, _CONFIGS.get(name, ("config.json",)))
            if isinstance(parts[name], torch.nn.Module) and name != "vae":
                quantize(parts[name], quantization)
        settings = folder / SETTINGS_FILE
        return cls(
            StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False),
            read_settings(settings) if settings.is_file() else None,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write every part to its sub-folder (safetensors) and the sampling settings to `restorer_config.json`."""
        if quantization_of(self.pipeline.unet) != "none":
            raise ValueError("a quantized restorer cannot be saved: load it without `quantization`")
        self.pipeline.save_pretrained(folder)
        with atomic_write(Path(folder) / SETTINGS_FILE, "w") as file:
            json.dump(asdict(self.settings), file, indent=1)

    @property
    def device(self) -> torch.device:
        return self.pipeline.unet.device

    def to(self, device: torch.device | str) -> AuthFaceRestorer:
        self.pipeline.to(device)
        return self

    def restore(
        self,
        image: ImageSource | SourceImage,
        detector="auto",
        min_confidence: float = 0.9,
        min_face_size: int = 20,
        faces: list[Face] | None = None,
        color_fix: str = "wavelet",
        batch_size: int = 4,
        **sampling,
    ) -> RestoredImage:
        """Restore every face of a photograph and paste it back.

        image: path, PIL image, array, or what `read_source` read. faces: known faces with landmarks, instead of
        detection. color_fix: `wavelet`, `adain` or `none`; a grey or toned face keeps its tone with each of them.
        batch_size: faces per pass through the network. sampling: overrides of the settings
        (num_inference_steps, guidance_scale, controlnet_conditioning_scale, seed, prompt, ...).

        Outside of the faces every pixel is that of the photograph, also in its transparency; an image without a face is
        returned unchanged. A face that cannot be aligned, since its landmarks are missing or do not span a face, is
        left unchanged, with a warning in the log.
        """
        source = image if isinstance(image, SourceImage) else read_source(image)
        photograph, settings = source.rgb, replace(self.settings, **sampling)

        # ---- detect and align: upright square crops, the largest face first
        if faces is None:
            faces = detect_faces(photograph, detector, min_confidence, min_face_size, turned=True)
        aligned, left = align_faces(photograph, faces, settings.resolution)

        # ---- restore the crops
        before = [place.crop for _, place in aligned]
        after = self.restore_crops(before, color_fix, batch_size, **sampling)

        # ---- paste back: the largest face last, so that it lies on top
        result = photograph
        for crop, (_, place) in reversed(list(zip(after, aligned, strict=True))):
            result = paste_face(result, crop, place.matrix)
        restored = [RestoredFace(face, place.crop, crop) for crop, (face, place) in zip(after, aligned, strict=True)]
        return RestoredImage(source.with_pixels(result), restored, left, source)

    @torch.no_grad()
    def restore_crops(
        self, crops: list[Image.Image], color_fix: str = "wavelet", batch_size: int = 4, **sampling
    ) -> list[Image.Image]:
        """Restore aligned square crops; each is resized to the model's resolution and depends on its own pixels only.

        Raises ValueError for an unknown `color_fix` or `start`, TypeError for a key that no setting has.
        """
        if color_fix not in COLOR_FIXES:
            raise ValueError(f"`color_fix` has to be one of {', '.join(COLOR_FIXES)} but is {color_fix!r}")
        if batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1 but is {batch_size}")
        settings = replace(self.settings, **sampling)
        prompts = {settings.prompt, settings.negative_prompt}
        report_long_prompts(self.pipeline, sorted(prompts - self._reported))
        self._reported |= prompts
        restored = []
        for start in range(0, len(crops), batch_size):
            # ---- pixels of the degraded crops: (B, 3, R, R) in [-1, 1]
            degraded = to_pixel_values(crops[start : start + batch_size], settings.resolution).to(self.device)

            # ---- x_0 by DDPM, under the ControlNet
            pixels = self._sample(degraded, settings)

            # ---- detail of the result, colours of the degraded crop: none where that is grey, whatever was drawn
            fixed = COLOR_FIXES[color_fix](pixels.clamp(-1, 1), degraded)
            restored += to_pil(keep_tone(fixed, degraded))
        return restored

    def _sample(self, degraded: Tensor, settings: RestorerSettings) -> Tensor:
        """Sample the restored faces under the degraded ones: (B, 3, R, R) in [-1, 1] -> the same, about [-1, 1]."""
        # ---- x_T: pure noise, drawn by the pipeline, or the degraded latents under noise
        count = len(degraded)
        generators = [torch.Generator().manual_seed(settings.seed) for _ in range(count)]
        noisy_latents = (
            self._noised(degraded, settings.num_inference_steps, generators) if settings.start == "degraded" else None
        )

        # ---- x_T -> x_0; at each step the ControlNet reads the degraded faces in [0, 1] (AuthFace, Fig. 4)
        latents = self.pipeline(
            prompt=[settings.prompt] * count,
            negative_prompt=[settings.negative_prompt] * count,
            image=(degraded / 2 + 0.5).to(self.pipeline.controlnet.dtype),
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            controlnet_conditioning_scale=float(settings.controlnet_conditioning_scale),
            generator=generators,
            latents=noisy_latents,
            output_type="latent",
        ).images

        # ---- decoded here: float16 parts beside a float32 VAE raise a dtype error in the pipeline's own decoding
        return decode_latents(self.pipeline.vae, latents.float())

    def _noised(self, degraded: Tensor, steps: int, generators: list[torch.Generator]) -> Tensor:
        """Return the degraded faces' latents (B, C, h, w) under the noise of the first of `steps` timesteps."""
        scheduler, latents = self.pipeline.scheduler, encode_latents(self.pipeline.vae, degraded)
        scheduler.set_timesteps(steps)
        first = scheduler.timesteps[:1].expand(len(latents)).to(latents.device)
        return scheduler.add_noise(latents, noise_like(latents, generators), first).to(self.pipeline.unet.dtype)


_TEXT_PARTS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
}
_PARTS = {
    **_TEXT_PARTS,
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "controlnet": ControlNetModel,
    "scheduler": DDPMScheduler,
}
# What a part's folder has to hold instead of `config.json`; without it transformers builds a tokenizer without words.
_CONFIGS = {
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "tokenizer_2": ("tokenizer.json", "vocab.json"),
    "scheduler": ("scheduler_config.json",),
}
