"""How a restorer is sampled: the settings that are saved with it, and the recipes, which are named sets of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from faceprior.diffusion import SAMPLERS
from faceprior.jsonl import require_keys

RENAMED = {"steps": "num_inference_steps", "controlnet_scale": "controlnet_conditioning_scale"}  # in older files
SETTINGS_FILE = "restorer_config.json"
STARTS = ("noise", "degraded")
NOISES = ("face", "batch")
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

    resolution: side of the aligned crop in pixels. num_inference_steps: number of sampling steps, of which the last
    `strength` are run. guidance_scale: strength of classifier-free guidance, 1 or less is off.
    controlnet_conditioning_scale: weight of the degraded face, [0, 2]. negative_prompt: None drops it,
    see `FaceSampler.encode`. seed: seed of the noise.

    start: what sampling starts from, pure `noise`, or `degraded`: the degraded face's latents under the noise of the
    first step. Colours drift less from there (SeeSR, arXiv 2311.16518), since at the last training step, too, a little
    of the image is left in x_t. strength: fraction of the steps that are run, (0, 1]; below 1, from `degraded` only.
    scheduler: `base` or one of `diffusion.SAMPLERS`, on the betas of the checkpoint's own; `base` is DDPM by all that
    the checkpoint's file says, also where it clips, which is meant for pixels.
    control_guidance_start, control_guidance_end: the part of the steps in which the ControlNet is on, fractions of
    them. guidance_low, guidance_high: the noise levels at which classifier-free guidance is on, as fractions of the
    training timesteps, from 0, clean, to 1; elsewhere a step costs half as much (Kynkäänniemi et al., arXiv 2404.07724,
    whose interval for SDXL, sigma from 0.28 to 5.42, is 0.073 to 0.813).
    noise: whose seed it is, each `face`'s, so that a face depends on its own pixels only, or that of a whole `batch`.
    half_residuals: round the ControlNet's residuals to float16, as the official code.
    """

    resolution: int = 512
    num_inference_steps: int = 50
    guidance_scale: float = 8.0
    controlnet_conditioning_scale: float = 1.0
    prompt: str = PROMPT
    negative_prompt: str | None = NEGATIVE_PROMPT
    seed: int = 123
    start: str = "noise"
    strength: float = 1.0
    scheduler: str = "ddpm"
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    noise: str = "face"
    half_residuals: bool = False

    def __post_init__(self):
        for field in fields(self):
            if field.name != "negative_prompt" or self.negative_prompt is not None:
                _require_kind(field.name, getattr(self, field.name), type(field.default))
        choices = {"start": STARTS, "scheduler": ("base", *SAMPLERS), "noise": NOISES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` has to be one of {', '.join(allowed)} but is {getattr(self, name)!r}")
        for name in ("num_inference_steps", "resolution"):
            require_whole(name, getattr(self, name))
        require_whole("seed", self.seed, -(2**63), 2**64 - 1)  # what torch takes
        if not self.controlnet_conditioning_scale >= 0:
            raise ValueError(
                f"`controlnet_conditioning_scale` has to be at least 0 but is {self.controlnet_conditioning_scale}"
            )
        if not 0 < self.strength <= 1:
            raise ValueError(f"`strength` has to be in (0, 1] but is {self.strength}")
        if self.strength < 1 and self.start != "degraded":
            raise ValueError(f"`strength` is {self.strength}, below 1, which only `start` degraded can have")
        for low, high in (("control_guidance_start", "control_guidance_end"), ("guidance_low", "guidance_high")):
            if not 0 <= getattr(self, low) < getattr(self, high) <= 1:
                raise ValueError(
                    f"`{low}` and `{high}` have to be in [0, 1], the first below the second, but are "
                    f"{getattr(self, low)} and {getattr(self, high)}"
                )

    def override(self, recipe: str | None = None, fidelity: float | None = None, **sampling: Any) -> RestorerSettings:
        """Return the settings with those of a recipe, then of a fidelity, then single ones in their place.

        Raises ValueError for an unknown recipe or a value out of range, TypeError for a name that no setting has.
        """
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"`recipe` has to be one of {', '.join(RECIPES)} but is {recipe!r}")
        chosen = replace(self, **(RECIPES[recipe] if recipe else {}))
        return replace(chosen, **{**(_of_fidelity(fidelity, chosen) if fidelity is not None else {}), **sampling})


# What the official inference code does, but for the size: the resolution is the checkpoint's own.
_OFFICIAL = {f.name: f.default for f in fields(RestorerSettings) if f.name != "resolution"}
RECIPES: dict[str, dict[str, Any]] = {
    "official": {**_OFFICIAL, "scheduler": "base", "noise": "batch", "half_residuals": True},
    # Few steps of a multistep solver with fresh noise, from the input, with guidance where it matters. Without fresh
    # noise the same solver was 0.5 dB of PSNR behind on the tiny models (see `tests/benchmarks/restoring.py quality`).
    "fast": {
        "scheduler": "sde-dpm++",
        "num_inference_steps": 8,
        "start": "degraded",
        "strength": 1.0,
        "guidance_low": 0.073,
        "guidance_high": 0.813,
        "noise": "face",
        "half_residuals": False,
    },
}
LOWEST_STRENGTH, LOWEST_SCALE = 0.1, 0.7  # at fidelity 1, and at fidelity 0


def _of_fidelity(fidelity: float, settings: RestorerSettings) -> dict[str, Any]:
    """Return the settings of a fidelity, from 0, free, to 1, close to the degraded face.

    Sampling starts from the degraded face, and runs the last 1 - 0.9 f of the steps: from all of its noise to a little.
    The ControlNet's own scale is multiplied by 0.7 + 0.3 f. `tests/benchmarks/restoring.py fidelity` shows the curve.
    """
    _require_kind("fidelity", fidelity, float)
    if not 0 <= fidelity <= 1:
        raise ValueError(f"`fidelity` has to be in [0, 1] but is {fidelity}")
    scale = settings.controlnet_conditioning_scale * (LOWEST_SCALE + (1 - LOWEST_SCALE) * fidelity)
    strength = 1 - (1 - LOWEST_STRENGTH) * fidelity
    return {"start": "degraded", "strength": strength, "controlnet_conditioning_scale": scale}


_KINDS = {bool: (bool, "true or false"), int: (Integral, "a whole number"), float: (Real, "a finite number")}


def _require_kind(name: str, value: Any, kind: type) -> None:
    """Raise ValueError for a value of another kind than bool, int, float or str; a bool is no number."""
    allowed, words = _KINDS.get(kind, (kind, "a text"))
    is_kind = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if not is_kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"`{name}` has to be {words} but is {value!r}")


def require_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise ValueError for what is not a whole number in [least, most]; True is none."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        rule = f"at least {least}" if is_whole else f"a whole number of at least {least}"
        rule = rule if most is None else f"a whole number from {least} to {most}"
        raise ValueError(f"`{name}` has to be {rule} but is {value!r}")


def read_settings(path: Path) -> RestorerSettings:
    """Read `restorer_config.json`; ValueError names an unknown key or a value of the wrong type."""
    defaults = asdict(RestorerSettings())
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
        values = {RENAMED.get(key, key): value for key, value in stored.items()}
        if unknown := sorted(values.keys() - defaults.keys()):
            raise ValueError(f"unknown keys: {', '.join(unknown)}; it knows {', '.join(defaults)}")
        kinds = {key: _kind(defaults[key]) for key in values}
        if values.get("negative_prompt", "") is None:
            del kinds["negative_prompt"]
        require_keys(values, kinds)
        return RestorerSettings(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold a restorer's settings: {error}") from error


def _kind(default):
    return (int, float) if isinstance(default, float) else type(default)
