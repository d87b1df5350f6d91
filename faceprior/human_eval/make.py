"""Make the benchmark that people rank: images of several models for the same prompts and seeds (Face Score, 4.2).

    python -m faceprior.human_eval make FOLDER --models SD1.5=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        tuned=checkpoints/guided SDXL=sd_xl_base_1.0.safetensors --prompts prompts.txt

Every model draws one image per prompt, all from the noise of the prompt's own seed. A triplet in which no image has a
valid face is discarded (4.2, step 2): its images move to FOLDER/discarded/, and its reason is in discarded.jsonl.
drawn.jsonl has a row per image: its seed and the number of its faces. prompts.jsonl, which makes the folder a
benchmark, comes last, with the prompts that are left. A run that was stopped is resumed by the same command, and more
prompts can be drawn by a larger `--num_prompts`.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from faceprior import tiny
from faceprior.config import CONFIG_FILE, open_output
from faceprior.detect import Detector, detect_faces, resolve_detector
from faceprior.human_eval.files import is_file_stem, read_prompt_table, require_no_answers
from faceprior.images import save_image
from faceprior.jsonl import append_row, resume_rows, rewrite_rows
from faceprior.models import looks_like_path, quiet_libraries, resolve_device, weight_dtype
from faceprior.prompts import read_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DRAWN, DISCARDED = "drawn.jsonl", "discarded.jsonl"
NO_FACE = "no image has a valid face"


@dataclass
class Config:
    models: tuple[str, ...] = ()  # NAME=SOURCE of each: diffusers folder, file, hub id, output of stage 4 or 5, or tiny
    prompts: str = ""  # `people`, `general`, or a file: text, COCO captions, MJHQ-30K, .csv or .jsonl with ids
    output: str = ""  # folder of the benchmark: the FOLDER of the command line
    base: tuple[str, ...] = ()  # NAME=BASE of a model that is a LoRA or a U-Net alone
    vae: tuple[str, ...] = ()  # NAME=VAE of a model that is published without its VAE
    num_prompts: int = 0  # number of prompts, the first ones of the file; 0: all, [0, inf)
    resolution: int = 0  # side of the images in pixels; 0: that which each model is meant for, [0, 2048]
    sample_steps: int = 50  # sampling steps (the paper: 50), [1, 1000]
    guidance_scale: float = 7.5  # classifier-free guidance scale (the paper: 7.5), [1, 30]
    sampler: Literal["base", "pndm", "ddim", "ddpm", "euler", "dpm++"] = "base"  # sampler (the paper: pndm)
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto never downloads
    min_confidence: float = 0.9  # lowest confidence of the detector that counts as a face, [0, 1]
    min_face_size: int = 20  # minimum shorter side of a face box in pixels, [8, 1024]
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the networks
    seed: int = 0  # seed of the first prompt's noise; each prompt has the next, [0, inf)
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # new start in a folder that holds images, which are deleted

    FREE = frozenset({"num_prompts"})


@dataclass(frozen=True)
class Source:
    """Where a model comes from. tuned: a folder of stage 4 or 5, a LoRA or a U-Net, for `base`; else a base itself."""

    base: str
    tuned: str = ""
    vae: str = ""
    prediction_type: str = "auto"

    def load(self, dtype: Any) -> "DiffusionPipeline":
        from faceprior.bases import load_pipeline
        from faceprior.guidance import load_tuned

        if self.tuned:
            return load_tuned(self.tuned, self.base, dtype, self.vae or None, self.prediction_type)
        return load_pipeline(self.base, dtype, self.vae or None, self.prediction_type)


@dataclass(frozen=True)
class Made:
    """What is in the folder: numbers of models and of kept prompts, ids of discarded prompts."""

    models: int
    kept: int
    discarded: tuple[str, ...]


def make_benchmark(config: Config, detector: Detector | None = None) -> Made:
    """Draw what is missing of a benchmark, then write its prompts.

    detector: a function that finds faces (see `detect_faces`), in place of the one that the settings name.

    Raises FileNotFoundError for a model or prompts that do not exist, FileExistsError for a folder of other settings or
    one whose images people have judged, ValueError for settings that do not fit.
    """
    # ---- check the inputs before anything is loaded
    quiet_libraries()
    sources = find_sources(config)
    prompts = find_prompts(config.prompts)
    wanted = list(prompts)[: config.num_prompts or None]
    device, detector = resolve_device(config.device), detector or resolve_detector(config.detector)
    if config.overwrite:
        require_no_answers(config.output)
    output = open_output(config)
    rows = resume_rows(output / DRAWN)
    for row in rows:
        if prompts.get(row["id"]) != row["prompt"]:
            raise ValueError(
                f"{output / DRAWN}: {row['id']} was drawn for {row['prompt']!r}, which is not its prompt in"
                f" {config.prompts}: give the same prompts, or another folder"
            )

    # ---- draw, a model at a time in memory
    seeds = {name: config.seed + i for i, name in enumerate(prompts)}
    done = {(row["model"], row["id"]) for row in rows}
    for model, source in sources.items():
        left = {name: (prompts[name], seeds[name]) for name in wanted if (model, name) not in done}
        if left:
            draw = _drawer(config, source, device)
            rows += _draw_images(config, output, model, draw, left, detector)
            del draw
            gc.collect()

    # ---- discard triplets without a face, and write the prompts that are left
    return _finish(output, list(sources), prompts, rows)


def find_sources(config: Config) -> dict[str, Source]:
    """Return where each model comes from, by its name; raises where it cannot be found, before anything is loaded."""
    models, bases, vaes = (_by_name(option, getattr(config, option)) for option in ("models", "base", "vae"))
    if len(models) < 2:
        raise ValueError(f"`models` has to name two models or more (people rank three) but names {len(models)}")
    for option, values in (("base", bases), ("vae", vaes)):
        if unknown := values.keys() - models.keys():
            raise ValueError(f"`{option}` is of {', '.join(sorted(unknown))}, but the models are {', '.join(models)}")
    return {name: _find_source(source, bases.get(name, ""), vaes.get(name, "")) for name, source in models.items()}


def _by_name(option: str, values: tuple[str, ...]) -> dict[str, str]:
    """Split NAME=VALUE; the name becomes that of a folder."""
    found: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not value or not is_file_stem(name) or name in found:
            raise ValueError(f"`{option}` has to be NAME=VALUE, each name once and fit for a folder, but is {text!r}")
        found[name] = value
    return found


def _find_source(source: str, base: str, vae: str) -> Source:
    from faceprior.bases import describe_base

    path = Path(source).expanduser()
    if looks_like_path(source) and not path.exists():
        raise FileNotFoundError(f"no model in {source}: stages/04_guidance_tune.py tunes one, or give a hub id")
    stage = {} if base else _settings_of(path)
    if base or stage:
        kind = "sdxl" if stage.get("section") == "05_prior_tune" else "sd15"
        base = tiny.resolve(base or stage["base"], kind)
        found = Source(base, source, vae or stage.get("vae", ""), stage.get("prediction_type", "auto"))
        if stage and (path / "model_index.json").is_file():  # whole in itself
            return found
    else:
        found = Source(tiny.resolve(source, "sd15"), vae=vae)
    describe_base(found.base, found.vae or None, found.prediction_type)
    return found


def _settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings that stage 4 or 5 saved in a folder, with the `section`; empty where it is none of theirs."""
    if not (folder / CONFIG_FILE).is_file():
        return {}
    sections = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for section, settings in sections.items() if isinstance(sections, dict) else ():
        if isinstance(settings, dict) and "base" in settings:
            return {**settings, "section": section}
    return {}


def find_prompts(path: str) -> dict[str, str]:
    """Return the prompts of a list that ships or of a file, by their ids; those without ids are numbered from 0001."""
    if Path(path).suffix in (".csv", ".jsonl") and Path(path).is_file():
        return read_prompt_table(path)
    return {f"{number:04d}": prompt for number, prompt in enumerate(read_prompts(path), 1)}


def _drawer(config: Config, source: Source, device: Any) -> Callable[[str, int], Any]:
    """Load a model; returns the function (prompt, seed) -> image."""
    from faceprior.diffusion import make_sampler, native_side, report_small_side, require_side, sample_images

    pipeline = source.load(weight_dtype(config.mixed_precision)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_sampler(config.sampler, pipeline.scheduler)
    side = config.resolution or native_side(pipeline)
    if side is None:
        raise ValueError(f"{source.tuned or source.base} does not say which size it is meant for: give `--resolution`")
    require_side(pipeline, side)
    report_small_side(pipeline, side)
    options = (side, config.sample_steps, config.guidance_scale)
    return lambda prompt, seed: sample_images(pipeline, [prompt], [seed], *options)[0]


def _draw_images(
    config: Config, output: Path, model: str, draw: Callable, left: dict[str, tuple[str, int]], detector: Detector
) -> list[dict[str, Any]]:
    """Draw one image per prompt (id -> prompt, seed), count its faces and append its row; returns the rows."""
    from tqdm.auto import tqdm

    rows = []
    for name, (prompt, seed) in tqdm(left.items(), desc=f"drawing with {model}", unit="image", disable=None):
        image = draw(prompt, seed)
        save_image(image, output / "images" / model / f"{name}.png")
        faces = detect_faces(image, detector, config.min_confidence, config.min_face_size)
        rows.append({"id": name, "model": model, "prompt": prompt, "seed": seed, "faces": len(faces)})
        append_row(output / DRAWN, rows[-1])
    return rows


def _finish(output: Path, models: list[str], prompts: dict[str, str], rows: list[dict[str, Any]]) -> Made:
    faces: dict[str, dict[str, int]] = {}
    for row in rows:
        faces.setdefault(row["id"], {})[row["model"]] = row["faces"]
    whole = [name for name in prompts if faces.get(name, {}).keys() >= set(models)]
    discarded = [name for name in whole if not any(faces[name].values())]
    for name in discarded:
        for model in models:
            image = Path(model) / f"{name}.png"
            if (output / "images" / image).exists():  # else a run that was killed has moved it
                (output / "discarded" / model).mkdir(parents=True, exist_ok=True)
                (output / "images" / image).replace(output / "discarded" / image)
    without = [{"id": name, "prompt": prompts[name], "reason": NO_FACE} for name in discarded]
    rewrite_rows(output / DISCARDED, without)
    kept = [{"id": name, "prompt": prompts[name]} for name in whole if name not in set(discarded)]
    if not kept:
        raise ValueError(f"no image of any prompt has a valid face: look at {output / 'discarded'}")
    rewrite_rows(output / "prompts.jsonl", kept)
    return Made(len(models), len(kept), tuple(discarded))
