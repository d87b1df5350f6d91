"""
Stage 3: curate portraits: find faces, align, judge quality, caption (AuthFace, arXiv 2410.09864, section 3.1).

    python stages/03_curate_portraits.py                               # offline: drawn portraits, some of them spoiled
    python stages/03_curate_portraits.py --images photos/ --config stages/presets/sdxl.yaml

Reads   photographs: a folder, a glob, a file, a .txt list of paths, or WebDataset shards (`{000..009}.tar`); captions
        beside them (NAME.txt, NAME.json, NAME_qwen.json)
Writes  data/portraits/: images/ (aligned squares and their captions), manifest.jsonl, rejected.jsonl (with all that is
        wrong), rejected/ (thumbnails, and what was rejected by hand), sheets/ (contact sheets for the review by eye),
        balance.json (who is in the portraits, and who is missing), answers/ (of vision-language models, by model and
        question), originals/ (of retouched portraits), metrics.jsonl, config.yaml

Every gate of `faceprior.gates` is one measured number with one limit, a setting below. The numbers of every photograph
are stored: the same command with other limits judges by them again, and decodes only what is accepted newly.
`python -m faceprior.report .` draws each number's histogram with its limit.

Captions are tags, semantic and photographic ones, from up to three sources: `--captioners sidecar vlm measured` takes
those beside a photograph, those of a vision-language model (`--vlm`), and those that are measured in the pixels; the
first source counts where they contradict each other. Each source's tags are stored: with other captioners the same
command captions the same portraits anew, and what an earlier run has asked comes back at once.

`--export_retouch DIR` writes the portraits for a retoucher, and `--import_retouch DIR` puts the retouched ones in their
places. A photograph that was replaced by another file of its name is judged anew.

The paper's last filter is a person who looks at every image, on a local page (`pip install "faceprior[pages]"`):

    python -m faceprior.human_eval review data/portraits

The decisions are in data/portraits/review.jsonl. The same command as before finds and applies them: portraits that are
rejected there move to rejected/, others move back. Or look at sheets/, write the ids of the portraits to reject into a
text file, one per line, and give it as `--review FILE`, which goes before review.jsonl. Without either all stay where
they are.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from faceprior.annotation import (
    VLM_SETTINGS,
    add_tags,
    annotate,
    ask_model,
    caption_settings,
    count_tags,
    forget_answers,
    join_tags,
    measure_tags,
    read_answers,
    recaptioned,
    write_caption,
)
from faceprior.balance import measure_balance
from faceprior.captioner import PROMPT, find_captioner
from faceprior.config import (
    DONE_FILE,
    METRICS_FILE,
    REVIEW_FILE,
    finish,
    is_complete,
    open_output,
    print_problems,
    run_stage,
)
from faceprior.files import atomic_write
from faceprior.gates import LIMITS, NO_DUPLICATE, Measured, find_faults, measure_photograph
from faceprior.human_eval.review import read_review
from faceprior.images import load_image, save_image
from faceprior.jsonl import MANIFEST, KeyedRows, rewrite_rows, sort_rows
from faceprior.photography import head_turn
from faceprior.photos import UNREADABLE, Photograph, Problems, find_photographs, safe_name
from faceprior.portraits import Portrait
from faceprior.procedural import Spoil, draw_folder
from faceprior.quality import NearDuplicates
from faceprior.retouch import KEPT, export_portraits, import_portraits
from faceprior.sorting import (
    REJECTED,
    accept_again,
    complete_moves,
    forgiven,
    is_new,
    judge_again,
    judged_otherwise,
    reject_by_hand,
    remove_files,
    save_thumbnail,
    words_of,
)
from faceprior.tags import Tags

BALANCE = "balance.json"
SEARCHED_FACE = 20  # pixels; smaller faces in the background of a photograph do not count as further ones
Sources = tuple[Literal["sidecar", "vlm", "measured"], ...]


class Unfit(Exception):
    """A photograph that makes no portrait; the message is the reason."""


@dataclass
class Config:
    images: str = ""  # folder, glob, file, .txt list or .tar shards of photographs; empty: the stage draws some
    num_drawn: int = 48  # number of portraits to draw when no photographs are given, [1, inf)
    output: str = "data/portraits"  # output folder for the portraits
    resolution: int = 128  # side of the aligned squares in pixels, [64, 4096]
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto never downloads
    device: str = "auto"  # device of the learned models: auto, cpu, cuda or cuda:N

    # ---- the photograph and its face
    min_side: int = 0  # minimum shorter side of a photograph in pixels; the paper's images exceed 8K, [0, inf)
    min_confidence: float = 0.9  # minimum confidence of the detector; below: no face, (0, 1]
    min_face_size: int = 64  # minimum shorter side of the face box in pixels of the photograph, [8, inf)
    max_second_face: float = 0.5  # maximum side of the second largest face over the largest's; 1000: off, [0, 1000]
    max_misfit: float = 0.2  # maximum distance of the landmarks from a mean head's in eye distances, [0, 1]
    max_yaw: float = 35.0  # maximum turn of the head to a side in degrees, estimated to about 4; 90: off, [0, 90]
    max_pitch: float = 45.0  # maximum tilt up or down in degrees; a broad smile adds up to 30; 180: off, [0, 180]
    max_roll: float = 35.0  # maximum tilt to a side in degrees, from the nearest quarter turn; 45: off, [0, 45]
    max_outside: float = 0.15  # maximum fraction of the aligned square outside of the photograph; 1: off, [0, 1]
    min_eyes: float = 0.12  # minimum contrast of the weaker eye over the cheeks' brightness; below: covered, [0, inf)
    min_mouth: float = 0.12  # minimum contrast of the mouth over the cheeks' brightness; below: covered, [0, inf)

    # ---- its quality
    max_pepper: float = 0.01  # maximum fraction of outlying pixels; above: pepper noise, [0, 1]
    max_noise: float = 7.0  # maximum standard deviation of Gaussian noise in grey levels; above: noisy, [0, 255]
    max_blocks: float = 1.5  # maximum step across 8 x 8 borders over other steps; above: JPEG blocks, [1, inf)
    min_laplacian: float = 4.3  # minimum standard deviation of the Laplacian in grey levels; below: blurred, [0, inf)
    min_detail: float = 0.1  # minimum energy of the crop's finest octave over the one below; below: enlarged, [0, inf)
    min_texture: float = 0.65  # minimum grey levels of detail in the smoothest cheek; below: over-smooth, [0, inf)
    min_highlights: float = 100.0  # minimum 95th percentile of the face in grey levels; below: too dark, [0, 255]
    max_blown: float = 0.02  # maximum fraction of the face that is white in two channels; above: too bright, [0, 1]
    max_hash_distance: int = 4  # maximum number of different bits of 64 of a near-duplicate; -1: off, [-1, 64]
    quality_model: Literal["", "musiq", "topiq_nr-face"] = ""  # learned quality, by pyiqa with weights on the disk
    min_quality: float = 0.0  # minimum learned quality: musiq 0 to 100, topiq_nr-face 0 to 1, [0, 100]

    # ---- captions, retouching and review
    captioners: Sources = ("sidecar", "measured")  # sources of tags, the most trusted first: sidecar, vlm, measured
    vlm: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # vision-language model: folder or hub id; the paper's is LLaVA-1.6
    vlm_prompt: str = PROMPT  # question to the vision-language model
    vlm_tokens: int = 160  # maximum length of its answers in tokens, [1, 4096]
    batch_size: int = 4  # portraits that it sees at once, [1, 256]
    quantization: Literal["none", "8bit", "nf4"] = "none"  # form of its weights
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # precision of its weights
    export_retouch: str = ""  # folder to write the portraits to for a retoucher
    import_retouch: str = ""  # folder with retouched portraits, under the names of the export
    review: str = ""  # review.jsonl of the page, or a text file of rejected ids; empty: review.jsonl in the output
    seed: int = 0  # seed of the drawn portraits' flaws, [0, inf)
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    # other limits are applied to the stored numbers; by `min_confidence` the main face is chosen
    FREE = frozenset(
        {"review", "batch_size", "export_retouch", "import_retouch", "captioners", *VLM_SETTINGS, *LIMITS}
        - {"min_confidence", "min_beside"}
    )
    RENAMED = {"min_sharpness": "min_laplacian", "captions": "captioners"}

    @property
    def min_beside(self) -> int:
        """The limit of the gate for captions: one has to be beside the photograph where none come from elsewhere."""
        return int(self.captioners == ("sidecar",))


def main(config: Config) -> None:
    # ---- Find the photographs; the output folder may lie among them
    review = find_review(config)
    made = [Path(config.output) / folder for folder in ("images", "rejected", "sheets", KEPT)]
    made += [Path(folder) for folder in (config.export_retouch, config.import_retouch) if folder]
    require_apart(config)
    sources, problems = find_photographs(config.images, made) if config.images else (None, [])

    # ---- Open the output folder and read the rows of an earlier run
    output = open_output(config)
    accepted, rejected = KeyedRows(output / MANIFEST), KeyedRows(output / REJECTED)
    require_rows(output, accepted)
    complete_moves(output, accepted, rejected)
    reviewed = review is not None and is_new(review, accepted, rejected)
    retouched = bool(config.export_retouch or config.import_retouch)
    changed = reviewed or retouched or recaptioned(config, output) or judged_otherwise(accepted, rejected, config)
    if is_complete(output) and sources is None and not changed:
        print(f"{output} is complete: {len(accepted)} portraits")
        return
    learned = load_quality_model(config)
    (output / DONE_FILE).unlink(missing_ok=True)
    if sources is None:
        draw_folder(output / "drawn", range(config.num_drawn), 4 * config.resolution, change=Spoil(config.seed))
        sources = find_photographs(str(output / "drawn"))[0]

    # ---- What has changed since: photographs, captioners, the review, the limits
    problems += forget_replaced(config, output, accepted, rejected, sources)
    for rows in (accepted, rejected):
        problems += add_tags(config, output, rows, sources)
    if review is not None:  # rejected by hand and no longer; rows of older runs lack the portrait and are made anew
        accept_again(output, accepted, rejected, [i for i in forgiven(rejected, review) if "image" in rejected[i]])
        rejected.remove(forgiven(rejected, review))
    judge_again(output, accepted, rejected, config)
    for source in sources:  # unreadable in an earlier run and fixed since: judged again
        if rejected.get(safe_name(source.name), {}).get("unreadable") and source.is_readable():
            rejected.remove([safe_name(source.name)])

    # ---- Judge every photograph that an earlier run did not (quality-first collection, 3.1)
    new = [source for source in sources if safe_name(source.name) not in accepted.keys() | rejected.keys()]
    if "vlm" in config.captioners and (new or accepted.keys() - read_answers(config, output).keys()):
        find_captioner(config.vlm)  # a wrong name is an error now, not after hours of judging
    portraits = NearDuplicates(config.max_hash_distance)
    for identity, row in accepted.items():
        if "hash" in row:  # rows of older versions have none
            portraits.add(identity, int(row["hash"], 16))
    for source in tqdm(sources, desc="curating", unit="photo"):
        identity = safe_name(source.name)
        if identity not in accepted and identity not in rejected:
            remove_files(output, identity)  # of a run that was killed before the row, or of the photograph it replaces
            row = judge(config, output, source, portraits, learned)
            (rejected if "reason" in row else accepted).add(row)
            if "reason" not in row:
                portraits.add(identity, int(row["hash"], 16))

    # ---- The paper's last filter, a person
    if review is not None:
        reject_by_hand(output, accepted, rejected, review)
        unknown = sorted(review.keys() - accepted.keys() - rejected.keys())
        problems += [(identity, "no portrait has this id") for identity in unknown]

    # ---- Photography-guided annotation of what is left (3.1), and the round trip to the retoucher (appendix A)
    if config.import_retouch:
        problems += import_retouched(config, output, accepted)
    answers = ask_model(config, output, accepted) if "vlm" in config.captioners else {}
    problems += annotate(config, output, accepted, answers)
    if config.export_retouch:
        exported = export_portraits(output, accepted.values(), sources, config.export_retouch)
        print(f"{exported} new files for the retoucher in {config.export_retouch}")

    # ---- Sort the rows, so that interrupted and whole runs leave the same files; write the numbers and the sheets
    accepted, rejected = sort_rows(output / MANIFEST), sort_rows(output / REJECTED)
    rewrite_rows(output / METRICS_FILE, [{"step": step, **row["quality"]} for step, row in enumerate(accepted, 1)])
    balance = measure_balance(accepted)
    with atomic_write(output / BALANCE, "w") as file:
        json.dump(balance, file, indent=1, ensure_ascii=False)
    write_sheets(output, accepted)
    finish(output, accepted=len(accepted), rejected=len(rejected), captions=caption_settings(config))

    # ---- Print what was rejected and why
    print_problems(problems)
    print_problems([(row["photograph"], row["reason"]) for row in rejected], "photograph")
    if not accepted:
        raise ValueError(
            f"none of {len(sources)} photographs passed the gates: {output / REJECTED} holds their measured numbers"
        )
    for sentence in balance["missing"]:
        print(f"{output / BALANCE}: {sentence}")
    print(f"{len(accepted)} portraits in {output}; look at each: `python -m faceprior.human_eval review {output}`")


def require_apart(config: Config) -> None:
    """Raise ValueError for a folder of retouching in the output folder, whose portraits it would mix with."""
    for key in ("export_retouch", "import_retouch"):
        folder = getattr(config, key)
        if folder and Path(folder).resolve().is_relative_to(Path(config.output).resolve()):
            raise ValueError(f"`{key}` {folder} lies in the output folder {config.output}: choose one beside it")


def require_rows(output: Path, accepted: KeyedRows) -> None:
    """Raise FileExistsError for portraits of a version that kept less about them."""
    for identity, row in accepted.items():
        if lacking := [key for key in ("image", "caption", "quality", "tags", "turn") if key not in row]:
            raise FileExistsError(
                f"{output / MANIFEST} is of another version: {identity} has no `{lacking[0]}`: choose another `output`,"
                " or `--overwrite` to start over"
            )


def find_review(config: Config) -> dict[str, str] | None:
    """Return the portraits that a person rejected, id -> reason; None without a review."""
    own = Path(config.output) / REVIEW_FILE
    return read_review(config.review or own) if config.review or own.is_file() else None


def forget_replaced(
    config: Config, output: Path, accepted: KeyedRows, rejected: KeyedRows, sources: list[Photograph]
) -> Problems:
    """Remove the rows of photographs whose files are others now; name the portraits whose photographs are gone."""
    replaced, problems, names = [], [], {safe_name(source.name): source for source in sources}
    for identity, row in {**rejected, **accepted}.items():
        if identity not in names:
            if identity in accepted:
                problems.append((row["photograph"], f"no longer in {config.images}: its portrait {identity} stays"))
        elif "file" in row and names[identity].fingerprint() not in (row["file"], ""):
            if "retouched" in row:
                problems.append((row["photograph"], "replaced after its portrait was retouched, which stays"))
            else:
                replaced.append(identity)
    if replaced:
        forget_answers(output, replaced)
        accepted.remove(replaced)
        rejected.remove(replaced)
    return problems


def judge(
    config: Config,
    output: Path,
    source: Photograph,
    portraits: NearDuplicates,
    learned: Callable[[Image.Image, Measured], float] | None = None,
) -> dict:
    """Return a photograph's row of the manifest, or, with a `reason`, of the rejected; its files come before.

    portraits: those that were accepted. learned: the learned quality of a face.
    """
    identity, photograph = safe_name(source.name), None
    row = {"id": identity, "photograph": source.name, "file": source.fingerprint()}
    try:
        # ---- Face detection, alignment as in FFHQ, and all that can be measured
        photograph = source.load()
        written = source.tags() or Tags() if "sidecar" in config.captioners else None
        searched = min(config.min_face_size, SEARCHED_FACE)
        measured = measure_photograph(photograph, config.resolution, config.detector, config.min_confidence, searched)
        nearest, distance = portraits.nearest(measured.hash) or (None, NO_DUPLICATE)
        row |= {"hash": f"{measured.hash:016x}", "quality": {**measured.values, "duplicate": distance}}
        row |= {"nearest": nearest} if nearest else {}
        if learned and measured.crop:
            row["quality"]["model_quality"] = round(learned(photograph, measured), 4)
        if written is not None:
            row["quality"]["beside"] = count_tags(written)

        # ---- The gates, all of them: a photographer wants to know everything that is wrong
        if faults := find_faults(row["quality"], config):
            row |= words_of(faults, row)
            raise Unfit(row["reason"])

    except (Unfit, *UNREADABLE) as error:
        thumbnail = save_thumbnail(photograph, output, identity) if photograph is not None else {}
        unreadable = {"unreadable": True} if isinstance(error, UNREADABLE) else {}
        return {**row, **thumbnail, **unreadable, "reason": str(error)}

    # ---- Photography-guided annotation
    turn = round(head_turn(measured.face.landmarks), 4)
    found = {} if written is None else {"sidecar": written.to_row()}
    if "measured" in config.captioners:
        found["measured"] = measure_tags(measured.crop, turn)
    image, tags = f"images/{identity}.png", join_tags(config, found)
    write_caption(output / image, tags)
    save_image(measured.crop, output / image)
    confidence, size = row["quality"]["confidence"], row["quality"]["face_size"]
    groups = (tags.semantic, tags.photographic)
    portrait = Portrait(identity, source.name, image, *groups, confidence, size, row["quality"])
    kept = {key: row[key] for key in ("file", "hash", "nearest") if key in row}
    return {**portrait.to_row(), **kept, "tags": found, "turn": turn}


def load_quality_model(config: Config) -> Callable[[Image.Image, Measured], float] | None:
    """Return the learned quality of a face in a photograph, None without `quality_model`.

    Raises MetricUnavailable, which names the commands, where pyiqa or its weights are not on this machine.
    """
    if not config.quality_model:
        return None
    from faceprior.evaluation.judges import portrait_metric

    score = portrait_metric(config.quality_model, config.device, config.detector).load()
    return lambda photograph, measured: score(photograph, "", measured.face)


def import_retouched(config: Config, output: Path, accepted: KeyedRows) -> Problems:
    """Replace portraits by their retouched versions, whose tags are measured again; return what was left out."""
    changed, problems = import_portraits(output, accepted, config.import_retouch)
    for identity, row in changed.items():
        if "measured" in row["tags"]:
            row["tags"]["measured"] = measure_tags(load_image(output / row["image"]), row["turn"])
        accepted[identity] = row
    print(f"{len(changed)} portraits replaced by retouched ones of {config.import_retouch}")
    return problems


def write_sheets(output: Path, accepted: list[dict], columns: int = 8, rows: int = 6, side: int = 160) -> None:
    """Write contact sheets in the order of the manifest, and remove those of an earlier run with more portraits."""
    per_sheet = columns * rows
    for path in (output / "sheets").glob("*.jpg"):
        if int(path.stem) * per_sheet >= len(accepted):
            path.unlink()
    for number in range(0, len(accepted), per_sheet):
        sheet = Image.new("RGB", (columns * side, rows * side), "white")
        for place, row in enumerate(accepted[number : number + per_sheet]):
            image = load_image(output / row["image"]).resize((side, side))
            sheet.paste(image, (place % columns * side, place // columns * side))
        save_image(sheet, output / f"sheets/{number // per_sheet:03d}.jpg")


if __name__ == "__main__":
    run_stage(main, Config)
