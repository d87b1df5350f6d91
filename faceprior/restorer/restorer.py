"""`AuthFaceRestorer`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

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

from faceprior.color import adain_color_fix, keep_tone, wavelet_color_fix
from faceprior.detect import Face
from faceprior.diffusion import decode_latents, encode_latents, is_xl, noise_like, report_long_prompts
from faceprior.files import atomic_write
from faceprior.images import ImageSource, SourceImage, to_pil, to_pixel_values
from faceprior.models import (
    MODEL_FILES,
    RESTORER_ID,
    load_part,
    quantization_of,
    quantize,
    require_quantization,
    resolve_model,
)
from faceprior.restorer.photographs import PhotographOptions, restore_photographs
from faceprior.restorer.results import RestoredImage
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
        faces: list[Face] | None = None,
        detector: str | Callable = "auto",
        min_confidence: float = 0.9,
        min_face_size: float = 20,
        upscale: int = 1,
        background: Callable[[Image.Image], Image.Image] | None = None,
        color_fix: str = "wavelet",
        keep_sharp: bool | None = None,
        scorer: Any = None,
        keep_better: bool | None = None,
        min_gain: float = 0.0,
        identity: Any = None,
        max_drift: float | None = None,
        batch_size: int = 4,
        **sampling,
    ) -> RestoredImage:
        """Restore every face of a photograph and paste it back, where that makes it better.

        image: path, PIL image, array, or what `read_source` read. faces: known faces with landmarks, instead of
        detection (`detector`, `min_confidence`, `min_face_size`: see `detect_faces`). upscale: whole factor of the
        result's size, 1 to 4. background: function from the photograph to an image of the same shape, such as an
        upscaler, for what is outside of the faces. color_fix: `wavelet`, `adain` or `none`; a grey or toned face keeps
        its tone with each of them. batch_size: faces per pass through the network. sampling: overrides of the settings
        (num_inference_steps, guidance_scale, controlnet_conditioning_scale, seed, prompt, ...).

        What is not pasted is left as it is, and the result says why:

        - a face that cannot be aligned, since its landmarks are missing or do not span a face, with a warning in the
          log;
        - keep_sharp: a face larger in the photograph than the model's resolution that is really sharper than it (see
          `quality.fine_detail`); on by default where no scorer decides;
        - scorer, an object with `score_crops(crops)` such as a FaceScorer, with keep_better, on by default with it: a
          face whose Face Score does not rise by `min_gain` at least;
        - identity, an object with `distance(before, after)` such as an IdentityModel, with max_drift: a face whose
          distance is above it.

        A larger face that is soft keeps the photograph's grain and texture that are finer than the model's pixels.
        Without a `background` every pixel outside of the faces is that of the photograph, also in its transparency, or
        of the photograph enlarged by LANCZOS; an image without a face is returned unchanged.
        """
        results = self.restore_all(
            [image],
            [faces],
            color_fix,
            detector=detector,
            min_confidence=min_confidence,
            min_face_size=min_face_size,
            upscale=upscale,
            background=background,
            keep_sharp=keep_sharp,
            scorer=scorer,
            keep_better=keep_better,
            min_gain=min_gain,
            identity=identity,
            max_drift=max_drift,
            batch_size=batch_size,
            **sampling,
        )
        (result,) = results
        if isinstance(result, Exception):
            raise result
        return result

    def restore_all(
        self,
        images: Iterable[ImageSource | SourceImage],
        faces: Iterable[list[Face] | None] | None = None,
        color_fix: str = "wavelet",
        **options,
    ) -> Iterator[RestoredImage | Exception]:
        """Restore many photographs, whose faces share batches -> their results, in the order of `images`.

        images: any iterable; it is read as the results are asked for, as far ahead as a batch needs, and a few
        photographs at most are in memory. faces: for each photograph its known faces, or None. options: those of
        `restore`. A photograph that fails has its exception in the place of its result, and the others go on; so do
        the photographs of a batch for which the memory did not suffice.
        """
        names = {field.name for field in fields(PhotographOptions)}
        own = PhotographOptions(**{name: value for name, value in options.items() if name in names})
        sampling = {name: value for name, value in options.items() if name not in names}

        def restore_crops(crops: list[Image.Image]) -> list[Image.Image]:
            return self.restore_crops(crops, color_fix, own.batch_size, **sampling)

        restore_crops([])  # wrong options are no photograph's error
        resolution = replace(self.settings, **sampling).resolution
        return restore_photographs(images, faces, restore_crops, resolution, own)

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
