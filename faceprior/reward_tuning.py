"""Face Score as a differentiable reward of generated images (DRaFT, arXiv 2309.17400), and what watches it.

reward = FaceReward(FaceScorer.from_pretrained("OPPOer/FaceScore"))
tuner = GuidanceTuner.from_pretrained("my_model.safetensors", train="lora", reward=reward)
tuner.fit("data/pairs", objective="reward")

An image is sampled from noise, without gradients up to the last steps, decoded, and the face in it is scored; the
score's gradient flows back through these last steps (DRaFT-K). A model that is trained to please a scorer in the end
finds what pleases the scorer only. So `compare` measures from time to time what the scorer does not see.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from faceprior.detect import Face, detect_faces, representative_face
from faceprior.diffusion import (
    PromptEmbeddings,
    decode_checkpointed,
    is_flux,
    make_noise_scheduler,
    make_sampler,
    predict,
    prediction_type,
)
from faceprior.images import to_pil
from faceprior.quality import sharpness

logger = logging.getLogger(__name__)

# Samplers with a differentiable step that depends on the latents only, not on the steps before.
STATELESS = (DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler)

# ---- When a measure that the reward does not see has moved: the rule of `FaceReward.compare`
WINDOW = 16  # images, the last ones, that a change is judged by
LEAST_IMAGES = 8  # before anything is said
ERRORS = 2.0  # standard errors by which a mean has to differ from 0
FOUND_FALL = 0.1  # fall of the fraction of images with a face
CONFIDENCE_FALL = 0.01  # fall of the detector's confidence
RATIO = 1.5  # of sharpness, saturation or contrast after to before, or before to after
LEAST = 1e-3  # added to both of them, for images without any


class FaceReward:
    """The Face Score of generated images, with gradients to the network that drew them.

    scorer: a `FaceScorer`; steps: sampling steps of an image; last: K, those of them that the gradient flows through,
    [1, steps] (the first ones decide the layout, the last ones the details); guidance_scale: of classifier-free
    guidance, 1: none, as always with FLUX; weight: of the reward in the loss; detector, min_confidence, min_face_size:
    see `detect_faces`.
    """

    def __init__(
        self,
        scorer: nn.Module,
        detector: str | Callable = "auto",
        steps: int = 25,
        last: int = 1,
        guidance_scale: float = 7.5,
        weight: float = 1.0,
        min_confidence: float = 0.9,
        min_face_size: float = 20,
    ):
        if not 1 <= last <= steps:
            raise ValueError(
                f"`last` has to be in [1, steps], so up to {steps}, but is {last} (`reward_last` of stage 4)"
            )
        if not weight > 0:
            raise ValueError(f"`weight` has to be above 0 but is {weight}")
        self.scorer = scorer.requires_grad_(False).eval()
        self.steps, self.last, self.guidance_scale, self.weight = steps, last, guidance_scale, weight
        self._detection = (detector, min_confidence, min_face_size)

    def sample(
        self,
        pipeline: DiffusionPipeline,
        prompts: PromptEmbeddings,
        dropped: PromptEmbeddings,
        noise: Tensor,
        generators: list[torch.Generator],
        denoiser: Callable | None = None,
    ) -> Tensor:
        """Draw images from noise (B, C, h, w), with gradients through the last steps -> (B, 3, H, W), about [-1, 1].

        prompts, dropped: (B), of the images and of the unconditional branch; generators: one per image, for samplers
        that add noise; denoiser: as in `predict`. Under `torch.no_grad()` there are no gradients at all.
        """
        latents = sample_latents(
            pipeline, prompts, dropped, noise, generators, self.steps, self.last, self.guidance_scale, denoiser
        )
        return decode_checkpointed(pipeline.vae.to(latents.device), latents)

    def find_faces(self, images: Tensor) -> list[Face | None]:
        """Return the representative face of each image (B, 3, H, W) in [-1, 1]; None where none is found."""
        pictures = to_pil(images.detach())
        return [representative_face(detect_faces(image, *self._detection), image.size) for image in pictures]

    def __call__(self, images: Tensor, faces: list[Face | None] | None = None) -> Tensor:
        """Return the Face Score of each image's face -> (B,), NaN without one, with gradients to the pixels.

        images: (B, 3, H, W) in [-1, 1]; faces: those of `find_faces`, which is called if they are not given. The box
        is a constant: there is no gradient to where the face is.
        """
        faces = self.find_faces(images) if faces is None else faces
        rewards = 0 * images.float().sum(dim=(1, 2, 3)) + math.nan  # without a face the gradient is 0, not missing
        found = [index for index, face in enumerate(faces) if face is not None]
        if not found:
            return rewards
        self.scorer.to(images.device)
        crops = self.scorer.preprocess(images[found], [faces[index].box for index in found])
        return rewards.index_put((torch.tensor(found, device=images.device),), self.scorer(crops).float())

    # ---- what the reward does not see

    @torch.no_grad()
    def compare(self, before: Tensor, after: Tensor, history: list[dict[str, Any]]) -> dict[str, float]:
        """Compare images of the untuned and the tuned model at the same noise -> numbers for the log.

        before, after: (B, 3, H, W) in [-1, 1]; history: the rows of earlier calls, the last WINDOW
        images, for JSON; this call's are appended.

        Of this call's images: score_change, found_change and confidence_change (after - before, where both have a face;
        found: in the fraction with a face), sharpness_ratio (of the faces), saturation_ratio and contrast_ratio (after
        / before), drift (mean absolute difference of the pixels, [0, 1]); hacking: how many measures speak against the
        gain in score, over the last WINDOW images, LEAST_IMAGES at least:

            found       fell by more than FOUND_FALL and ERRORS standard errors, whatever the score did; or, while the
                        score rose by more than ERRORS standard errors,
            confidence  fell by more than CONFIDENCE_FALL and ERRORS standard errors,
            sharpness, saturation or contrast  grew or shrank by a factor of more than RATIO.

        Each that is new is reported in a warning: the score rises for another reason than better faces.
        """
        rows = [_row(*sides) for sides in zip(*(self._measure(images) for images in (before, after)), strict=True)]
        drift = (before.float().clamp(-1, 1) - after.float().clamp(-1, 1)).abs().mean().item() / 2
        known = moved_measures(history)
        history.extend(rows)
        del history[:-WINDOW]
        moved, values = moved_measures(history), summary(history)
        if set(moved) - set(known):
            logger.warning(
                "a sign of reward hacking: the Face Score changes by %+.3f while %s. Look at samples; train less, "
                "lower the learning rate or the reward's weight, or add the guidance loss",
                values["score_change"],
                ", ".join(f"{name} {_text(name, values)}" for name in moved),
            )
        return {**summary(rows), "drift": drift, "hacking": float(len(moved))}

    def _measure(self, images: Tensor) -> list[dict[str, float | None]]:
        faces, pictures = self.find_faces(images), to_pil(images)
        scores = self(images, faces).tolist()
        return [
            {
                "score": None if face is None else score,
                "confidence": None if face is None else face.confidence,
                "sharpness": None if face is None else sharpness(picture, face.box),
                **_colours(picture),
            }
            for face, score, picture in zip(faces, scores, pictures, strict=True)
        ]


# ---- sampling


def sample_latents(
    pipeline: DiffusionPipeline,
    prompts: PromptEmbeddings,
    dropped: PromptEmbeddings,
    noise: Tensor,
    generators: list[torch.Generator],
    steps: int,
    last: int,
    guidance_scale: float = 1.0,
    denoiser: Callable | None = None,
) -> Tensor:
    """Sample latents from noise, with gradients through the `last` of the `steps` -> (B, C, h, w) (DRaFT-K, 3.2).

    Arguments as of `FaceReward.sample`. The sampler is the pipeline's own if it is one of STATELESS, else DDIM, or for
    flow matching Euler. Each pass of the network is computed again in the backward pass, so that K of them take the
    memory of one.
    """
    scheduler = sampler_of(pipeline)
    set_timesteps(scheduler, pipeline, steps, noise)
    if is_flux(pipeline):
        guidance_scale = 1  # its guidance is distilled: there is no unconditional branch

    def predict_noise(latents: Tensor, timesteps: Tensor) -> Tensor:
        model_pred = predict(pipeline, latents, timesteps, prompts, denoiser)
        if guidance_scale == 1:
            return model_pred
        unconditional = predict(pipeline, latents, timesteps, dropped, denoiser)
        return unconditional + guidance_scale * (model_pred - unconditional)

    latents, keep, first = noise.float(), torch.is_grad_enabled(), len(scheduler.timesteps) - last
    for number, timestep in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(keep and number >= first):
            timesteps = timestep.to(latents.device).expand(len(latents))  # (B,)
            if torch.is_grad_enabled():
                model_pred = checkpoint(predict_noise, latents, timesteps, use_reentrant=False)
            else:
                model_pred = predict_noise(latents, timesteps)
            latents = scheduler.step(model_pred.float(), timestep, latents, generator=generators).prev_sample
    return latents


def sampler_of(pipeline: DiffusionPipeline):
    """Return a sampler with the noise schedule of the pipeline's own, whose steps are differentiable."""
    own = pipeline.scheduler
    if isinstance(own, STATELESS):
        return type(own).from_config(own.config)
    return make_noise_scheduler(pipeline) if prediction_type(own) == "flow_prediction" else make_sampler("ddim", own)


def set_timesteps(scheduler, pipeline: DiffusionPipeline, steps: int, latents: Tensor) -> None:
    """Set the sampling steps as the base's own pipeline does for latents (B, C, h, w) of this size."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(steps, device=latents.device)
        return
    config, options = scheduler.config, {}
    if config.use_dynamic_shifting:  # more noise for larger images, by the number of their tokens
        tokens = (latents.shape[-2] // 2) * (latents.shape[-1] // 2)
        lengths = config.base_image_seq_len, config.max_image_seq_len
        options["mu"] = calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)
    if is_flux(pipeline):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps, device=latents.device, **options)


# ---- measures


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the changes and ratios of `FaceReward.compare` over its rows; 0, and 1 for ratios, where no row counts."""
    pairs = [row for row in rows if None not in row["score"]]
    return {
        "score_change": _change(pairs, "score")[0],
        "found_change": _mean([_found(row, 1) - _found(row, 0) for row in rows])[0],
        "confidence_change": _change(pairs, "confidence")[0],
        "sharpness_ratio": _ratio(pairs, "sharpness"),
        "saturation_ratio": _ratio(rows, "saturation"),
        "contrast_ratio": _ratio(rows, "contrast"),
    }


def moved_measures(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of the measures that speak against a gain in score, by the rule of `FaceReward.compare`."""
    if len(rows) < LEAST_IMAGES:
        return []
    pairs, values = [row for row in rows if None not in row["score"]], summary(rows)
    moved = ["found"] if _falls(*_mean([_found(row, 1) - _found(row, 0) for row in rows]), FOUND_FALL) else []
    gain, error = _change(pairs, "score")
    if gain <= ERRORS * error:
        return moved
    moved += ["confidence"] if _falls(*_change(pairs, "confidence"), CONFIDENCE_FALL) else []
    ratios = {name: values[f"{name}_ratio"] for name in ("sharpness", "saturation", "contrast")}
    return moved + [name for name, ratio in ratios.items() if not 1 / RATIO <= ratio <= RATIO]


def _row(before: dict[str, float | None], after: dict[str, float | None]) -> dict[str, list[float | None]]:
    return {name: [before[name], after[name]] for name in before}


def _colours(picture: Image.Image) -> dict[str, float]:
    """Return the mean saturation (HSV) and the standard deviation of the grey levels of an image, [0, 1]."""
    return {
        "saturation": float(np.asarray(picture.convert("HSV"), np.float32)[..., 1].mean() / 255),
        "contrast": float(np.asarray(picture.convert("L"), np.float32).std() / 255),
    }


def _found(row: dict[str, Any], side: int) -> bool:
    return row["score"][side] is not None


def _change(pairs: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Return the mean of after - before, and its standard error."""
    return _mean([row[name][1] - row[name][0] for row in pairs])


def _mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error; 0 and infinity of no values."""
    if len(values) < 2:
        return float(sum(values)), math.inf
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _falls(mean: float, error: float, least: float) -> bool:
    return mean < -max(least, ERRORS * error)


def _ratio(rows: list[dict[str, Any]], name: str) -> float:
    before, after = (np.mean([row[name][side] for row in rows]) if rows else 0.0 for side in (0, 1))
    return float((after + LEAST) / (before + LEAST))


def _text(name: str, values: dict[str, float]) -> str:
    if name in ("found", "confidence"):
        return f"changes by {values[f'{name}_change']:+.3f}"
    return f"is {values[f'{name}_ratio']:.2f} times what it was"
