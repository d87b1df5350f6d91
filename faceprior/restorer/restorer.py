"""`AuthFaceRestorer`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
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
from faceprior.color import COLOR_FIXES, keep_tone
from faceprior.detect import Face, detect_faces
from faceprior.diffusion import is_xl
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
from faceprior.restorer.aligned import restore_aligned
from faceprior.restorer.photographs import align_faces
from faceprior.restorer.results import RestoredFace, RestoredImage
from faceprior.restorer.sampling import FaceSampler, make_generator, to_condition
from faceprior.restorer.settings import NEGATIVE_PROMPT, PROMPT, SETTINGS_FILE, RestorerSettings, read_settings


class AuthFaceRestorer:
    """A portrait prior of SDXL type with a ControlNet that reads the degraded face (AuthFace, 3.2).

    pipeline: the SDXL ControlNet pipeline, with its VAE in float32. settings: how it is sampled.
    """

    def __init__(self, pipeline: StableDiffusionXLControlNetPipeline, settings: RestorerSettings | None = None):
        self.pipeline, self.settings = pipeline, settings or RestorerSettings()
        # DDPM, as in the official code, whatever scheduler the folder has
        if not isinstance(pipeline.scheduler, DDPMScheduler):
            pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.sampler = FaceSampler(pipeline)

    @classmethod
    def from_prior(
        cls, prior: DiffusionPipeline, controlnet: ControlNetModel, settings: RestorerSettings | None = None
    ) -> AuthFaceRestorer:
        """Join an SDXL type pipeline and a ControlNet that was trained on it. The prior itself is not changed."""
        if not is_xl(prior):
            raise ValueError(
                f"the prior has to be of SDXL type, with two text encoders, but is a {type(prior).__name__}"
            )
        parts = {k: prior.components[k] for k in ("vae", "unet", *TEXT_PARTS)}
        # without clipping, the default, which is meant for pixels and would damage latents: also for who loads the
        # saved folder with other code
        parts["scheduler"] = DDPMScheduler.from_config(prior.scheduler.config, clip_sample=False)
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
            patterns=(SETTINGS_FILE, *(f"{part}/{file}" for part in PARTS for file in MODEL_FILES)),
        )
        parts = {}
        for name, part_class in PARTS.items():
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
        """Where the U-Net works, also while offloading keeps it elsewhere."""
        return self.sampler.device

    def to(self, device: torch.device | str) -> AuthFaceRestorer:
        """Move the networks. The text encoders stay on the CPU: they visit the device for each new prompt."""
        if hasattr(self.pipeline.unet, "_hf_hook"):
            raise ValueError("the restorer cannot be moved: it is offloaded, which moves its networks by itself")
        for name, part in self.pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                part.to("cpu" if name in TEXT_PARTS else device)
        return self

    # ---- less memory, more speed; each returns the restorer

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> AuthFaceRestorer:
        """Have on the device, by default the GPU, only the networks that are at work; as diffusers' pipelines do."""
        self.pipeline.enable_model_cpu_offload(device=device)
        return self

    def enable_sequential_cpu_offload(self, device: torch.device | str | None = None) -> AuthFaceRestorer:
        """Have on the device only the layer that is at work: least memory, and several times as slow."""
        self.pipeline.enable_sequential_cpu_offload(device=device)
        return self

    def enable_vae_tiling(self) -> AuthFaceRestorer:
        """Have the VAE work image by image, and on large ones tile by tile."""
        self.pipeline.vae.enable_slicing()
        self.pipeline.vae.enable_tiling()
        return self

    def compile(self, **options) -> AuthFaceRestorer:
        """Compile U-Net and ControlNet in place by `torch.compile`, whose `options` these are (mode, backend, ...).

        The first faces of each size and batch wait for it, for a minute or more.
        """
        self.pipeline.unet.compile(**options)
        self.pipeline.controlnet.compile(**options)
        return self

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        images: list[Image.Image],
        prompt: str = PROMPT,
        negative_prompt: str | None = NEGATIVE_PROMPT,
        guidance_scale: float = 8.0,
        num_inference_steps: int = 50,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
    ) -> np.ndarray | Tensor:
        """Denoise under degraded images, which is the official inference to the letter: its recipe, and no colour fix.

        images: RGB, of one size, whose sides are multiples of 8. negative_prompt: None is zeros in
        place of embeddings, as in the stock pipeline; not read where guidance_scale <= 1, which is without guidance.
        generator: one for the batch (default: of seed 123, on the CPU), or a list with one for each image.

        Returns (B, H, W, 3) float32 in [0, 1], or, with output_type `latent`, the latents (B, C, h, w) as the stock
        pipeline returns them, not yet divided by the VAE's scaling factor. Raises ValueError for images of other or
        unequal sizes, another `output_type`, or a value out of range.
        """
        if output_type not in ("np", "latent"):
            raise ValueError(f"`output_type` has to be np or latent but is {output_type!r}")
        sizes = {image.size for image in images}
        if len(sizes) != 1:
            found = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)) or "none"
            raise ValueError(
                f"`images` have to be of one size but are {found}: resize them to one, or sample each alone"
            )
        if any(side % 8 for side in images[0].size):
            raise ValueError(f"the sides of `images` have to be multiples of 8 but are {images[0].size}: resize them")
        settings = self.settings.override(
            "official",
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=control_guidance_start,
            control_guidance_end=control_guidance_end,
        )
        generator = generator or torch.Generator().manual_seed(settings.seed)
        if output_type == "latent":
            return self.sampler(to_condition(images), settings, generator, "latent")
        return self.pipeline.image_processor.postprocess(
            self.sampler(to_condition(images), settings, generator), output_type="np"
        )

    def restore(
        self,
        image: ImageSource | SourceImage,
        detector="auto",
        min_confidence: float = 0.9,
        min_face_size: int = 20,
        faces: list[Face] | None = None,
        color_fix: str = "wavelet",
        batch_size: int = 4,
        recipe: str | None = None,
        aligned: bool = False,
        upscale: int = 1,
        process_size: int | None = None,
        fidelity: float | None = None,
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
        if aligned:
            options = {"color_fix": color_fix, "recipe": recipe, "fidelity": fidelity, **sampling}
            return RestoredImage(restore_aligned(self, source.rgb, upscale, process_size, **options), [], [], source)
        photograph, settings = source.rgb, self.settings.override(recipe, fidelity, **sampling)

        # ---- detect and align: upright square crops, the largest face first
        if faces is None:
            faces = detect_faces(photograph, detector, min_confidence, min_face_size, turned=True)
        aligned, left = align_faces(photograph, faces, settings.resolution)

        # ---- restore the crops
        before = [place.crop for _, place in aligned]
        after = self.restore_crops(before, color_fix, batch_size, recipe, fidelity, **sampling)

        # ---- paste back: the largest face last, so that it lies on top
        result = photograph
        for crop, (_, place) in reversed(list(zip(after, aligned, strict=True))):
            result = paste_face(result, crop, place.matrix)
        restored = [RestoredFace(face, place.crop, crop) for crop, (face, place) in zip(after, aligned, strict=True)]
        return RestoredImage(source.with_pixels(result), restored, left, source)

    @torch.no_grad()
    def restore_crops(
        self,
        crops: list[Image.Image],
        color_fix: str = "wavelet",
        batch_size: int = 4,
        recipe: str | None = None,
        fidelity: float | None = None,
        **sampling,
    ) -> list[Image.Image]:
        """Restore aligned square crops, each resized to the model's resolution.

        recipe, fidelity, sampling: in place of the restorer's own settings, see `RestorerSettings.override`. A face
        depends on its own pixels only, whatever the batch, unless its noise is that of a batch, as in `official`.

        Raises ValueError for an unknown `color_fix` or a value out of range, TypeError for a key that no setting has.
        """
        if color_fix not in COLOR_FIXES:
            raise ValueError(f"`color_fix` has to be one of {', '.join(COLOR_FIXES)} but is {color_fix!r}")
        if batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1 but is {batch_size}")
        settings = self.settings.override(recipe, fidelity, **sampling)
        restored = []
        for start in range(0, len(crops), batch_size):
            # ---- pixels of the degraded crops: (B, 3, R, R) in [-1, 1]
            degraded = to_pixel_values(crops[start : start + batch_size], settings.resolution).to(self.device)

            # ---- x_0 under the ControlNet
            pixels = self.sampler(degraded / 2 + 0.5, settings, make_generator(settings, len(degraded)))

            # ---- detail of the result, colours of the degraded crop: none where that is grey, whatever was drawn
            fixed = COLOR_FIXES[color_fix](pixels.clamp(-1, 1), degraded)
            restored += to_pil(keep_tone(fixed, degraded))
        return restored


TEXT_PARTS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
}
PARTS = {
    **TEXT_PARTS,
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
