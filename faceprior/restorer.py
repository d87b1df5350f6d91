"""`AuthFaceRestorer`: detect, align, denoise under a ControlNet, recolour, paste back (AuthFace, arXiv 2410.09864).

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
from faceprior.color import adain_color_fix, wavelet_color_fix
from faceprior.detect import Face, detect_faces
from faceprior.diffusion import (
    decode_latents,
    encode_latents,
    hub_error,
    is_xl,
    load_part,
    looks_like_path,
    noise_like,
)
from faceprior.images import atomic_write, load_image, to_pil, to_pixel_values
from faceprior.jsonl import require_keys
from faceprior.models import RESTORER_ID

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
    """How a model wants to be sampled; the defaults are those of the official inference code.

    resolution: side of the aligned crop in pixels; steps: of the DDPM sampler; guidance_scale: CFG, 1 is off;
    controlnet_scale: weight of the degraded face, [0, 2]; seed: of every face's noise; start: `noise`, or `degraded`,
    the degraded face's latents under the noise of the first step, from where colours drift less (SeeSR, arXiv
    2311.16518): a network is trained on pictures under noise, of which a rest shines through even at the last step.
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
    """One face: where it was found, and its aligned crop before and after."""

    face: Face
    before: Image.Image
    after: Image.Image


@dataclass(frozen=True)
class RestoredImage:
    """A restored photograph (RGB, the size of the input) and its faces, largest first."""

    image: Image.Image
    faces: list[RestoredFace]


class AuthFaceRestorer:
    """A portrait prior of SDXL type and a ControlNet that reads the degraded face.

    pipeline: the SDXL ControlNet pipeline with its VAE in float32; settings: how it is sampled.
    """

    def __init__(self, pipeline: StableDiffusionXLControlNetPipeline, settings: RestorerSettings | None = None):
        self.pipeline, self.settings = pipeline, settings or RestorerSettings()
        # DDPM whatever the folder's own scheduler is: the official code does the same. Clipping, its default where the
        # folder does not say, is for pixels: it would spoil latents.
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_prior(
        cls, prior: DiffusionPipeline, controlnet: ControlNetModel, settings: RestorerSettings | None = None
    ) -> AuthFaceRestorer:
        """Join an SDXL type pipeline and a ControlNet that was trained on it. The prior itself is left as it is."""
        if not is_xl(prior):
            raise ValueError(
                f"the prior has to be of SDXL type, with two text encoders, but is a {type(prior).__name__}"
            )
        parts = {k: prior.components[k] for k in ("vae", "unet", "scheduler", *_TEXT_PARTS)}
        pipeline = StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet, add_watermarker=False)
        return cls(pipeline, settings)

    @classmethod
    def from_pretrained(cls, path_or_id: str = RESTORER_ID, dtype: torch.dtype = torch.float32) -> AuthFaceRestorer:
        """Load a folder that `save_pretrained` wrote, a folder of the official layout, or a hub id.

        Every part stands in its sub-folder (`unet/`, `controlnet/`, `vae/`, ...); a `model_index.json` is not needed.
        The VAE is kept in float32. Raises FileNotFoundError that names the part which is missing.
        """
        folder = Path(path_or_id).expanduser()
        if looks_like_path(str(path_or_id)) and not folder.is_dir():
            raise FileNotFoundError(f"no restorer in {folder}: `python stages/06_train_restorer.py` trains one")
        source = str(folder) if folder.is_dir() else str(path_or_id)
        parts = {name: _load(part, source, name, dtype) for name, part in _PARTS.items()}
        settings = folder / SETTINGS_FILE
        return cls(
            StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False),
            read_settings(settings) if settings.is_file() else None,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write every part to its sub-folder (safetensors) and the sampling settings to `restorer_config.json`."""
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
        image,
        detector="auto",
        min_confidence: float = 0.9,
        min_face_size: int = 20,
        faces: list[Face] | None = None,
        color_fix: str = "wavelet",
        batch_size: int = 4,
        **sampling,
    ) -> RestoredImage:
        """Restore every face of a photograph and paste it back.

        image: path, PIL image or array; faces: known ones with landmarks, instead of detection; color_fix: `wavelet`,
        `adain` or `none`; batch_size: faces per pass through the network; sampling: overrides of the settings (steps,
        guidance_scale, controlnet_scale, seed, prompt, ...). Outside of the faces every pixel is the photograph's own;
        without a face the picture comes back as it is. A face that cannot be aligned, because it has no landmarks or
        none that span a face, is left as it is with a warning in the log.
        """
        photograph, settings = load_image(image), replace(self.settings, **sampling)
        if faces is None:
            faces = detect_faces(photograph, detector, min_confidence, min_face_size)
        aligned = _align(photograph, faces, settings.resolution)
        before = [place.crop for _, place in aligned]
        after = self.restore_crops(before, color_fix, batch_size, **sampling)
        result = photograph
        for crop, (_, place) in reversed(list(zip(after, aligned, strict=True))):  # the largest face goes on top
            result = paste_face(result, crop, place.matrix)
        found = [RestoredFace(face, place.crop, crop) for crop, (face, place) in zip(after, aligned, strict=True)]
        return RestoredImage(result, found)

    @torch.no_grad()
    def restore_crops(
        self, crops: list[Image.Image], color_fix: str = "wavelet", batch_size: int = 4, **sampling
    ) -> list[Image.Image]:
        """Restore aligned square crops; each is brought to the model's resolution and depends on its own pixels only.

        Raises ValueError for an unknown `color_fix` or `start`, TypeError for a key that no setting has.
        """
        if color_fix not in COLOR_FIXES:
            raise ValueError(f"`color_fix` has to be one of {', '.join(COLOR_FIXES)} but is {color_fix!r}")
        if batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1 but is {batch_size}")
        settings = replace(self.settings, **sampling)
        restored = []
        for start in range(0, len(crops), batch_size):
            degraded = to_pixel_values(crops[start : start + batch_size], settings.resolution).to(self.device)
            pixels = self._sample(degraded, settings)
            restored += to_pil(COLOR_FIXES[color_fix](pixels.clamp(-1, 1), degraded))
        return restored

    def _sample(self, degraded: Tensor, settings: RestorerSettings) -> Tensor:
        """Denoise under the degraded faces (B, 3, R, R) in [-1, 1] -> the same shape."""
        count = len(degraded)
        generators = [torch.Generator().manual_seed(settings.seed) for _ in range(count)]
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
            latents=self._noised(degraded, settings.steps, generators) if settings.start == "degraded" else None,
            output_type="latent",
        ).images
        # stock fp16 parts with an fp32 VAE raise a dtype error inside of the pipeline's own decoding
        return decode_latents(self.pipeline.vae, latents.float())

    def _noised(self, degraded: Tensor, steps: int, generators: list[torch.Generator]) -> Tensor:
        """Return the degraded faces' latents (B, C, h, w) under the noise of the first of `steps` steps."""
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
_FILES = {CLIPTokenizer: ("tokenizer.json", "vocab.json"), DDPMScheduler: ("scheduler_config.json",)}


def _align(photograph: Image.Image, faces: list[Face], size: int) -> list[tuple[Face, AlignedFace]]:
    """Align the faces that can be; the others are named in the log."""
    aligned = []
    for face in faces:
        try:
            if face.landmarks is None:
                raise ValueError("it has no landmarks")
            aligned.append((face, align_face(photograph, face.landmarks, size)))
        except ValueError as error:
            box = ", ".join(f"{edge:.0f}" for edge in face.box)
            logger.warning("the face at (%s) is left as it is: %s", box, error)
    return aligned


def read_settings(path: Path) -> RestorerSettings:
    """Read `restorer_config.json`; ValueError names a key that is unknown or a value of another type."""
    defaults = asdict(RestorerSettings())
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        if unknown := sorted(values.keys() - defaults.keys()):
            raise ValueError(f"unknown keys: {', '.join(unknown)}; it knows {', '.join(defaults)}")
        require_keys(values, {key: _kind(defaults[key]) for key in values})
        return RestorerSettings(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no restorer's settings: {error}") from error


def _kind(default):
    return (int, float) if isinstance(default, float) else type(default)


def _load(part_class, source: str, name: str, dtype: torch.dtype):
    """Load one part from its sub-folder of a local folder, or from the hub."""
    # looked at here: without these files transformers gives a tokenizer that knows no word, diffusers asks the hub
    files = _FILES.get(part_class, ("config.json",))
    if Path(source).is_dir() and not any((Path(source) / name / file).is_file() for file in files):
        raise FileNotFoundError(f"no {name} in {source}: there is no {Path(source) / name / files[0]}")
    if part_class not in _FILES:
        return load_part(part_class, source, name, torch.float32 if name == "vae" else dtype, name)
    try:
        return part_class.from_pretrained(source, subfolder=name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(hub_error("restorer", source)) from error
