"""The protocol `generation`: every method draws the same prompts from the same noise (Face Score, 6.1 and Table 5)."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from faceprior import tiny
from faceprior.bases import describe_base, load_pipeline
from faceprior.config import CONFIG_FILE
from faceprior.diffusion import make_sampler, native_side, report_long_prompts, require_side, sample_images
from faceprior.evaluation.items import Prompt
from faceprior.evaluation.making import Problems, make_images, picture_file
from faceprior.evaluation.methods import BASE, GENERATOR_OPTIONS, Method, match_by_stem, parse_methods
from faceprior.evaluation.rows import EvaluationRows
from faceprior.files import copy_file, find_images
from faceprior.guidance import load_tuned
from faceprior.images import save_image
from faceprior.lora import find_lora
from faceprior.models import looks_like_path
from faceprior.photos import read_caption, safe_name

PROTOCOL = "generation"
TUNING = "04_guidance_tune"


def generators_of(texts: Sequence[str], defaults: Sequence[str], base: str, vae: str, prediction: str) -> list[Method]:
    """Read the setting `generators`; see `methods.parse_methods`.

    base, vae, prediction: of the source `base`, and of tuned models that do not know their own. defaults: texts whose
    folders may not exist yet. Raises FileNotFoundError for another folder that does not exist.
    """
    methods = []
    for text, method in zip(texts, parse_methods(texts, GENERATOR_OPTIONS, "generators"), strict=True):
        folder = Path(method.source).expanduser()
        own = {"base": base, "vae": vae, "prediction_type": prediction}
        if method.source == BASE:
            method = replace(method, source=base, options={"vae": vae, "prediction_type": prediction} | method.options)
        elif looks_like_path(method.source) and not folder.exists():
            reason = f"no tuned model in {method.source}: `python stages/{TUNING}.py` makes one"
            if text not in defaults:
                raise FileNotFoundError(reason)
            method = replace(method, missing=reason)
        elif folder.is_dir() and is_image_folder(folder):
            method = replace(method, kind="images")
        elif needs_base(folder):
            method = replace(method, options=own | tuned_from(folder) | method.options)
        methods.append(method)
    return methods


def is_image_folder(folder: Path) -> bool:
    """Tell whether a folder holds finished images and no model."""
    parts = ("model_index.json", "unet", "config.json", CONFIG_FILE)
    return not any((folder / part).exists() for part in parts) and not any(folder.glob("*.safetensors"))


def needs_base(path: Path) -> bool:
    """Tell whether a model is tuned weights only: a LoRA, or a U-Net, without the other parts of a pipeline."""
    if path.is_dir():
        is_pipeline = (path / "model_index.json").is_file() and find_lora(path) is None
        return not is_pipeline
    return path.is_file() and _is_lora_file(path)


def _is_lora_file(path: Path) -> bool:
    from safetensors import safe_open

    if path.suffix.lower() != ".safetensors":
        return False
    with safe_open(path, "pt") as file:
        return any("lora" in name.lower() for name in file.keys())  # noqa: SIM118


def tuned_from(folder: Path) -> dict[str, str]:
    """Return base, vae and prediction_type that stage 4 tuned the model of a folder with; {} where it does not say."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    settings = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get(TUNING) or {}
    return {key: str(settings[key]) for key in ("base", "vae", "prediction_type") if settings.get(key)}


def base_note(method: Method, base: str) -> str:
    """Say that a tuned model was not tuned from the base of the comparison; empty where it was."""
    own = tuned_from(Path(method.source)).get("base") if method.kind == "model" else None
    used = method.options.get("base")
    if own and used and own != used:
        return f"tuned from {own}, but drawn with {used}"
    return f"tuned from {own}, not from {base}" if own and own != base else ""


def require_model(method: Method) -> None:
    """Raise FileNotFoundError or ValueError where the pipeline of a method would not load, by its files alone."""
    if method.kind == "model" and not method.missing:
        base = tiny.resolve(method.options.get("base", method.source), "sd15")
        describe_base(base, method.options.get("vae", ""), method.options.get("prediction_type", "auto"))


def load_generator(method: Method, dtype: torch.dtype) -> Any:
    """Load the pipeline of a method."""
    options = method.options
    vae, prediction = options.get("vae", ""), options.get("prediction_type", "auto")
    if base := options.get("base"):
        return load_tuned(method.source, tiny.resolve(base, "sd15"), dtype, vae, prediction)
    return load_pipeline(tiny.resolve(method.source, "sd15"), dtype, vae, prediction)


def draw_images(
    rows: EvaluationRows,
    method: Method,
    prompts: Sequence[Prompt],
    output: Path,
    device: torch.device,
    dtype: torch.dtype,
    sampler: str,
    sampling: dict[str, Any],
    batch_size: int,
) -> Problems:
    """Write the image of a method for every prompt that has none -> (prompt's id, reason) of what failed.

    sampling: size, steps, guidance_scale and negative_prompt of `sample_images`; a size of 0 is that which each model
    is meant for, and a method's own option `resolution` goes first.
    """
    done = rows.of(PROTOCOL, method.name)
    left = [prompt for prompt in prompts if prompt.id not in done]
    if method.missing:
        return []
    if method.kind == "images":
        return _add_images(rows, method, prompts, output)
    if not left:
        return []
    pipeline = load_generator(method, dtype).to(device)
    pipeline.scheduler = make_sampler(sampler, pipeline.scheduler)
    report_long_prompts(pipeline, [prompt.text for prompt in left])
    size = int(method.options.get("resolution", 0)) or sampling["size"] or native_side(pipeline)
    if not size:
        raise ValueError(
            f"`generation_resolution` is 0, but {method.source} does not say what it is meant for: give it"
        )
    require_side(pipeline, size)

    def draw(batch: list[Prompt]) -> list[Image.Image]:
        texts, seeds = [prompt.text for prompt in batch], [prompt.seed for prompt in batch]
        return sample_images(pipeline, texts, seeds, **{**sampling, "size": size})

    def save(prompt: Prompt, image: Image.Image, seconds: float) -> None:
        file = picture_file(PROTOCOL, method.folder, prompt.id)
        save_image(image, output / file)
        own = {"source": method.text, "image": file.as_posix(), "seconds": seconds}
        rows.add(PROTOCOL, method.name, prompt.id, prompt=prompt.text, prompt_set=prompt.prompt_set, **own)

    return make_images(draw, left, save, device, batch_size, f"drawing with {method.name}")


def _add_images(rows: EvaluationRows, method: Method, prompts: Sequence[Prompt], output: Path) -> Problems:
    """Add a row for every image of a folder: for its prompt, or, where names do not tell, as an item of its own."""
    done = rows.of(PROTOCOL, method.name)
    files = find_images(Path(method.source).expanduser())
    matched = match_images(files, prompts) or {f"own_{safe_name(file.name)}": file for file in files}
    by_id = {prompt.id: prompt for prompt in prompts}
    for item, file in matched.items():
        if item in done:
            continue
        place = picture_file(PROTOCOL, method.folder, item).with_suffix(file.suffix.lower())
        _take_in(file, output / place)
        prompt = by_id.get(item) or Prompt(item, read_caption(file) or "", 0)
        own = {"source": method.text, "image": place.as_posix()}
        rows.add(PROTOCOL, method.name, item, prompt=prompt.text, prompt_set=prompt.prompt_set, **own)
    return []


def _take_in(file: Path, place: Path) -> None:
    """Give a file a second name, or, on another disk, a copy: the results are whole without their sources."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), place)
    except OSError:
        copy_file(file, place)


def match_images(files: Sequence[Path], prompts: Sequence[Prompt]) -> dict[str, Path]:
    """Return the file of every prompt, {} where names do not tell.

    Files are named as the items of this stage are, or numbered: as many as there are prompts, in their order.
    """
    numbers = [int(file.stem) if file.stem.isdecimal() else None for file in files]
    if len(files) == len(prompts) and None not in numbers:
        ordered = sorted(zip(numbers, files, strict=True))
        if [number for number, _ in ordered] == list(range(ordered[0][0], ordered[0][0] + len(files))):
            return {prompt.id: file for prompt, (_, file) in zip(prompts, ordered, strict=True)}
    return match_by_stem(files, [prompt.id for prompt in prompts])
