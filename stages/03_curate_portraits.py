"""
Stage 3: curate portraits: find faces, align, judge quality, caption (AuthFace, arXiv 2410.09864, section 3.1).

    python stages/03_curate_portraits.py                               # offline: drawn portraits, some of them spoiled
    python stages/03_curate_portraits.py --images photos/ --config stages/presets/sdxl.yaml

Reads   photographs: a folder, a glob or one file; captions beside them (NAME.txt, NAME.json, NAME_qwen.json)
Writes  data/portraits/: images/ (aligned squares and their captions), manifest.jsonl, rejected.jsonl (with reasons),
        rejected/ (thumbnails), sheets/ (contact sheets for the review by eye), metrics.jsonl, config.yaml

The paper's last filter is a person who looks at every image: look at sheets/, write the ids of the portraits to reject
into a text file, one per line, and give it as `--review FILE --overwrite`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from faceprior.align import align_face
from faceprior.config import is_complete, open_output, print_problems, run_stage
from faceprior.degrade import DegradationConfig, degrade
from faceprior.detect import Face, detect_faces
from faceprior.images import as_array, common_folder, find_images, load_image, save_image
from faceprior.jsonl import MANIFEST, append_row, resume_rows, rewrite_rows, sort_rows
from faceprior.photos import read_caption, safe_name
from faceprior.portraits import Portrait, measure_quality, photographic_tags
from faceprior.procedural import draw_folder
from faceprior.training import METRICS_FILE, finish

REJECTED = "rejected.jsonl"


@dataclass
class Config:
    images: str = ""  # folder, glob or file of photographs; empty: the stage draws some
    num_drawn: int = 48  # number of portraits to draw when no photographs are given, [1, inf)
    output: str = "data/portraits"  # output folder for the portraits
    resolution: int = 128  # side of the aligned squares in pixels, [64, 4096]
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto never downloads
    min_confidence: float = 0.9  # minimum confidence of the detector, [0, 1]
    min_face_size: int = 64  # minimum shorter side of the face box in pixels of the photograph, [8, inf)
    min_side: int = 0  # minimum shorter side of a photograph in pixels; the paper's images exceed 8K, [0, inf)
    one_face: bool = True  # rejection of photographs with several faces; false: the largest face is taken
    min_sharpness: float = 4.0  # minimum standard deviation of the Laplacian in grey levels; below: blurred, [0, inf)
    max_noise: float = 5.0  # maximum standard deviation of Gaussian noise in grey levels; above: noisy, [0, 255]
    max_pepper: float = 0.004  # maximum fraction of outlying pixels; above: pepper noise, [0, 1]
    max_blocks: float = 1.5  # maximum step across 8 x 8 borders over other steps; above: JPEG blocks, [1, inf)
    min_texture: float = 1.0  # minimum detail of the cheeks in grey levels; below: over-smooth, [0, inf)
    max_clipped: float = 0.35  # maximum fraction of black and white pixels; above: badly exposed, [0, 1]
    captions: Literal["both", "sidecar", "measured"] = "both"  # source of the tags: caption file, measured light, both
    review: str = ""  # text file with the ids that a person rejected, one per line
    seed: int = 0  # seed of the drawn portraits' flaws, [0, inf)
    overwrite: bool = False  # start over in an output folder that holds a run


def main(config: Config) -> None:
    # ---- Find the photographs, and open the output folder
    review = read_review(config.review)
    sources = find_images(config.images) if config.images else None
    output = open_output(config)
    if is_complete(output) and sources is None:
        print(f"{output} is complete: {len(resume_rows(output / MANIFEST))} portraits")
        return
    if sources is None:
        seeds = range(config.num_drawn)
        sources = draw_folder(output / "drawn", seeds, 4 * config.resolution, change=Spoil(config.seed))

    # ---- Judge every photograph that an earlier run did not (quality-first collection, 3.1)
    done = {row["photograph"] for file in (MANIFEST, REJECTED) for row in resume_rows(output / file)}
    root = common_folder(sources)
    for path in tqdm(sources, desc="curating", unit="photo"):
        name = path.relative_to(root).as_posix()
        if name not in done:
            judge(config, output, path, name, review)

    # ---- Sort the rows, so that interrupted and whole runs leave the same files; write the numbers and the sheets
    accepted, rejected = sort_rows(output / MANIFEST), sort_rows(output / REJECTED)
    rewrite_rows(output / METRICS_FILE, [{"step": step, **row["quality"]} for step, row in enumerate(accepted, 1)])
    write_sheets(output, accepted)
    finish(output, accepted=len(accepted), rejected=len(rejected))

    # ---- Print what was rejected and why
    print_problems([(row["photograph"], row["reason"]) for row in rejected], "photograph")
    if not accepted:
        raise ValueError(
            f"none of {len(sources)} photographs passed the gates: {output / REJECTED} holds their measured numbers"
        )
    print(f"{len(accepted)} portraits in {output}; look at {output / 'sheets'} and reject by hand with `--review`")


def read_review(path: str) -> set[str]:
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"no review file {path}: it lists the ids of rejected portraits, one per line")
    return set(Path(path).read_text().split()) if path else set()


def judge(config: Config, output: Path, path: Path, name: str, review: set[str]) -> None:
    """Accept one photograph into the manifest, or write down why not; files come before the row that names them."""
    identity, row, photograph = safe_name(name), {"photograph": name}, None
    try:
        # ---- Face detection and image quality
        photograph = load_image(path)
        face = find_face(config, photograph)
        row["quality"] = measure_quality(photograph, face)
        if reason := first_fault(config, row["quality"]):
            raise ValueError(reason)
        if identity in review:
            raise ValueError("rejected by hand")

        # ---- Alignment as in FFHQ, and photography-guided annotation
        crop = align_face(photograph, face.landmarks, config.resolution).crop
        caption = make_caption(config, path, crop)
    except (ValueError, FileNotFoundError, PermissionError) as error:  # other OSErrors, as a full disk, end the stage
        thumbnail = save_thumbnail(photograph, output, identity) if photograph is not None else {}
        append_row(output / REJECTED, {"id": identity, **row, **thumbnail, "reason": str(error)})
        return

    image = f"images/{identity}.png"
    save_image(crop, output / image)
    (output / image).with_suffix(".txt").write_text(caption + "\n")
    size = min(face.width, face.height)
    portrait = Portrait(identity, name, image, caption, face.confidence, size, row["quality"])
    append_row(output / MANIFEST, portrait.to_row())


def find_face(config: Config, photograph: Image.Image) -> Face:
    """Return the photograph's face, or raise ValueError with the rule that it breaks."""
    if min(photograph.size) < config.min_side:
        raise ValueError(
            f"{photograph.width} x {photograph.height} pixels: the shorter side is below {config.min_side}"
        )
    faces = [f for f in detect_faces(photograph, config.detector, config.min_confidence) if f.landmarks is not None]
    if not faces:
        raise ValueError("no face found")
    if config.one_face and len(faces) > 1:
        raise ValueError(f"{len(faces)} faces found, one is wanted")
    size = min(faces[0].width, faces[0].height)
    if size < config.min_face_size:
        raise ValueError(f"face of {size:.0f} pixels is below {config.min_face_size}")
    return faces[0]


def first_fault(config: Config, quality: dict[str, float]) -> str | None:
    """Return the first quality rule that the numbers break, None if they pass all."""
    rules = [
        ("pepper", quality["pepper"] <= config.max_pepper, f"pepper noise: at most {config.max_pepper}"),
        ("noise", quality["noise"] <= config.max_noise, f"noisy: at most {config.max_noise}"),
        ("sharpness", quality["sharpness"] >= config.min_sharpness, f"blurred: at least {config.min_sharpness}"),
        ("blocks", quality["blocks"] <= config.max_blocks, f"JPEG blocks: at most {config.max_blocks}"),
        ("texture", quality["texture"] >= config.min_texture, f"over-smooth: at least {config.min_texture}"),
        ("clipped", quality["clipped"] <= config.max_clipped, f"badly exposed: at most {config.max_clipped}"),
    ]
    return next((f"{name} {quality[name]} ({rule})" for name, passed, rule in rules if not passed), None)


def make_caption(config: Config, path: Path, crop: Image.Image) -> str:
    """Join the tags beside the photograph and, if none of them is about light, photographic tags that are measured."""
    written = read_caption(path) if config.captions != "measured" else None
    if config.captions == "sidecar" and not written:
        raise ValueError("no caption beside it")
    tags = (written or "portrait photo").split(", ")
    if config.captions != "sidecar" and not any("light" in tag for tag in tags):
        tags += photographic_tags(crop)
    return ", ".join(tags)


def save_thumbnail(photograph: Image.Image, output: Path, identity: str) -> dict[str, str]:
    """Write the thumbnail of a rejected photograph and return its entry in the row."""
    small = photograph.copy()
    small.thumbnail((192, 192))
    file = f"rejected/{identity}.jpg"
    save_image(small, output / file)
    return {"thumbnail": file}


def write_sheets(output: Path, accepted: list[dict], columns: int = 8, rows: int = 6, side: int = 160) -> None:
    """Write contact sheets in the order of the manifest."""
    per_sheet = columns * rows
    for number in range(0, len(accepted), per_sheet):
        sheet = Image.new("RGB", (columns * side, rows * side), "white")
        for place, row in enumerate(accepted[number : number + per_sheet]):
            image = load_image(output / row["image"]).resize((side, side))
            sheet.paste(image, (place % columns * side, place // columns * side))
        save_image(sheet, output / f"sheets/{number // per_sheet:03d}.jpg")


# ---- Flaws of drawn portraits, so that the gates have something to reject

SPOIL_EVERY = 4


class Spoil:
    """Gives every fourth drawn portrait, in turns, one of the flaws that the gates reject."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, image: np.ndarray, index: int) -> tuple[np.ndarray, str]:
        """Return the changed image, (H, W, 3) uint8, and the name of its flaw (empty: none)."""
        if index % SPOIL_EVERY:
            return image, ""
        flaws = (self.blur, self.noise, self.pepper, self.compress, self.hide)
        flaw = flaws[index // SPOIL_EVERY % len(flaws)]
        return flaw(image, np.random.default_rng([self.seed, index])), flaw.__name__

    @staticmethod
    def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Shrink it to a twelfth and enlarge it again."""
        size = image.shape[1::-1]
        small = Image.fromarray(image).resize([side // 12 for side in size], Image.BOX)
        return as_array(small.resize(size, Image.BICUBIC))

    @staticmethod
    def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Add Gaussian noise with a standard deviation of 12 grey levels."""
        return (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)

    @staticmethod
    def pepper(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Make 6% of the pixels black."""
        return np.where(rng.random(image.shape[:2])[..., None] < 0.06, 0, image).astype(np.uint8)

    @staticmethod
    def compress(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Compress it as a JPEG of quality 4."""
        only_jpeg = DegradationConfig(blur_sigma=(0.1, 0.1), downsample=(1, 1), noise=(0, 0), jpeg=(4, 4))
        return degrade(image, only_jpeg, rng)

    @staticmethod
    def hide(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Replace it by its mean colour: nobody is in it."""
        return np.full_like(image, image.mean(axis=(0, 1)).astype(np.uint8))


if __name__ == "__main__":
    run_stage(main, Config)
