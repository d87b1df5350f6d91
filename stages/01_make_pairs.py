"""
Stage 1: make (good, bad) face pairs by inpainting (Face Score, arXiv 2406.17100, sections 4.4 and 8.4).

    python stages/01_make_pairs.py                                     # offline: drawn photographs, the tiny model
    python stages/01_make_pairs.py --images photos/ --config stages/presets/sd15.yaml

Reads   photographs of people: a folder, a glob, a file, a .txt list of paths, or WebDataset shards (`{000..009}.tar`)
Writes  data/pairs/: good/ bad/ mask/ as PNG, manifest.jsonl (one pair per row), photographs.jsonl (what was found in
        each photograph), rejected.jsonl (what failed a filter: its name and the reason), report.json (the counts)
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from faceprior import tiny
from faceprior.bases import load_pipeline, require_base
from faceprior.config import DONE_FILE, METRICS_FILE, finish, is_complete, open_output, print_problems, run_stage
from faceprior.detect import (
    AREA_LIMITS,
    Detector,
    Face,
    area_bin,
    face_square,
    finds_face,
    resolve_detector,
    search_orientations,
)
from faceprior.diffusion import report_long_prompts, report_small_side
from faceprior.files import atomic_write
from faceprior.images import save_image
from faceprior.inpaint import (
    STRENGTHS,
    Candidate,
    FaceInpainter,
    FacePlan,
    PairBatch,
    change_outside,
    check_strength,
    masked_difference,
    plan_face,
    prepare_photograph,
)
from faceprior.jsonl import MANIFEST, KeyedRows, rewrite_rows, sort_rows
from faceprior.models import DEFAULT_PROMPT, quiet_libraries, resolve_device, weight_dtype
from faceprior.pairs import SIDES, FacePair
from faceprior.photos import UNREADABLE, Photograph, find_photographs, pair_id, safe_name
from faceprior.procedural import draw_folder, draw_scenes
from faceprior.quality import NearDuplicates, perceptual_hash, sharpness
from faceprior.streams import in_background, in_groups
from faceprior.training import stable_seed

PHOTOGRAPHS, REJECTED, REPORT = "photographs.jsonl", "rejected.jsonl", "report.json"
# The "multiple rounds of data filtering" (8.4), in the order in which they run. The paper names small, blurry and
# invalid faces and gives no numbers; here every filter has a name, a measured number and a limit in the settings.
FILTERS = {
    "photographs": ("unreadable", "small_photograph", "no_face", "near_duplicate"),
    "faces": ("too_small", "low_confidence", "blurry"),
    "pairs": ("changed_outside", "indistinguishable", "face_not_found", "face_lost"),
}


@dataclass
class Config:
    images: str = ""  # folder, glob, file, .txt list or .tar shards of photographs; empty: the stage draws some
    num_drawn: int = 48  # number of portraits to draw when no photographs are given, [1, inf)
    num_scenes: int = 8  # number of scenes with smaller faces to draw beside them, at `max_resolution`, [0, inf)
    base: str = "tiny"  # base model that inpaints: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE to use in place of the base's own
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"  # prediction of the base; auto: by files
    output: str = "data/pairs"  # output folder for the pairs
    resolution: int = 128  # side in pixels; smaller images are enlarged to about resolution x resolution, [64, 2048]
    max_resolution: int = 512  # side in pixels; larger images are shrunk to about that; 0: `resolution`, [0, 2048]
    prompt: str = ""  # prompt of the inpainting; empty: the caption beside the photograph, else "A face."
    steps: int = 50  # sampling steps, of which the last int(strength x steps) are run, [1, 1000]
    guidance_scale: float = 2.5  # scale of the classifier-free guidance, 1: off, [1, 30]
    area_limits: tuple[float, ...] = AREA_LIMITS  # upper face-area ratio of each bin (Table 8), (0, 1]
    strengths: tuple[float, ...] = STRENGTHS  # strength of the inpainting for each bin (Table 8), (0, 1]
    padded_crop: bool = True  # inpainting in a crop at `resolution` where the face does not fill the image; paper: no
    crop_strengths: tuple[float, ...] = (0.2, 0.2, 0.3, 0.4)  # strength for each bin in such a crop, (0, 1]
    round_trip: bool = True  # VAE round trip of the good face, so that both sides have its traces; paper: no
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto never downloads
    min_side: int = 64  # filter small_photograph: minimum shorter side of a photograph in pixels, [1, inf)
    max_hash_distance: int = 4  # filter near_duplicate: maximum number of different bits of 64; -1: off, [-1, 64]
    min_face_size: int = 16  # filter too_small: minimum shorter side of a face in pixels once prepared, [8, 1024]
    min_confidence: float = 0.9  # filter low_confidence: minimum confidence of the detector, [0, 1]
    min_sharpness: float = 0.05  # filter blurry: minimum; 0.05: blur of 2% of the face, 0.1: of 1.2%; 0: off, [0, 20]
    min_difference: float = 1.0  # filter indistinguishable: minimum mean change of a face, 0-255; 0: off, [0, 255]
    drop_not_found: bool = True  # filter face_not_found: rejection of pairs whose good face the round trip loses
    drop_lost: bool = False  # filter face_lost: rejection of pairs in whose bad image no face is found any more
    batch_size: int = 8  # faces inpainted at once, fewer of images larger than resolution x resolution, [1, 256]
    num_workers: int = 2  # threads that read, detect and write while the network runs; 0: none, [0, 64]
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the networks
    seed: int = 0  # seed from which, with the photograph's name, the seed of each face is derived, [0, inf)
    device: str = "auto"  # device of the networks: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    # another size of the batches rounds the pixels of the pairs still to be made differently, and does nothing else
    FREE = frozenset({"batch_size"})
    RENAMED = {"noise_factors": "strengths", "crop_noise_factors": "crop_strengths"}


def main(config: Config) -> None:
    check_settings(config)
    quiet_libraries()
    device = resolve_device(config.device)

    # ---- Find the photographs; the output folder may lie among them
    made = [Path(config.output) / side for side in SIDES]
    sources, problems = find_photographs(config.images, made) if config.images else (None, [])

    # ---- The base: refused before any work
    base = tiny.resolve(config.base, "sd15")
    if config.overwrite or not is_complete(config.output):
        require_base(base, "inpaint", config.vae, config.prediction_type)

    # ---- Open the output folder and read the rows of an earlier run
    output = open_output(config)
    photographs = KeyedRows(output / PHOTOGRAPHS, "photograph")
    pairs, rejected = KeyedRows(output / MANIFEST), KeyedRows(output / REJECTED)
    forget_fixed(sources or [], photographs, rejected)
    if is_complete(output) and (sources is None or all(source.name in photographs for source in sources)):
        print(f"{output} is complete: {len(pairs)} pairs")
        return
    (output / DONE_FILE).unlink(missing_ok=True)  # photographs were added: not complete until they are done, too
    for place, reason in problems:
        rejected.add(rejection(place, place, "unreadable", reason))

    # ---- Load the base, and check before the work that it can do what the settings ask for
    pipeline = load_pipeline(base, weight_dtype(config.mixed_precision), config.vae, config.prediction_type)
    report_small_side(pipeline, config.resolution)
    inpainter = FaceInpainter(pipeline.to(device), config.steps, config.guidance_scale)
    if config.padded_crop:
        inpainter.check_side(config.resolution)
    detector = resolve_detector(config.detector)  # loaded here, not by several threads at once
    if sources is None:
        sources = draw_sources(config, output / "drawn")

    # ---- From photographs to pairs. Every line takes its items one by one from the line before, and only when the loop
    # at the end asks for the next. The network runs in this thread; `in_background` runs a step in other threads, so
    # that the next photographs are read and searched, and the last pairs written, while a batch is inpainted.
    maker = PairMaker(config, output, detector, inpainter.multiple, photographs, pairs, rejected)
    workers = config.num_workers
    judged = len(pairs) + sum(row["filter"] in FILTERS["pairs"] for row in rejected.values())
    with tqdm(total=0, initial=judged, desc="inpainting", unit="face") as bar:
        # Rounds 1 and 2: load each photograph, prepare it, detect its faces and judge them
        progress = tqdm(sources, desc="detecting", unit="photo")
        searched = in_background(maker.find_faces, progress, workers, ahead=4 * config.batch_size)
        kept = maker.keep_photographs(searched)

        # Plan: strength by face area (Table 8). A batch holds faces of one strength and size; batches are formed before
        # those of an earlier run are skipped, because sums, and so pixels, are rounded differently in another batch.
        plans = maker.plan_faces(kept, bar)
        batches = in_groups(plans, lambda plan: (plan.strength, plan.view_size), maker.batch_size)
        new = (batch for batch in batches if not all(maker.is_judged(plan) for plan in batch))

        # Inpaint (4.4): the bad face, and, with `round_trip`, the good one through the VAE
        loaded = in_background(maker.load_batch, new, workers, ahead=2)
        inpainted = (batch.inpaint(inpainter, config.round_trip) for batch in loaded)

        # Round 3: judge each pair and write it
        for rows in in_background(maker.judge_batch, inpainted, workers, ahead=2):
            for row in rows:
                (rejected if "filter" in row else pairs).add(row)
            bar.update(len(rows))

    # ---- Sort the rows, so that interrupted and whole runs leave the same files, and count
    report_long_prompts(pipeline, (row["prompt"] for row in pairs.values()))
    summarize(config, output, len(sources))


def check_settings(config: Config) -> None:
    for name in ("strengths", "crop_strengths"):
        if len(getattr(config, name)) != len(config.area_limits):
            raise ValueError(f"`{name}` needs one value for each of the {len(config.area_limits)} `area_limits`")
    for strength in (*config.strengths, *(config.crop_strengths if config.padded_crop else ())):
        check_strength(strength, config.steps)
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


def forget_fixed(sources: list[Photograph], photographs: KeyedRows, rejected: KeyedRows) -> None:
    """Remove the rows of files that were unreadable and have been fixed since, so that they are read again."""
    unreadable = (source for source in sources if photographs.get(source.name, {}).get("filter") == "unreadable")
    fixed = [source.name for source in unreadable if source.is_readable()]
    photographs.remove(fixed)
    rejected.remove(fixed)


@dataclass
class PairMaker:
    """The steps from a photograph to its pairs, and what they share.

    `find_faces`, `load_batch` and `judge_batch` run in several threads and write images only; rows are written in the
    main thread. multiple: of the sides of an image, in pixels, that the inpainter needs.
    """

    config: Config
    output: Path
    detector: Detector
    multiple: int
    photographs: KeyedRows
    pairs: KeyedRows
    rejected: KeyedRows

    def find_faces(self, source: Photograph) -> dict:
        """Return the row of a photograph: its faces, or the filter that it fails; the prepared image is saved."""
        if source.name in self.photographs:  # of an earlier run
            return self.photographs[source.name]
        config, row = self.config, {"photograph": source.name, "faces": []}

        # ---- Load
        try:
            photograph, caption = source.load(), source.caption()
        except UNREADABLE as error:
            return row | {"filter": "unreadable", "reason": str(error)}
        width, height = photograph.size
        if min(width, height) < config.min_side:
            return row | {"filter": "small_photograph", "reason": f"{width} x {height} pixels: below {config.min_side}"}

        # ---- Prepare, detect and turn upright; faces below the limits are looked for, too, so that they are counted
        good = prepare_photograph(photograph, config.resolution, self.multiple, config.max_resolution)
        turns, faces = search_orientations(good, self.detector, 0, config.min_face_size / 2)
        if turns:
            good, row["turned"] = good.rotate(90 * turns, expand=True), 90 * turns  # degrees, counter-clockwise
        if not faces:
            return row | {"filter": "no_face", "reason": "no face found"}

        # ---- Judge the faces; the file comes before the row that names it
        file = f"good/{safe_name(source.name)}.png"
        row["faces"] = [judge_face(config, good, face) for face in faces]
        if any("filter" not in face for face in row["faces"]):
            save_image(good, self.output / file)
        return row | {
            "good": file,
            "prompt": config.prompt or caption or DEFAULT_PROMPT,
            "size": good.size,
            "hash": f"{perceptual_hash(photograph):016x}",
        }

    def keep_photographs(self, found: Iterable[dict]) -> Iterator[dict]:
        """Write down what `find_faces` found; yield the photographs with a fit face that are no near-duplicates."""
        # photographs of earlier pairs stay, even if a copy with an earlier name has been added since
        duplicates = NearDuplicates(self.config.max_hash_distance)
        used = {pair["photograph"] for pair in self.pairs.values()}
        for name in sorted(used):
            duplicates.add(name, int(self.photographs[name]["hash"], 16))

        for row in found:
            self.photographs.add(row)
            name, faces = row["photograph"], row["faces"]
            if "filter" in row:
                self.rejected.add(rejection(name, name, row["filter"], row["reason"]))
            has_fit_face = any("filter" not in face for face in faces)

            # near-duplicates, before their faces are counted
            if has_fit_face and name not in used:
                if near := duplicates.find(int(row["hash"], 16)):
                    (self.output / row["good"]).unlink(missing_ok=True)  # before the row: it says that this is done
                    reason = f"{near[1]} of 64 bits differ from {near[0]}"
                    self.rejected.add(rejection(name, name, "near_duplicate", reason))
                if name in self.rejected:  # in an earlier run, too, even if the original is gone
                    continue

            for index, face in enumerate(faces):
                if "filter" in face:
                    self.rejected.add(rejection(pair_id(name, index), name, face["filter"], face["reason"]))
            if has_fit_face:
                duplicates.add(name, int(row["hash"], 16))
                yield row

    def plan_faces(self, photographs: Iterable[dict], bar: tqdm) -> Iterator[FacePlan]:
        """Yield the plans of all fit faces, and count them in the bar's total."""
        config = self.config
        strengths = (config.strengths, config.crop_strengths if config.padded_crop else None)
        for row in photographs:
            for index, face in enumerate(row["faces"]):
                if "filter" not in face:
                    bar.total += 1
                    seed = stable_seed(config.seed, row["photograph"], index)
                    yield plan_face(row, index, seed, config.resolution, config.area_limits, *strengths)

    def batch_size(self, group: tuple[float, tuple[int, int]]) -> int:
        """Return how many faces of a group (strength, size) are inpainted at once: about equally many pixels."""
        width, height = group[1]
        return max(1, self.config.batch_size // max(1, round(width * height / self.config.resolution**2)))

    def is_judged(self, plan: FacePlan) -> bool:
        return plan.id in self.pairs or plan.id in self.rejected

    def load_batch(self, plans: list[FacePlan]) -> PairBatch:
        # read from the disk once more: rare groups wait long for their batch, and memory would fill with photographs
        return PairBatch.load(self.output, self.config.resolution, plans)

    def judge_batch(self, batch: PairBatch) -> list[dict]:
        return [self.judge_pair(pair) for pair in batch.candidates() if not self.is_judged(pair.plan)]

    def judge_pair(self, pair: Candidate) -> dict:
        """Return the row of a valid pair, after its files are written, or the row of its rejection."""
        config, plan = self.config, pair.plan
        rejected = partial(rejection, plan.id, plan.photograph)

        # ---- Outside of the mask every pixel is the photograph's, inside of it the sides differ visibly
        outside = max(change_outside(pair.photograph, side, pair.mask) for side in (pair.good, pair.bad))
        if outside > 0:
            return rejected("changed_outside", f"changed by {outside} of 255 outside of its mask")
        difference = masked_difference(pair.good, pair.bad, pair.mask)
        if difference < config.min_difference:
            reason = f"hard to tell apart: mean change {difference:.2f} is below {config.min_difference}"
            return rejected("indistinguishable", reason)

        # ---- The detector still finds the face
        if config.drop_not_found and config.round_trip and not self.still_finds_face(plan, pair.good):
            return rejected("face_not_found", "no face found in the good image after the VAE")
        lost = not self.still_finds_face(plan, pair.bad)
        if lost and config.drop_lost:
            return rejected("face_lost", "no face found in the bad image any more")

        # ---- Write the files; without a round trip the prepared photograph is the good side
        images = {"bad": pair.bad, "mask": pair.mask} | ({"good": pair.good} if config.round_trip else {})
        files = {side: f"{side}/{plan.id}.png" for side in images}
        for side, image in images.items():
            save_image(image, self.output / files[side])
        shared = ("id", "photograph", "area_ratio", "strength", "prompt", "seed", "crop")
        return FacePair(
            **{key: getattr(plan, key) for key in shared},
            **{"good": plan.good, **files},
            **plan.face.to_dict(),
            base=config.base,
            difference=difference,
            round_trip=config.round_trip,
            lost=lost,
        ).to_row()

    def still_finds_face(self, plan: FacePlan, image: Image.Image) -> bool:
        """Tell whether the detector finds the face where it was; only the square around it is searched."""
        x, y, *far = face_square(image.size, plan.face.box, self.config.resolution)
        box = [edge - start for edge, start in zip(plan.face.box, (x, y, x, y), strict=True)]
        return finds_face(image.crop((x, y, *far)), box, self.detector, self.config.min_face_size / 2)


def judge_face(config: Config, image: Image.Image, face: Face) -> dict:
    """Return a face's row: `Face.to_dict`, its sharpness, and the first filter that it fails, with the reason."""
    row = face.to_dict() | {"sharpness": round(sharpness(image, face.box), 4)}
    size = min(face.width, face.height)
    if size < config.min_face_size:
        return row | {"filter": "too_small", "reason": f"face of {size:.0f} pixels is below {config.min_face_size}"}
    if face.confidence < config.min_confidence:
        reason = f"confidence {face.confidence:.3f} is below {config.min_confidence}"
        return row | {"filter": "low_confidence", "reason": reason}
    if face.landmarks is None:
        return row | {"filter": "low_confidence", "reason": "the landmarks do not fit the face: it may be turned"}
    if row["sharpness"] < config.min_sharpness:
        return row | {"filter": "blurry", "reason": f"sharpness {row['sharpness']} is below {config.min_sharpness}"}
    return row


def rejection(identity: str, photograph: str, name: str, reason: str) -> dict[str, str]:
    """Return a row of `rejected.jsonl`; identity: of the photograph or the pair; name: of the filter."""
    return {"id": identity, "photograph": photograph, "filter": name, "reason": reason}


def summarize(config: Config, output: Path, num_photographs: int) -> None:
    """Sort the rows; write and print what each filter rejected and how many pairs each bin of Table 8 has."""
    found, pairs = sort_rows(output / PHOTOGRAPHS, "photograph"), sort_rows(output / MANIFEST)
    rejected = sort_rows(output / REJECTED)

    # ---- Count
    bins = count_bins(config, pairs)
    copies = {row["id"] for row in rejected if row["filter"] == "near_duplicate"}
    faces = sum(len(row["faces"]) for row in found if row["photograph"] not in copies)
    rounds = count_rounds(rejected, num_photographs, faces, len(pairs))
    lost = sum(pair["lost"] for pair in pairs)

    # ---- Write
    rewrite_rows(output / METRICS_FILE, [{"step": number, **row} for number, row in enumerate(bins, 1)])
    with atomic_write(output / REPORT, "w") as file:
        json.dump({"rounds": rounds, "pairs": len(pairs), "pairs_with_lost_face": lost, "bins": bins}, file, indent=1)
    finish(output, pairs=len(pairs), rejected=len(rejected), photographs=num_photographs)

    # ---- Print
    order = [name for names in FILTERS.values() for name in names]
    rejected.sort(key=lambda row: order.index(row["filter"]))
    print_problems([(row["id"], row["reason"]) for row in rejected], most=20)
    for row in rounds:
        print(f"{row['in']} {row['of']}, rejected: " + ", ".join(f"{n} {name}" for name, n in row["rejected"].items()))
    sizes = ", ".join(f"{row['pairs']} up to {row['up_to']:.1%} of the area" for row in bins)
    print(f"{len(pairs)} pairs in {output}: {sizes}")


def count_rounds(rejected: list[dict], photographs: int, faces: int, pairs: int) -> list[dict]:
    """Return for each round how many came in and how many each filter rejected.

    rejected: rows with the key `filter`; photographs, faces: how many there were; pairs: how many were kept.
    """
    counts = Counter(row["filter"] for row in rejected)
    came = {"photographs": photographs, "faces": faces, "pairs": pairs + sum(counts[name] for name in FILTERS["pairs"])}
    return [{"of": of, "in": came[of], "rejected": {n: counts[n] for n in names}} for of, names in FILTERS.items()]


def count_bins(config: Config, pairs: list[dict]) -> list[dict]:
    """Return for each bin of Table 8 its upper limit, strength, number of pairs and their mean difference.

    The strengths are those that were used: a face inpainted in a crop has another one. `noise_factor` is their mean
    over the pairs, or without a pair the bin's setting.
    """
    rows = []
    for number, (limit, strength) in enumerate(zip(config.area_limits, config.strengths, strict=True)):
        own = [pair for pair in pairs if area_bin(pair["area_ratio"], config.area_limits) == number]
        used = sorted({pair["strength"] for pair in own})
        row = {"up_to": limit, "noise_factor": used[0] if len(used) == 1 else strength, "strengths": used}
        if len(used) > 1:
            row["noise_factor"] = sum(pair["strength"] for pair in own) / len(own)
        mean = sum(pair["difference"] for pair in own) / max(len(own), 1)
        rows.append(row | {"pairs": len(own), "difference": mean})
    return rows


if __name__ == "__main__":
    run_stage(main, Config)
