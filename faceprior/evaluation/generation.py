"""The protocol `generation`: every method draws the same prompts from the same noise (Face Score, 6.1 and Table 5)."""

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
from faceprior.evaluation.items import Prompt, images_outside, without_images
from faceprior.evaluation.making import Problems, make_images, picture_file
from faceprior.evaluation.methods import BASE, GENERATOR_OPTIONS, Method, marked, match_by_stem, parse_methods
from faceprior.evaluation.rows import EvaluationRows
from faceprior.files import content_mark, copy_file
from faceprior.guidance import load_tuned
from faceprior.images import save_image
from faceprior.lora import find_lora
from faceprior.models import looks_like_path
from faceprior.photos import read_caption, safe_name

PROTOCOL = "generation"
TUNING = "04_guidance_tune"
LARGEST_SIDE = 2048  # pixels, as of `generation_resolution`
OWN = "own_"  # begins the id of a finished image that belongs to no prompt of the run


def generators_of(texts: Sequence[str], base: str, vae: str, prediction: str) -> list[Method]:
    """Read the setting `generators`; see `methods.parse_methods`. What does not exist has the reason as `missing`.

    base, vae, prediction: of the source `base`, and of tuned models that do not know their own. Raises ValueError for a
    pipeline of a kind that cannot be loaded.
    """
    methods = []
    for text, method in zip(texts, parse_methods(texts, GENERATOR_OPTIONS, "generators"), strict=True):
        folder = Path(method.source).expanduser()
        own = {"base": base, "vae": vae, "prediction_type": prediction}
        if method.source == BASE:
            method = replace(method, source=base, options={"vae": vae, "prediction_type": prediction} | method.options)
        elif looks_like_path(method.source) and not folder.exists():
            method = replace(
                method, missing=f"no tuned model in {method.source}: `python stages/{TUNING}.py` makes one"
            )
        elif folder.is_dir() and is_image_folder(folder):
            if wrong := [key for key in method.options if key != "prompts"]:
                raise ValueError(f"`generators` has the option {wrong[0]!r} in {text!r}, a folder of finished images")
            method = replace(method, kind="images", missing=without_images(folder))
        elif needs_base(folder):
            method = replace(method, options=own | tuned_from(folder) | method.options)
        side = method.options.get("resolution", "0")
        if not side.isdecimal() or int(side) > LARGEST_SIDE:
            raise ValueError(f"`generators`: the option resolution has to be in [0, {LARGEST_SIDE}] but is {side!r}")
        methods.append(_described(method))
    return marked(methods, "sd15")


def _described(method: Method) -> Method:
    """Say what is missing of a pipeline by its files alone, before anything is loaded."""
    if method.kind == "images" or method.missing:
        return method
    try:
        base = tiny.resolve(method.options.get("base", method.source), "sd15")
        describe_base(base, method.options.get("vae", ""), method.options.get("prediction_type", "auto"))
    except FileNotFoundError as error:
        return replace(method, missing=str(error))
    return method


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
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return any("lora" in name.lower() for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no .safetensors file ({error}): copy it again") from error


def tuned_from(folder: Path) -> dict[str, str]:
    """Return base, vae and prediction_type that stage 4 tuned the model of a folder with; {} where it does not say."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    settings = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get(TUNING) or {}
    return {key: str(settings[key]) for key in ("base", "vae", "prediction_type") if settings.get(key)}


def notes_of(rows: EvaluationRows, methods: Sequence[Method], prompts: Sequence[Prompt], settings: Any) -> list[str]:
    """Say how the images of a table were drawn; settings: the Config of stage 7."""
    size = f"{settings.generation_resolution} pixels" if settings.generation_resolution else "each model's own size"
    negative = f", negative prompt {settings.negative_prompt!r}" if settings.negative_prompt else ""
    number = f"{len(prompts)} images of {len({prompt.text for prompt in prompts})} prompts"
    sampling = f"{settings.sample_steps} steps, sampler {settings.sampler}, guidance scale {settings.guidance_scale}"
    drawn = f"{number}, {sampling}, {size}{negative}, seeds from {settings.seed}"
    return [drawn, *base_notes(methods, settings.base), *image_notes(rows, methods)]


def base_notes(methods: Sequence[Method], base: str) -> list[str]:
    """Name the tuned models that were tuned from a base that is not in the table, or are drawn with another."""
    bases = {str(Path(name)) for name in [base, *(method.source for method in methods)]}
    notes = []
    for method in methods:
        own = tuned_from(Path(method.source)).get("base") if method.kind == "model" else None
        used = method.options.get("base")
        if own and used and own != used:
            notes.append(f"{method.name}: tuned from {own}, but drawn with {used}")
        elif own and str(Path(own)) not in bases:
            notes.append(f"{method.name}: tuned from {own}, which is not in this table")
    return notes


def image_notes(rows: EvaluationRows, methods: Sequence[Method]) -> list[str]:
    """Say of the folders of finished images how many belong to a prompt of this run."""
    notes = []
    for method in methods:
        own = rows.of(PROTOCOL, method.name)
        if method.kind == "images" and own:
            matched = sum(not item.startswith(OWN) for item in own)
            number = "none belongs" if not matched else f"{matched} of {len(own)} belong"
            notes.append(
                f"{method.name}: {len(own)} finished images, of which {number} to a prompt of this run by name"
            )
    return notes


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
        own |= {"weights": method.weights} if method.weights else {}
        rows.add(PROTOCOL, method.name, prompt.id, prompt=prompt.text, prompt_set=prompt.prompt_set, **own)

    return make_images(draw, left, save, device, batch_size, f"drawing with {method.name}")


def _add_images(rows: EvaluationRows, method: Method, prompts: Sequence[Prompt], output: Path) -> Problems:
    """Add a row for every image of a folder: for its prompt, or, where names do not tell, as an item of its own."""
    done = rows.of(PROTOCOL, method.name)
    folder = Path(method.source).expanduser()
    files = images_outside(folder, output)
    matched = {} if method.options.get("prompts") == "none" else match_images(files, prompts)
    matched = matched or {f"{OWN}{safe_name(file.relative_to(folder).as_posix())}": file for file in files}
    marks = {item: content_mark(file) for item, file in matched.items()}
    rows.require_same(PROTOCOL, method.name, "contents", marks)
    by_id = {prompt.id: prompt for prompt in prompts}
    for item, file in matched.items():
        if item in done:
            continue
        place = picture_file(PROTOCOL, method.folder, item).with_suffix(file.suffix.lower())
        copy_file(file, output / place)  # no link: who edits one would edit the other
        prompt = by_id.get(item) or Prompt(item, read_caption(file) or "", 0)
        own = {"source": method.text, "image": place.as_posix(), "contents": marks[item]}
        rows.add(PROTOCOL, method.name, item, prompt=prompt.text, prompt_set=prompt.prompt_set, **own)
    return []


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
