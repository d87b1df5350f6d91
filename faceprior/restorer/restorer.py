"""`AuthFaceRestorer`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

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

from faceprior.color import COLOR_FIXES, keep_tone
from faceprior.detect import Face
from faceprior.diffusion import is_xl, require_side
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
from faceprior.restorer.photographs import PhotographOptions, restore_photographs
from faceprior.restorer.results import RestoredImage
from faceprior.restorer.sampling import FaceSampler, make_generator, to_condition
from faceprior.restorer.settings import (
    NEGATIVE_PROMPT,
    PROMPT,
    SETTINGS_FILE,
    RestorerSettings,
    read_settings,
    require_whole,
)


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
            "`python stages/06_train_restorer.py` trains one; on the command line `tiny` is the small one that ships",
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
        faces: list[Face] | None = None,
        detector: str | Callable = "auto",
        min_confidence: float = 0.9,
        min_face_size: float = 20,
        upscale: int = 1,
        background: Callable[[Image.Image], Image.Image] | None = None,
        color_fix: str = "wavelet",
        keep_sharp: bool = True,
        scorer: Any = None,
        keep_better: bool | None = None,
        min_gain: float = 0.0,
        identity: Any = None,
        max_drift: float | None = None,
        batch_size: int = 4,
        recipe: str | None = None,
        fidelity: float | None = None,
        aligned: bool = False,
        process_size: int | None = None,
        **sampling,
    ) -> RestoredImage:
        """Restore every face of a photograph and paste it back, where that makes it better.

        image: path, PIL image, array, or what `read_source` read. faces: known faces with landmarks, instead of
        detection (`detector`, `min_confidence`, `min_face_size`: see `detect_faces`). upscale: whole factor of the
        result's size, 1 to 4. background: function from the photograph to an image of the same shape, such as an
        upscaler, for what is outside of the faces. color_fix: `wavelet`, `adain` or `none`; a grey or toned face keeps
        its tone with each of them. batch_size: faces per pass through the network. recipe: `official` or `fast`, in
        place of the checkpoint's own settings. fidelity: from 0, free, to 1, close to the photograph. sampling: single
        settings (num_inference_steps, guidance_scale, controlnet_conditioning_scale, seed, prompt, ...), see
        `RestorerSettings.override`.

        aligned: the image is one aligned face as a whole. Nothing is detected, judged or pasted; `upscale` enlarges it
        first, and process_size is the side of the result in pixels, see `restore_aligned`.

        What is not pasted is left as it is, and the result says why:

        - a face that cannot be aligned, since its landmarks are missing or do not span a face, with a warning in the
          log;
        - keep_sharp: a face larger in the photograph than the model's resolution that is really sharper than it (see
          `quality.fine_detail`), also where a scorer decides, which sees it at that resolution only;
        - scorer, an object with `score_crops(crops)` such as a FaceScorer, with keep_better, on by default with it: a
          face whose Face Score does not rise by `min_gain` at least;
        - identity, an object with `distance(before, after)` such as an IdentityModel, with max_drift: a face whose
          distance is above it.

        A larger face that is soft keeps the photograph's grain and texture that are finer than the model's pixels.
        Without a `background` every pixel outside of the faces is that of the photograph, also in its transparency, or
        of the photograph enlarged by LANCZOS; an image without a face is returned unchanged.
        """
        if aligned:
            source = image if isinstance(image, SourceImage) else read_source(image)
            options = {"color_fix": color_fix, "recipe": recipe, "fidelity": fidelity, **sampling}
            return RestoredImage(restore_aligned(self, source.rgb, upscale, process_size, **options), [], source)
        if process_size is not None:
            raise ValueError("`process_size` is the size of an aligned face: pass `aligned=True`, or leave it out")
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
            recipe=recipe,
            fidelity=fidelity,
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
        the photographs of a batch for which the memory did not suffice. What `images` itself raises is raised after
        the results of the photographs before. The noise is each face's own, also of the official recipe, so that a
        photograph does not depend on those beside it.
        """
        names = {field.name for field in fields(PhotographOptions)}
        own = PhotographOptions(**{name: value for name, value in options.items() if name in names})
        # a face's own noise: with that of a batch, a photograph would depend on those beside it
        sampling = {"noise": "face", **{name: value for name, value in options.items() if name not in names}}
        if isinstance(images, str | Path | bytes | Image.Image):
            raise TypeError(
                f"`images` has to be a list or iterable of photographs but is {images!r}: `restore` takes one"
            )

        def restore_crops(crops: list[Image.Image]) -> list[Image.Image]:
            return self.restore_crops(crops, color_fix, own.batch_size, **sampling)

        restore_crops([])  # wrong options are no photograph's error
        resolution = self.settings.override(**sampling).resolution
        return restore_photographs(images, faces, restore_crops, resolution, own)

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
        require_whole("batch_size", batch_size)
        settings = self.settings.override(recipe, fidelity, **sampling)
        require_side(self.pipeline, settings.resolution)
        require_whole(
            "num_inference_steps", settings.num_inference_steps, 1, self.pipeline.scheduler.config.num_train_timesteps
        )
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
