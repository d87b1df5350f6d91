"""
Stage 1: make (good, bad) face pairs by inpainting (Face Score, arXiv 2406.17100, sections 4.4 and 8.4).

    python stages/01_make_pairs.py                                     # offline: drawn pictures, the tiny model
    python stages/01_make_pairs.py --images photos/ --config stages/presets/sd15.yaml

Reads   photographs of people: a folder, a glob, a file, a .txt list of paths, or WebDataset shards (`{000..009}.tar`)
Writes  data/pairs/: good/ bad/ mask/ as PNG, manifest.jsonl (one pair a row), photographs.jsonl (what was found in
        each photograph), rejected.jsonl (what failed a filter: its name and the reason), report.json (the counts)
"""

import json
from collections import ChainMap
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from faceprior import filters, tiny
from faceprior.config import DONE_FILE, is_complete, open_output, print_problems, run_stage
from faceprior.detect import AREA_LIMITS, Detector, detect_faces, face_square, finds_face, resolve_detector
from faceprior.diffusion import load_pipeline
from faceprior.images import atomic_write, save_image
from faceprior.inpaint import (
    NOISE_FACTORS,
    FaceInpainter,
    FacePlan,
    PairBatch,
    change_outside,
    masked_difference,
    plan_face,
    prepare_photograph,
)
from faceprior.jsonl import MANIFEST, KeyedRows, resume_rows, rewrite_rows, sort_rows
from faceprior.models import quiet_libraries, resolve_device, weight_dtype
from faceprior.pairs import FacePair, count_bins
from faceprior.photos import Photograph, find_photographs, safe_name
from faceprior.procedural import draw_folder, draw_scenes
from faceprior.quality import perceptual_hash
from faceprior.streams import in_background, in_groups
from faceprior.training import METRICS_FILE, finish, stable_seed

PHOTOGRAPHS, REJECTED, REPORT = "photographs.jsonl", "rejected.jsonl", "report.json"


@dataclass
class Config:
    images: str = ""  # folder, glob, file, .txt list or .tar shards of photographs; empty: the project draws some
    num_drawn: int = 48  # portraits to draw when no photographs are given, [1, inf)
    num_scenes: int = 8  # and scenes with smaller faces, drawn at `max_resolution`, [0, inf)
    base: str = "tiny"  # model that inpaints: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE in place of the base's own
    output: str = "data/pairs"  # folder for the pairs
    resolution: int = 128  # pixels; smaller pictures are enlarged to about resolution x resolution, [64, 2048]
    max_resolution: int = 512  # pixels; larger ones are shrunk to about that; 0: to `resolution`, [0, 2048]
    prompt: str = ""  # prompt of the inpainting; empty: the caption beside the photograph, else "A face."
    steps: int = 50  # sampling steps, of which the last int(noise factor x steps) are run, [1, 1000]
    guidance_scale: float = 2.5  # classifier-free guidance, [1, 30]
    area_limits: tuple[float, ...] = AREA_LIMITS  # upper face-area ratio of each bin (Table 8), (0, 1]
    noise_factors: tuple[float, ...] = NOISE_FACTORS  # noise factor of each bin (Table 8), (0, 1]
    padded_crop: bool = True  # faces that do not fill the picture are worked on in a crop at `resolution`; paper: no
    crop_noise_factors: tuple[float, ...] = (0.2, 0.2, 0.3, 0.4)  # noise factor of each bin in such a crop, (0, 1]
    round_trip: bool = True  # the good face goes through the VAE, too, so that its traces are on both sides; paper: no
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto never downloads
    min_side: int = 64  # filter small_photograph: pixels, shorter side of the photograph, [1, inf)
    max_hash_distance: int = 4  # filter near_duplicate: bits of 64 in which such photographs differ; -1: off, [-1, 64]
    min_face_size: int = 16  # filter too_small: pixels of the prepared picture, shorter side of the face, [8, 1024]
    min_confidence: float = 0.9  # filter low_confidence: of the detector, [0, 1]
    min_sharpness: float = 0.05  # filter blurry: 0.05 is a blur of 2% of the face's side, 0.1 of 1.2%; 0: off, [0, 20]
    min_difference: float = 1.0  # filter indistinguishable: mean change of the face, 0-255; 0: off, [0, 255]
    drop_not_found: bool = True  # filter face_not_found: drop pairs whose good face the round trip loses; else unused
    drop_lost: bool = False  # filter face_lost: drop pairs in whose bad picture the detector finds no face any more
    batch_size: int = 8  # faces inpainted at once, fewer of pictures larger than resolution x resolution, [1, 256]
    num_workers: int = 2  # threads that read, detect and write while the network runs, 0: none, [0, 64]
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the networks
    seed: int = 0  # every face's own seed is derived from it and from the photograph's name, [0, inf)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    overwrite: bool = False  # start anew in an output folder that holds a run


def main(config: Config) -> None:
    check_settings(config)
    quiet_libraries()
    device = resolve_device(config.device)
    made = [Path(config.output) / side for side in ("good", "bad", "mask")]  # also where it lies among the photographs
    sources, problems = find_photographs(config.images, made) if config.images else (None, [])
    output = open_output(config)
    photographs, rejected = KeyedRows(output / PHOTOGRAPHS, "photograph"), KeyedRows(output / REJECTED)
    filters.forget_mended(sources or [], photographs, rejected)
    if is_complete(output) and (sources is None or all(source.name in photographs for source in sources)):
        print(f"{output} is complete: {len(resume_rows(output / MANIFEST))} pairs")
        return
    (output / DONE_FILE).unlink(missing_ok=True)  # photographs came in: not complete before they are done, too
    if sources is None:
        sources = draw_sources(config, output / "drawn")

    pipeline = load_pipeline(tiny.resolve(config.base, "sd15"), weight_dtype(config.mixed_precision), config.vae)
    inpainter = FaceInpainter(pipeline.to(device), config.steps, config.guidance_scale)
    if config.padded_crop:
        inpainter.check_side(config.resolution)
    for factor in (*config.noise_factors, *(config.crop_noise_factors if config.padded_crop else ())):
        inpainter.check_strength(factor)
    detector = resolve_detector(config.detector)  # loaded here, not in several threads at once

    pairs = KeyedRows(output / MANIFEST)
    known = ChainMap(pairs, rejected)
    for place, reason in problems:
        rejected.add(filters.rejection(place, place, "unreadable", reason))
    # From here on nothing is computed until the last loop asks for it. The network runs in this thread, and what
    # stands in `in_background` in others: while a batch is inpainted, the next is read and the last one written.
    judged = len(pairs) + sum(row["filter"] in filters.FILTERS["pairs"] for row in rejected.values())
    with tqdm(total=0, initial=judged, desc="inpainting", unit="face") as bar:
        background = partial(in_background, num_workers=config.num_workers)
        find = partial(find_faces, config, output, photographs, detector, inpainter.multiple)
        found = background(find, tqdm(sources, desc="detecting", unit="photo"), ahead=4 * config.batch_size)
        kept = filters.keep_photographs(found, photographs, pairs, rejected, config.max_hash_distance)
        plans = plan_faces(config, kept, bar)
        batches = in_groups(plans, lambda plan: (plan.strength, plan.view_size), partial(batch_size, config))
        left = (batch for batch in batches if any(plan.id not in known for plan in batch))
        loaded = background(partial(PairBatch.load, output, config.resolution), left, ahead=2)
        drawn = (batch.inpaint(inpainter, config.round_trip) for batch in loaded)
        for rows in background(partial(write_batch, config, output, known, detector), drawn, ahead=2):
            for row in rows:
                (rejected if "filter" in row else pairs).add(row)
            bar.update(len(rows))
    summarize(config, output, len(sources))


def check_settings(config: Config) -> None:
    for name in ("noise_factors", "crop_noise_factors"):
        if len(getattr(config, name)) != len(config.area_limits):
            raise ValueError(f"`{name}` needs one value for each of the {len(config.area_limits)} `area_limits`")
    if list(config.area_limits) != sorted(set(config.area_limits)) or config.area_limits[-1] != 1:
        raise ValueError(f"`area_limits` have to rise and to end with 1 but are {config.area_limits}")
    if 0 < config.max_resolution < config.resolution:
        raise ValueError(
            f"`max_resolution` has to be 0, or `resolution` ({config.resolution}) at least, but is "
            f"{config.max_resolution}"
        )


def draw_sources(config: Config, folder: Path) -> list[Photograph]:
    """Draw portraits, whose faces fall into the last bin of Table 8, and scenes for the other three."""
    seeds = range(config.num_drawn, config.num_drawn + config.num_scenes)  # other people than the portraits'
    draw_folder(folder, range(config.num_drawn), config.resolution)
    draw_scenes(folder, seeds, config.max_resolution or config.resolution)
    return find_photographs(str(folder))[0]


def find_faces(
    config: Config, output: Path, known: KeyedRows, detector: Detector, multiple: int, source: Photograph
) -> dict:
    """Return a photograph's row: its faces, each with the filter that it fails, if any; the good side is saved."""
    if source.name in known:
        return known[source.name]
    row = {"photograph": source.name, "faces": []}
    try:
        photograph, caption = source.load(), source.caption()
    except (ValueError, FileNotFoundError, PermissionError) as error:  # but a full disk ends the stage
        return row | {"filter": "unreadable", "reason": str(error)}
    width, height = photograph.size
    if min(width, height) < config.min_side:
        return row | {"filter": "small_photograph", "reason": f"{width} x {height} pixels: below {config.min_side}"}
    good = prepare_photograph(photograph, config.resolution, multiple, config.max_resolution)
    faces = detect_faces(good, detector, 0, config.min_face_size / 2)  # smaller ones are found, to be counted
    if not faces:
        return row | {"filter": "no_face", "reason": "no face found"}
    file = f"good/{safe_name(source.name)}.png"
    limits = (config.min_face_size, config.min_confidence, config.min_sharpness)
    row["faces"] = [filters.judge_face(good, face, *limits) for face in faces]
    if any("filter" not in face for face in row["faces"]):
        save_image(good, output / file)
    prompt = config.prompt or caption or "A face."
    return row | {
        "good": file,
        "prompt": prompt,
        "size": good.size,
        "hash": f"{perceptual_hash(photograph):016x}",
    }


def plan_faces(config: Config, photographs: Iterable[dict], bar: tqdm) -> Iterator[FacePlan]:
    crop_factors = config.crop_noise_factors if config.padded_crop else None
    for row in photographs:
        for index in (i for i, face in enumerate(row["faces"]) if "filter" not in face):
            seed = stable_seed(config.seed, row["photograph"], index)
            bar.total += 1
            yield plan_face(row, index, seed, config.resolution, config.area_limits, config.noise_factors, crop_factors)


def batch_size(config: Config, group: tuple[float, tuple[int, int]]) -> int:
    """Return how many faces of a group (strength, size) are inpainted at once."""
    width, height = group[1]
    return max(1, config.batch_size // max(1, round(width * height / config.resolution**2)))


def write_batch(
    config: Config, output: Path, known: Container[str], detector: Detector, batch: PairBatch
) -> list[dict]:
    return [judge_pair(config, output, detector, *pair) for pair in batch.pairs() if pair[0].id not in known]


def judge_pair(
    config: Config,
    output: Path,
    detector: Detector,
    plan: FacePlan,
    photograph: Image.Image,
    good: Image.Image,
    bad: Image.Image,
    mask: Image.Image,
) -> dict:
    """Write the files of a pair and return its manifest row; one that fails a filter gets the row of a rejection."""
    rejected = partial(filters.rejection, plan.id, plan.photograph)
    outside = max(change_outside(photograph, side, mask) for side in (good, bad))
    if outside > 0:
        return rejected("changed_outside", f"changed by {outside} of 255 outside of its mask")
    difference = masked_difference(good, bad, mask)
    if difference < config.min_difference:
        reason = f"hard to tell apart: mean change {difference:.2f} is below {config.min_difference}"
        return rejected("indistinguishable", reason)
    if config.drop_not_found and config.round_trip and not sees_face(config, detector, plan, good):
        return rejected("face_not_found", "the face is not found again in the good picture, behind the VAE")
    lost = not sees_face(config, detector, plan, bad)
    if lost and config.drop_lost:
        return rejected("face_lost", "no face is found in the bad picture any more")
    images = {"bad": bad, "mask": mask} | ({"good": good} if config.round_trip else {})
    files = {side: f"{side}/{plan.id}.png" for side in images}
    for side, image in images.items():
        save_image(image, output / files[side])
    pair = FacePair(
        **{key: getattr(plan, key) for key in ("id", "photograph", "area_ratio", "strength", "prompt", "seed", "crop")},
        **{"good": plan.good, **files},
        **plan.face.to_dict(),
        base=config.base,
        difference=difference,
        round_trip=config.round_trip,
        lost=lost,
    )
    return pair.to_row()


def sees_face(config: Config, detector: Detector, plan: FacePlan, picture: Image.Image) -> bool:
    """Look for the face where it was, in the square around it."""
    x, y, *far = face_square(picture.size, plan.face.box, config.resolution)
    box = [edge - start for edge, start in zip(plan.face.box, (x, y, x, y), strict=True)]
    return finds_face(picture.crop((x, y, *far)), box, detector, config.min_face_size / 2)


def summarize(config: Config, output: Path, num_photographs: int) -> None:
    """Sort the rows, so that interrupted and whole runs leave the same files; count, by filter and by bin."""
    found, pairs = sort_rows(output / PHOTOGRAPHS, "photograph"), sort_rows(output / MANIFEST)
    rejected = sort_rows(output / REJECTED)
    bins = count_bins(pairs, config.area_limits, config.noise_factors)
    rewrite_rows(output / METRICS_FILE, [{"step": number, **row} for number, row in enumerate(bins, 1)])
    twins = {row["id"] for row in rejected if row["filter"] == "near_duplicate"}
    faces = sum(len(row["faces"]) for row in found if row["photograph"] not in twins)
    rounds = filters.count_rounds(rejected, num_photographs, faces, len(pairs))
    lost = sum(pair["lost"] for pair in pairs)
    with atomic_write(output / REPORT, "w") as file:
        json.dump({"rounds": rounds, "pairs": len(pairs), "pairs_with_lost_face": lost, "bins": bins}, file, indent=1)
    finish(output, pairs=len(pairs), rejected=len(rejected), photographs=num_photographs)
    order = [name for names in filters.FILTERS.values() for name in names]
    rejected.sort(key=lambda row: order.index(row["filter"]))
    print_problems([(row["id"], row["reason"]) for row in rejected], most=20)
    for row in rounds:
        print(f"{row['in']} {row['of']}, rejected: " + ", ".join(f"{n} {name}" for name, n in row["rejected"].items()))
    shares = ", ".join(f"{row['pairs']} up to {row['up_to']:.1%} of the area" for row in bins)
    print(f"{len(pairs)} pairs in {output}: {shares}")


if __name__ == "__main__":
    run_stage(main, Config)
