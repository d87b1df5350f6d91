"""`AuthFaceRestorer`: detect, align, sample under a ControlNet, fix colours, paste back (AuthFace, arXiv 2410.09864).

restorer = AuthFaceRestorer.from_pretrained("Ethanliang99/AuthFace").to("cuda")
restorer.restore("old_photo.jpg").image.save("restored.png")
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
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

from faceprior.align import AlignedFace, align_face, paste_face
from faceprior.color import adain_color_fix, keep_tone, wavelet_color_fix
from faceprior.detect import Face, detect_faces
from faceprior.diffusion import decode_latents, encode_latents, is_xl, noise_like, report_long_prompts
from faceprior.files import atomic_write
from faceprior.images import ImageSource, SourceImage, read_source, to_pil, to_pixel_values
from faceprior.jsonl import require_keys
from faceprior.models import (
    MODEL_FILES,
    RESTORER_ID,
    load_part,
    quantization_of,
    quantize,
    require_quantization,
    resolve_model,
)

logger = logging.getLogger(__name__)
SETTINGS_FILE = "restorer_config.json"
COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix, "none": lambda content, style: content}
STARTS = ("noise", "degraded")
# The official inference code's prompts; training uses the empty one (AuthFace, Eq. 1).
PROMPT = (
    "hyper-realistic portrait, face close-up, super detailed, Cinematic, High Contrast, highly detailed, taken using a "
    "Canon EOS R camera,hyper detailed photo - realistic maximum detail, 32k, ultra HD,extreme meticulous detailing, "
    "skin pore detailing,hyper sharpness, perfect without deformations"
)
NEGATIVE_PROMPT = (
    "unreal face, asymmetrical eyes, oil painting, illustration, drawing, art, sketch,cartoon, CG Style, 3D render, "
    "unreal engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, "
    "deformed, lowres, over-smooth, malformed/disproportionate hands/fingers, ugly, easy negative"
)


@dataclass(frozen=True)
class RestorerSettings:
    """The settings by which a model is sampled; the defaults are those of the official inference code.

    resolution: side of the aligned crop in pixels. steps: number of DDPM steps. guidance_scale: strength of
    classifier-free guidance, 1 is off. controlnet_scale: weight of the degraded face, [0, 2]. seed: seed of every
    face's noise. start: what sampling starts from, pure `noise`, or `degraded`: the degraded face's latents under the
    noise of the first step. Colours drift less from there (SeeSR, arXiv 2311.16518), since at the last training step,
    too, a little of the image is left in x_t.
    """

    resolution: int = 512
    steps: int = 50
    guidance_scale: float = 8.0
    controlnet_scale: float = 1.0
    prompt: str = PROMPT
    negative_prompt: str = NEGATIVE_PROMPT
    seed: int = 123
    start: str = "noise"

    def __post_init__(self):
        if self.start not in STARTS:
            raise ValueError(f"`start` has to be one of {', '.join(STARTS)} but is {self.start!r}")


@dataclass(frozen=True)
class RestoredFace:
    """One face: where it is in the photograph, and its aligned crop before and after."""

    face: Face
    before: Image.Image
    after: Image.Image


@dataclass(frozen=True)
class LeftFace:
    """A face that was left unchanged, and why."""

    face: Face
    reason: str


@dataclass(frozen=True)
class RestoredImage:
    """A restored photograph (RGB, or RGBA if it has transparency; the size of the input) and its faces, largest first.

    left: the faces that could not be restored. source: the photograph, with what else its file holds.
    """

    image: Image.Image
    faces: list[RestoredFace]
    left: list[LeftFace]
    source: SourceImage


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
            "`python stages/06_train_restorer.py` trains one; on the command line `tiny` is the small one that ships",
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
        batch_size: faces per pass through the network. sampling: overrides of the settings (steps, guidance_scale,
        controlnet_scale, seed, prompt, ...).

        Outside of the faces every pixel is that of the photograph, also in its transparency; an image without a face is
        returned unchanged. A face that cannot be aligned, since its landmarks are missing or do not span a face, is
        left unchanged, with a warning in the log.
        """
        source = image if isinstance(image, SourceImage) else read_source(image)
        photograph, settings = source.rgb, replace(self.settings, **sampling)

        # ---- detect and align: upright square crops, the largest face first
        if faces is None:
            faces = detect_faces(photograph, detector, min_confidence, min_face_size, turned=True)
        aligned, left = _align(photograph, faces, settings.resolution)

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
        noisy_latents = self._noised(degraded, settings.steps, generators) if settings.start == "degraded" else None

        # ---- x_T -> x_0; at each step the ControlNet reads the degraded faces in [0, 1] (AuthFace, Fig. 4)
        latents = self.pipeline(
            prompt=[settings.prompt] * count,
            negative_prompt=[settings.negative_prompt] * count,
            image=(degraded / 2 + 0.5).to(self.pipeline.controlnet.dtype),
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            controlnet_conditioning_scale=float(settings.controlnet_scale),
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


def _align(
    photograph: Image.Image, faces: list[Face], size: int
) -> tuple[list[tuple[Face, AlignedFace]], list[LeftFace]]:
    """Align the faces; those that cannot be aligned are named in the log."""
    aligned, left = [], []
    for face in faces:
        try:
            if face.landmarks is None:
                raise ValueError("it has no landmarks")
            aligned.append((face, align_face(photograph, face.landmarks, size)))
        except ValueError as error:
            left.append(LeftFace(face, str(error)))
            box = ", ".join(f"{edge:.0f}" for edge in face.box)
            logger.warning("the face at (%s) is left unchanged: %s", box, error)
    return aligned, left


def read_settings(path: Path) -> RestorerSettings:
    """Read `restorer_config.json`; ValueError names an unknown key or a value of the wrong type."""
    defaults = asdict(RestorerSettings())
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        if unknown := sorted(values.keys() - defaults.keys()):
            raise ValueError(f"unknown keys: {', '.join(unknown)}; it knows {', '.join(defaults)}")
        require_keys(values, {key: _kind(defaults[key]) for key in values})
        return RestorerSettings(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold a restorer's settings: {error}") from error


def _kind(default):
    return (int, float) if isinstance(default, float) else type(default)
