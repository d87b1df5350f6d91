"""
Stage 1: make (good, bad) face pairs by inpainting (Face Score, arXiv 2406.17100, sections 4.4 and 8.4).

    python stages/01_make_pairs.py                                     # offline: drawn pictures, the tiny model
    python stages/01_make_pairs.py --images photos/ --config stages/presets/sd15.yaml

Reads   photographs of people: a folder, a glob or one file
Writes  data/pairs/: good/ bad/ mask/ as PNG, manifest.jsonl (one pair a row), photographs.jsonl (what was found in
        each photograph), rejected.jsonl (pairs that failed a filter, with the reason)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from faceprior import tiny
from faceprior.config import is_complete, open_output, run_stage
from faceprior.detect import Face, detect_faces
from faceprior.diffusion import load_pipeline
from faceprior.images import find_images, load_image, save_image
from faceprior.manifest import (
    MANIFEST,
    append_row,
    common_folder,
    print_problems,
    read_caption,
    resume_rows,
    safe_name,
    sort_rows,
)
from faceprior.pairs import (
    AREA_LIMITS,
    NOISE_FACTORS,
    FaceInpainter,
    FacePair,
    area_bin,
    box_mask,
    cut_out,
    face_square,
    masked_difference,
    prepare_photograph,
    put_back,
)
from faceprior.procedural import draw_folder, draw_scenes
from faceprior.training import (
    METRICS_FILE,
    finish,
    quiet_libraries,
    resolve_device,
    stable_seed,
    weight_dtype,
)

PHOTOGRAPHS, REJECTED = "photographs.jsonl", "rejected.jsonl"


@dataclass
class Config:
    images: str = ""  # folder, glob or file of photographs; empty: the project draws some
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
    padded_crop: bool = True  # small faces are worked on in a crop of `resolution` around them (the paper: false)
    crop_noise_factors: tuple[float, ...] = (0.2, 0.2, 0.3, 0.4)  # noise factor of each bin in such a crop, (0, 1]
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto never downloads
    min_confidence: float = 0.9  # of the detector, [0, 1]
    min_face_size: int = 16  # pixels of the prepared picture, shorter side of the face box, [8, 1024]
    min_side: int = 64  # pixels; photographs with a shorter side are left out, [1, inf)
    round_trip: bool = True  # the good face goes through the VAE, too, so that its traces are on both sides; paper: no
    min_difference: float = 1.0  # mean change of the face, 0-255; pairs that differ less are rejected, [0, 255]
    batch_size: int = 8  # faces inpainted at once, fewer of pictures larger than resolution x resolution, [1, 256]
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the networks
    seed: int = 0  # every face's own seed is derived from it and from the photograph's name, [0, inf)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    overwrite: bool = False  # start anew in an output folder that holds a run


def main(config: Config) -> None:
    for name in ("noise_factors", "crop_noise_factors"):
        if len(getattr(config, name)) != len(config.area_limits):
            raise ValueError(f"`{name}` needs one value for each of the {len(config.area_limits)} `area_limits`")
    if 0 < config.max_resolution < config.resolution:
        raise ValueError(
            f"`max_resolution` has to be 0, or `resolution` ({config.resolution}) at least, but is "
            f"{config.max_resolution}"
        )
    quiet_libraries()
    device = resolve_device(config.device)
    sources = find_images(config.images) if config.images else None
    output = open_output(config)
    if is_complete(output) and (sources is None or not left_to_do(output, sources)):
        print(f"{output} is complete: {len(resume_rows(output / MANIFEST))} pairs")
        return
    if sources is None:
        sources = draw_sources(config, output / "drawn")

    base = tiny.resolve(config.base, "sd15")
    pipeline = load_pipeline(base, weight_dtype(config.mixed_precision), config.vae).to(device)
    inpainter = FaceInpainter(pipeline, config.steps, config.guidance_scale)
    for factor in (*config.noise_factors, *(config.crop_noise_factors if config.padded_crop else ())):
        inpainter.check_strength(factor)

    problems = find_faces(config, output, sources, inpainter.multiple)
    make_bad_twins(config, output, inpainter)
    pairs, rejected = sort_rows(output / MANIFEST), sort_rows(output / REJECTED)
    finish(output, pairs=len(pairs), rejected=len(rejected), photographs=len(sources))
    print_problems(problems + [(row["id"], row["reason"]) for row in rejected])
    print(f"{len(pairs)} pairs in {output}: {count_bins(config, pairs)}")


def draw_sources(config: Config, folder: Path) -> list[Path]:
    """Draw portraits, whose faces fall into the last bin of Table 8, and scenes for the other three."""
    seeds = range(config.num_drawn, config.num_drawn + config.num_scenes)  # other people than the portraits'
    portraits = draw_folder(folder, range(config.num_drawn), config.resolution)
    return portraits + draw_scenes(folder, seeds, config.max_resolution or config.resolution)


def left_to_do(output: Path, sources: list[Path]) -> list[tuple[str, Path]]:
    """Return name and path of the photographs that are not in photographs.jsonl yet."""
    done = {row["photograph"] for row in resume_rows(output / PHOTOGRAPHS)}
    root = common_folder(sources)
    named = ((path.relative_to(root).as_posix(), path) for path in sources)
    return [(name, path) for name, path in named if name not in done]


def find_faces(config: Config, output: Path, sources: list[Path], multiple: int) -> list[tuple[str, str]]:
    """Detect the faces of every photograph that is not in photographs.jsonl yet; return those left out and why."""
    for name, path in tqdm(left_to_do(output, sources), desc="detecting", unit="photo"):
        row = {"photograph": name}
        try:
            row |= prepare(config, output, path, name, multiple)
        except (ValueError, FileNotFoundError, PermissionError) as error:  # but a full disk ends the stage
            row |= {"faces": [], "reason": str(error)}
        append_row(output / PHOTOGRAPHS, row)
    rows = sort_rows(output / PHOTOGRAPHS, "photograph")
    return [(row["photograph"], row["reason"]) for row in rows if row.get("reason")]


def prepare(config: Config, output: Path, path: Path, name: str, multiple: int) -> dict:
    """Bring a photograph to size, save it as the good side, and return its faces for photographs.jsonl."""
    photograph = load_image(path)
    if min(photograph.size) < config.min_side:
        raise ValueError(
            f"{photograph.width} x {photograph.height} pixels: the shorter side is below {config.min_side}"
        )
    prompt = config.prompt or read_caption(path) or "A face."
    good = prepare_photograph(photograph, config.resolution, multiple, config.max_resolution)
    faces = detect_faces(good, config.detector, config.min_confidence, config.min_face_size)
    faces = [face for face in faces if min(face.width, face.height) >= config.min_face_size]
    if not faces:
        raise ValueError(f"no face of at least {config.min_face_size} pixels found")
    file = f"good/{safe_name(name)}.png"
    save_image(good, output / file)
    return {"good": file, "prompt": prompt, "size": good.size, "faces": [face.to_dict() for face in faces]}


def make_bad_twins(config: Config, output: Path, inpainter: FaceInpainter) -> None:
    """Inpaint all faces, in batches of one strength and size whose make-up does not depend on earlier runs."""
    rows = [row for file in (MANIFEST, REJECTED) for row in resume_rows(output / file)]
    differences = {row["id"]: row["difference"] for row in rows}
    logged = {row["step"] for row in resume_rows(output / METRICS_FILE)}
    batches = plan_batches(config, resume_rows(output / PHOTOGRAPHS))
    with tqdm(total=sum(map(len, batches)), desc="inpainting", unit="face") as bar:
        for number, batch in enumerate(batches, 1):
            if any(face["id"] not in differences for face in batch):
                inpaint_batch(config, output, inpainter, batch, differences)
            if number not in logged:
                mean = sum(differences[face["id"]] for face in batch) / len(batch)
                append_row(
                    output / METRICS_FILE,
                    {"step": number, "strength": batch[0]["strength"], "difference": mean},
                )
            bar.update(len(batch))


def plan_batches(config: Config, photographs: list[dict]) -> list[list[dict]]:
    """Group the faces of all photographs by noise factor and picture size."""
    groups: dict[tuple, list[dict]] = {}
    for row in photographs:
        for index, face in enumerate(row["faces"]):
            found, (width, height) = Face.from_dict(face), row["size"]
            ratio = min(found.area / (width * height), config.area_limits[-1])
            crop = small_crop(config, row["size"], found)
            factors = config.crop_noise_factors if crop else config.noise_factors
            plan = {
                "id": f"{safe_name(row['photograph'])}_{index}",
                "row": row,
                "face": found,
                "area_ratio": ratio,
                "crop": crop,
                "strength": factors[area_bin(ratio, config.area_limits)],
                "seed": stable_seed(config.seed, row["photograph"], index),
            }
            size = (config.resolution, config.resolution) if crop else (width, height)
            groups.setdefault((plan["strength"], *size), []).append(plan)
    batches = []
    for (_, width, height), group in groups.items():
        size = max(1, config.batch_size // max(1, round(width * height / config.resolution**2)))
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


def small_crop(config: Config, size: tuple[int, int], face: Face) -> tuple[int, int, int, int] | None:
    """Return the square around a face that is worked on, None for the whole picture."""
    square = face_square(size, face.box, config.resolution)
    return square if config.padded_crop and (square[2] - square[0]) ** 2 < size[0] * size[1] else None


def inpaint_batch(
    config: Config, output: Path, inpainter: FaceInpainter, batch: list[dict], differences: dict[str, float]
) -> None:
    """Inpaint one batch, write the files and rows that are missing, and note how much each face changed."""
    goods = [Image.open(output / plan["row"]["good"]).convert("RGB") for plan in batch]
    masks = [box_mask(good.size, plan["face"].box) for good, plan in zip(goods, batch, strict=True)]
    prompts, seeds = [plan["row"]["prompt"] for plan in batch], [plan["seed"] for plan in batch]
    crops = [plan["crop"] for plan in batch]
    views, view_masks = (cut_out(pictures, crops, config.resolution) for pictures in (goods, masks))
    bads = put_back(goods, inpainter(views, view_masks, batch[0]["strength"], prompts, seeds), crops, masks)
    if config.round_trip:
        goods = put_back(goods, inpainter.round_trip(views, view_masks), crops, masks)
    for plan, good, bad, mask in zip(batch, goods, bads, masks, strict=True):
        if plan["id"] not in differences:
            differences[plan["id"]] = masked_difference(good, bad, mask)
            write_pair(config, output, plan, good, bad, mask, differences[plan["id"]])


def write_pair(
    config: Config,
    output: Path,
    plan: dict,
    good: Image.Image,
    bad: Image.Image,
    mask: Image.Image,
    difference: float,
) -> None:
    if difference < config.min_difference:
        reason = f"pair is hard to tell apart: mean change {difference:.2f} is below {config.min_difference}"
        append_row(output / REJECTED, {"id": plan["id"], "reason": reason, "difference": difference})
        return
    images = {"bad": bad, "mask": mask} | ({"good": good} if config.round_trip else {})
    files = {side: f"{side}/{plan['id']}.png" for side in images}
    for side, image in images.items():
        save_image(image, output / files[side])
    face, row = plan["face"].to_dict(), plan["row"]
    pair = FacePair(
        id=plan["id"],
        photograph=row["photograph"],
        **{"good": row["good"], **files},
        **{key: face[key] for key in ("box", "landmarks", "confidence")},
        **{key: plan[key] for key in ("area_ratio", "strength", "seed", "crop")},
        prompt=row["prompt"],
        base=config.base,
        difference=difference,
        round_trip=config.round_trip,
    )
    append_row(output / MANIFEST, pair.to_row())


def count_bins(config: Config, pairs: list[dict]) -> str:
    counts = [0] * len(config.area_limits)
    for pair in pairs:
        counts[area_bin(pair["area_ratio"], config.area_limits)] += 1
    named = zip(config.area_limits, counts, strict=True)
    return ", ".join(f"{n} up to {limit:.1%} of the area" for limit, n in named)


if __name__ == "__main__":
    run_stage(main, Config)
