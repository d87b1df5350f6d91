"""
Measure at which noise a face can be seen, where AuthFace's facial loss counts most (arXiv 2410.09864, appendix B).

    python -m faceprior.confidence --images ffhq/ --base stabilityai/stable-diffusion-xl-base-1.0 --resolution 512

Reads   a folder of aligned faces (empty: drawn portraits), and the VAE and the noise schedule of a base
Writes  results/confidence/: confidence.json (the curve, its crossing and m), confidence.svg (the curve, and the weight
        over time beside it, as the paper's Fig. 14), confidence.jsonl (a row for each face)

Each face's latents z_0 get noise of growing strength and are decoded: how confident is a face detector of D(z_t)? The
network plays no part. t is the place in the schedule, (timestep + 0.5) / T, of flow matching the noise level s; 0 is
clean. The same command resumes.

From the curve to m: the paper finds t = 0.32 where the mean confidence is 0.5, and sets m = -0.5, so that w(t) peaks at
sigmoid(-0.5) = 0.378, a little more noise than there. It gives no rule for another crossing. Ours keeps the paper's
distance on the axis that w(t) is a normal density of, the logit: m = logit(crossing) + (-0.5 - logit(0.32)), which is
logit(crossing) + 0.254, so that 0.32 gives -0.5.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from faceprior import tiny
from faceprior.align import align_face
from faceprior.bases import load_pipeline
from faceprior.clean_faces import readable_images
from faceprior.config import finish, is_complete, open_output, print_problems, run_stage
from faceprior.detect import SAME_FACE, detect_faces, overlap
from faceprior.diffusion import (
    add_noise,
    decode_latents,
    encode_latents,
    make_noise_scheduler,
    noise_like,
    prediction_type,
    require_side,
)
from faceprior.files import atomic_write, common_folder
from faceprior.images import load_image, to_pil, to_pixel_values
from faceprior.jsonl import append_row, resume_rows
from faceprior.losses import normalized_time, time_weight
from faceprior.models import device_of, quiet_libraries, resolve_device
from faceprior.procedural import VALIDATION_SEEDS, draw_portrait
from faceprior.report.charts import Chart, band_chart, line_chart
from faceprior.report.page import svg
from faceprior.training import stable_seed

logger = logging.getLogger(__name__)
CURVE_FILE, ROWS_FILE, CHART_FILE = "confidence.json", "confidence.jsonl", "confidence.svg"
HALF = 0.5  # the confidence whose crossing counts
PAPER_CROSSING, PAPER_M = 0.32, -0.5  # appendix B
RESAMPLES = 2000  # of the bootstrap
_AT_ONCE = 8  # images that are decoded in one batch


@dataclass
class Config:
    base: str = "tiny"  # model whose VAE and noise are used: diffusers folder, .safetensors file, hub id, or tiny
    images: str = ""  # folder of clean, aligned faces; empty: drawn portraits
    output: str = "results/confidence"  # folder for the curve and its chart
    num_images: int = 64  # number of faces, the first ones, [2, inf)
    levels: int = 25  # number of noise levels, evenly spaced over t, beside the clean one, [3, 1000]
    resolution: int = 128  # side of the faces in pixels, [64, 2048]
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto never downloads
    seed: int = 0  # seed of the noise, [0, inf)
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # start over in an output folder that holds a run


def main(config: Config) -> None:
    quiet_libraries()
    output = open_output(config)
    if is_complete(output):
        print(f"{output} is complete")
        return

    # ---- the faces, and what adds the noise
    paths, problems = readable_images(config.images) if config.images else ([], [])
    sources = paths[: config.num_images] or [VALIDATION_SEEDS + number for number in range(config.num_images)]
    pipeline = load_pipeline(tiny.resolve(config.base, "sdxl"))
    pipeline.vae.to(resolve_device(config.device))
    require_side(pipeline, config.resolution)

    # ---- the curve
    curve = measure_confidence(
        pipeline, sources, config.resolution, output, config.detector, config.levels, config.seed
    )
    finish(output, n=curve.n, crossing=curve.crossing, m=curve.m)
    print_problems(problems, "image")
    print(curve)


# ---- the curve


@dataclass(frozen=True)
class ConfidenceCurve:
    """Mean confidence of a detector of D(z_t) against t, with 95% intervals by bootstrap over the faces.

    t: the levels, from 0, clean (through the VAE); mean, low, high: of each level; n: faces; not_found: further ones in
    which the detector finds nothing without noise, either, and which do not count. crossing: t at which the mean falls
    below 0.5, None if it does not; m: of the weight over time, by `m_of`; the other two: their intervals, or None for
    one face, or where more than one in forty of the resampled curves has no crossing. noise: `ddpm` or `flow`, by which
    t is defined.
    """

    t: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    n: int
    not_found: int
    noise: str
    crossing: float | None = None
    crossing_interval: list[float] | None = None
    m: float | None = None
    m_interval: list[float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, t: Sequence[float], confidences: np.ndarray, not_found: int = 0, noise: str = "ddpm", **settings
    ) -> ConfidenceCurve:
        """Make the curve of single faces' confidences, (n, levels)."""
        t, n = np.asarray(t, float), len(confidences)
        mean = confidences.mean(axis=0)
        drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n  # (RESAMPLES, n)
        resampled = drawn @ confidences  # (RESAMPLES, levels)
        low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
        crossing = crossing_of(t, mean)
        values = [crossing_of(t, own) for own in resampled] if crossing is not None else [None]
        known = [value for value in values if value is not None]
        is_known = n > 1 and len(known) >= 0.975 * len(values)
        interval = np.quantile(known, (0.025, 0.975)) if is_known else None
        return cls(
            t=_rounded(t),
            mean=_rounded(mean),
            low=_rounded(low),
            high=_rounded(high),
            n=n,
            not_found=not_found,
            noise=noise,
            crossing=None if crossing is None else round(crossing, 4),
            crossing_interval=None if interval is None else _rounded(interval),
            m=None if crossing is None else round(m_of(crossing), 3),
            m_interval=None if interval is None else _rounded([m_of(value) for value in interval]),
            settings=settings,
        )

    def __str__(self) -> str:
        faces = f"{self.n} faces" + (f", and {self.not_found} in which none was found" if self.not_found else "")
        at_0 = f"without noise the mean confidence is {self.mean[0]:.2f}"
        if self.crossing is None:
            return (
                f"{faces}: {at_0}, and it does not fall from above to below {HALF}; at t = 1 it is {self.mean[-1]:.2f}"
            )
        text = f"{faces}: {at_0}, it falls below {HALF} at t = {self.crossing:.3f}{_interval(self.crossing_interval)}"
        peak = 1 / (1 + math.exp(-self.m))
        return f"{text}; so m = {self.m:.3f}{_interval(self.m_interval)}, whose weight peaks at t = {peak:.3f}"

    def require_m(self) -> float:
        """Return m; raise ValueError if the mean confidence never crosses 0.5."""
        if self.m is None:
            raise ValueError(
                f"`time_m` is auto, but there is no time to take it from: {self}. Give a number (the paper: "
                f"{PAPER_M}), or a detector that finds these faces"
            )
        return self.m


def crossing_of(t: Sequence[float], mean: Sequence[float]) -> float | None:
    """Return where a curve first falls from at least 0.5 to below it, on the line between two levels; None if nowhere.

    Also None where it begins below, or at 0.5 and falls at once: the logit of t = 0 is no number.
    """
    below = np.flatnonzero(np.asarray(mean) < HALF)
    if not len(below) or below[0] == 0:
        return None
    place = below[0]
    (t0, t1), (high, low) = t[place - 1 : place + 1], mean[place - 1 : place + 1]
    return float(t0 + (high - HALF) / (high - low) * (t1 - t0)) or None


def m_of(crossing: float) -> float:
    """Return m of the weight over time for a crossing in (0, 1): at the paper's distance from it on the logit."""
    return logit(crossing) + PAPER_M - logit(PAPER_CROSSING)


def logit(t: float) -> float:
    return math.log(t / (1 - t))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def _interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})"


# ---- measuring


def measure_confidence(
    pipeline: DiffusionPipeline,
    sources: Sequence[Path | int],
    resolution: int,
    output: str | Path,
    detector: str | Callable = "auto",
    levels: int = 25,
    seed: int = 0,
) -> ConfidenceCurve:
    """Measure the curve of a base, write it to `output`, and return it.

    pipeline: a base, whose VAE and scheduler are used, on the VAE's device; sources: files of aligned faces, or seeds
    of drawn portraits; levels: of noise, beside the clean one. Each face is a row of `confidence.jsonl` as soon as it
    is done, so that an interrupted measurement resumes; its noise depends on the seed and its place only, and is the
    same at all levels.
    """
    output = Path(output)
    noise_scheduler = make_noise_scheduler(pipeline)
    timesteps, t = noise_levels(noise_scheduler, levels)
    names = _names(sources)
    done = {row["image"]: row["confidence"] for row in resume_rows(output / ROWS_FILE)}
    for number, (name, source) in enumerate(zip(tqdm(names, "confidence", unit="face"), sources, strict=True)):
        if name not in done:
            generator = torch.Generator().manual_seed(stable_seed(seed, number, "confidence"))
            image = _load(source, resolution)
            done[name] = face_confidences(pipeline, noise_scheduler, image, timesteps, generator, detector)
            append_row(output / ROWS_FILE, {"image": name, "confidence": done[name]})

    # ---- the curve and its chart
    found = [done[name] for name in names if done[name] is not None]
    if not found:
        raise ValueError(
            f"no face was found in any of the {len(names)} images, even without noise: give aligned faces, or another "
            "`detector`"
        )
    noise = "flow" if prediction_type(noise_scheduler) == "flow_prediction" else "ddpm"
    told = detector if isinstance(detector, str) else "given"
    settings = {"resolution": resolution, "detector": told, "seed": seed}
    curve = ConfidenceCurve.of([0.0, *t], np.array(found), len(names) - len(found), noise, **settings)
    with atomic_write(output / CURVE_FILE, "w") as file:
        json.dump(asdict(curve), file, indent=1)
    with atomic_write(output / CHART_FILE, "w") as file:
        file.write(svg(charts(curve)))
    return curve


def auto_time_m(
    pipeline: DiffusionPipeline,
    sources: Sequence[Path | int],
    resolution: int,
    output: str | Path,
    detector: str | Callable = "auto",
) -> float:
    """Return m of the weight over time for a base and faces: measured once, then read from `output`.

    Arguments as of `measure_confidence`. Raises ValueError if the curve never crosses 0.5.
    """
    file = Path(output) / CURVE_FILE
    if file.is_file():
        curve = ConfidenceCurve(**json.loads(file.read_text(encoding="utf-8")))
    else:
        curve = measure_confidence(pipeline, sources, resolution, output, detector)
        logger.info("time_m: %s", curve)
    return curve.require_m()


def noise_levels(noise_scheduler, count: int) -> tuple[torch.Tensor, list[float]]:
    """Return `count` of the training scheduler's timesteps, spread evenly over t, and their t, from little noise on."""
    if prediction_type(noise_scheduler) == "flow_prediction":
        timesteps = noise_scheduler.timesteps.flip(0)
        t = noise_scheduler.sigmas[: len(timesteps)].flip(0)
    else:
        total = noise_scheduler.config.num_train_timesteps
        timesteps = torch.arange(total)
        t = normalized_time(timesteps, total)
    wanted = (torch.arange(count) + 0.5) / count
    places = (t[None] - wanted[:, None]).abs().argmin(dim=1).unique()
    return timesteps[places], t[places].tolist()


@torch.no_grad()
def face_confidences(
    pipeline: DiffusionPipeline,
    noise_scheduler,
    image: Image.Image,
    timesteps: torch.Tensor,
    generator: torch.Generator,
    detector: str | Callable,
) -> list[float] | None:
    """Return the detector's confidence of a face in D(z_0), and in D(z_t) at each timestep; 0 where it finds none.

    None if there is no face in the image itself. Only a detection at the place of that face counts, as detectors see
    faces in noise, too.
    """
    least = min(image.size) / 4
    face = next(iter(detect_faces(image, detector, 0.5, least)), None)
    if face is None:
        return None
    latents = encode_latents(pipeline.vae, to_pixel_values([image]).to(device_of(pipeline.vae)))
    noise = noise_like(latents, generator)
    confidences = []
    for levels in [timesteps[:0], *timesteps.split(_AT_ONCE)]:
        count = len(levels)
        noisy = latents if not count else _noised(noise_scheduler, latents, noise, levels)
        for picture in to_pil(decode_latents(pipeline.vae, noisy)):
            seen = detect_faces(picture, detector, 0, least)
            at_place = [other.confidence for other in seen if overlap(other.box, face.box) > SAME_FACE]
            confidences.append(round(max(at_place, default=0.0), 4))
    return confidences


def _noised(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Return one face's latents under its noise at all timesteps -> (levels, C, h, w)."""
    count = len(timesteps)
    repeated = (side.expand(count, *side.shape[1:]) for side in (latents, noise))
    return add_noise(noise_scheduler, *repeated, timesteps.to(latents.device))


def _names(sources: Sequence[Path | int]) -> list[str]:
    paths = [source for source in sources if isinstance(source, Path)]
    root = common_folder(paths) if paths else Path()
    return [s.relative_to(root).as_posix() if isinstance(s, Path) else f"drawn_{s}" for s in sources]


def _load(source: Path | int, resolution: int) -> Image.Image:
    """Return a face of resolution x resolution pixels; a drawn one is aligned by its true landmarks."""
    if isinstance(source, Path):
        return load_image(source).resize((resolution, resolution), Image.LANCZOS)
    drawing = draw_portrait(source, 2 * resolution)
    return align_face(drawing.image, drawing.landmarks, resolution).crop


# ---- the chart


def charts(curve: ConfidenceCurve) -> list[Chart]:
    """Return the confidence over t, and beside it the weight over time: the paper's, and with the measured m."""
    mean, low, high = (list(zip(curve.t, own, strict=True)) for own in (curve.mean, curve.low, curve.high))
    half = [(0.0, HALF), (1.0, HALF)]
    weights = {f"m = {PAPER_M} (the paper)": weight_curve(PAPER_M)}
    if curve.m is not None:
        weights[f"m = {curve.m:.2f} (measured)"] = weight_curve(curve.m)
    title = f"Confidence of a face in D(z_t), n = {curve.n}"
    return [
        band_chart(title, "mean, 95% interval", mean, low, high, {f"{HALF}": half}, "t", "confidence"),
        line_chart("Weight of the facial loss", weights, "t", "w(t)"),
    ]


def weight_curve(m: float, s: float = 1.0, points: int = 50) -> list[tuple[float, float]]:
    """Return (t, w(t)) of `time_weight` over (0, 1)."""
    t = (torch.arange(points) + 0.5) / points
    return list(zip(t.tolist(), time_weight(t, m, s).tolist(), strict=True))


if __name__ == "__main__":
    run_stage(main, Config)
