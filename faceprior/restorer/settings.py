"""How a restorer is sampled: the settings that are saved with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from faceprior.jsonl import require_keys

RENAMED = {"steps": "num_inference_steps", "controlnet_scale": "controlnet_conditioning_scale"}  # in older files
SETTINGS_FILE = "restorer_config.json"
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

    resolution: side of the aligned crop in pixels. num_inference_steps: number of DDPM steps. guidance_scale: strength
    of classifier-free guidance, 1 is off. controlnet_conditioning_scale: weight of the degraded face, [0, 2]. seed:
    seed of every face's noise. start: what sampling starts from, pure `noise`, or `degraded`: the degraded face's
    latents under the noise of the first step. Colours drift less from there (SeeSR, arXiv 2311.16518), since at the
    last training step, too, a little of the image is left in x_t.
    """

    resolution: int = 512
    num_inference_steps: int = 50
    guidance_scale: float = 8.0
    controlnet_conditioning_scale: float = 1.0
    prompt: str = PROMPT
    negative_prompt: str = NEGATIVE_PROMPT
    seed: int = 123
    start: str = "noise"

    def __post_init__(self):
        if self.start not in STARTS:
            raise ValueError(f"`start` has to be one of {', '.join(STARTS)} but is {self.start!r}")


def read_settings(path: Path) -> RestorerSettings:
    """Read `restorer_config.json`; ValueError names an unknown key or a value of the wrong type."""
    defaults = asdict(RestorerSettings())
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
        values = {RENAMED.get(key, key): value for key, value in stored.items()}
        if unknown := sorted(values.keys() - defaults.keys()):
            raise ValueError(f"unknown keys: {', '.join(unknown)}; it knows {', '.join(defaults)}")
        require_keys(values, {key: _kind(defaults[key]) for key in values})
        return RestorerSettings(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold a restorer's settings: {error}") from error


def _kind(default):
    return (int, float) if isinstance(default, float) else type(default)
