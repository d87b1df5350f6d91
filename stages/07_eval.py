"""
Stage 7: measure what the other stages made, beside other methods, on held-out prompts, seeds and faces.

    python stages/07_eval.py                                           # offline: the results of stages 2, 4 and 6
    python stages/07_eval.py --config stages/presets/face_score_table5.yaml --prompts mjhq.txt --people_prompts coco.txt
    python stages/07_eval.py --restorers input ours=checkpoints/restorer GFPGAN=results_gfpgan --lq lq/ --gt gt/

Reads   models, or folders of finished images, each NAME=SOURCE; faces to restore, or prompts, one a line
Writes  results/: results.json, table.md, PROTOCOL.csv and .tex, report.html (every number with its 95% interval),
        rows.jsonl (one row per method and image), sets.jsonl, PROTOCOL/images/METHOD/, metrics.jsonl, config.yaml,
        weights.json (what measured)

restoration (AuthFace, 4.1 and Table 1): every method restores the same faces, which are degraded here or come as a test
set. generation (Face Score, 6.1 and Table 5): every method draws the same prompts from the same noise. alignment (Face
Score, 4.2 and Tables 1 to 4): how often a metric orders images as people do. ab (AuthFace, Table 5): which of two
methods people prefer, in their answers about results/restoration.

A number that cannot be measured is listed with the reason and the command that gets what is missing; the same command
measures it, and nothing else, once it is there. In rows.jsonl a value of null is none (no face), and a PSNR of null
infinite: the images are identical.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from faceprior import tiny  # first: it silences bitsandbytes, which diffusers loads

# isort: split

from faceprior.config import finish, open_output, print_problems, require_outside, run_stage, saved_settings
from faceprior.degrade import ranges_of
from faceprior.evaluation import generation, restoration
from faceprior.evaluation.figures import HOW, not_measured
from faceprior.evaluation.items import FaceSet, Prompt, degraded_faces, faces_of_test_set, prompts_of, test_set_folders
from faceprior.evaluation.making import time_note
from faceprior.evaluation.measures import Measure, MeasureSettings, measures_of, named_weights, read_weights
from faceprior.evaluation.measuring import Measuring
from faceprior.evaluation.methods import Method
from faceprior.evaluation.results import (
    TABLE,
    described,
    method_notes,
    protocol_rows,
    result_row,
    set_notes,
    weights_notes,
    write_results,
)
from faceprior.evaluation.rows import ROWS_FILE, EvaluationRows, require_weights, save_weights
from faceprior.evaluation.tables import published_rows
from faceprior.files import printable
from faceprior.human_eval.files import BenchmarkError, read_benchmark, read_rankings, require_no_answers
from faceprior.jsonl import MANIFEST
from faceprior.models import REWARD_ID, library_versions, looks_like_path, quiet_libraries, resolve_device, weight_dtype
from faceprior.report import write_evaluation
from faceprior.tables import NOT_MEASURED

PAGE, RANK = "report.html", "user_rank"
Problems = list[tuple[str, str]]


@dataclass
class Config:
    # ---- What is measured
    protocols: tuple[str, ...] = ()  # restoration, generation, alignment, ab; empty: those whose inputs exist
    restorers: tuple[str, ...] = (
        "input",
        "restorer=checkpoints/restorer",
    )  # restorers, each NAME=SOURCE: a folder, a hub id, tiny, `input`, or a folder of finished results
    generators: tuple[str, ...] = (
        "base",
        "tuned=checkpoints/guided",
    )  # generators, each NAME=SOURCE: a model, a folder of stage 4, a LoRA file, `base`, or a folder of finished images
    scorer: str = "checkpoints/scorer"  # folder of stage 2, another scorer's folder or hub id, or tiny; empty: none
    reference: str = ""  # folder of real images to which FID compares; empty: the references of the faces
    measures: tuple[str, ...] = ()  # measures to take, by the keys of `faceprior eval-metrics`; empty: all
    weights: tuple[str, ...] = ()  # other weights of measures, each NAME=PATH: image_reward, hps, hps_v2, clip, arcface
    published: str = ""  # id of a published table that is printed beside the measured one; empty: none
    output: str = "results"  # folder for tables and images
    # ---- Restoration
    images: str = ""  # folder of clean, aligned faces to degrade; empty: drawn test portraits
    lq: str = ""  # folder of degraded, aligned faces in place of `images`, or one with lq/ and gt/ in it
    gt: str = ""  # folder of their references, by the same names; empty: gt/ beside lq/, or none
    num_faces: int = 8  # number of faces to restore; 0: all of the folder, [0, inf)
    restoration_resolution: int = 128  # side of the degraded faces in pixels; those of `lq` keep theirs, [64, 2048]
    degradation: Literal["authface", "gfpgan", "diffbir", "codeformer"] = (
        "authface"  # preset of the ranges below, each of two numbers, for a face of 512 pixels
    )
    scale_degradation: bool = True  # whether blur and downsampling, meant for 512 pixels, shrink with the resolution
    blur_kernel: int | None = None  # side of the blur's kernel in pixels, odd; none: the preset's, [1, 255]
    blur_sigma: tuple[float, ...] = ()  # range of the blur's standard deviation in pixels; 0 0: none, [0, inf)
    isotropic_prob: float | None = None  # probability of a round blur; none: the preset's, [0, 1]
    downsample: tuple[float, ...] = ()  # range of the downsampling factor; 1 1: none, [0.001, inf)
    noise: tuple[float, ...] = ()  # range of the degradation's noise, of 255; 0 0: none, [0, inf)
    jpeg: tuple[int, ...] = ()  # range of the JPEG quality; 0 0: no JPEG, [0, 100]
    jitter_prob: float | None = None  # probability of a colour shift; none: the preset's, [0, 1]
    jitter_shift: float | None = None  # largest shift of a colour channel, of 255; none: the preset's, [0, 255]
    gray_prob: float | None = None  # probability that the degraded face is grey; none: the preset's, [0, 1]
    # ---- Generation
    base: str = "tiny"  # the generator `base`: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE in place of the base's own
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"  # prediction of the base; auto: by files
    prompts: str = (
        ""  # general prompts: people, general, or a file (text: one a line); empty: captions of drawn portraits
    )
    people_prompts: str = ""  # prompts of people, as `prompts`; Face Score is measured on them alone if both are given
    num_prompts: int = 8  # number of prompts of each file, [1, inf)
    num_people_prompts: int = 0  # number of `people_prompts`; 0: as num_prompts, [0, inf)
    images_per_prompt: int = 1  # images of each prompt, each from noise of its own, [1, inf)
    generation_resolution: int = 128  # side of the generated images in pixels; 0: each model's own, [0, 2048]
    sample_steps: int = 25  # sampling steps of the generated images (the paper: 50), [1, 1000]
    sampler: Literal["base", "pndm", "ddim", "ddpm", "euler", "dpm++"] = (
        "base"  # sampler of the generated images (the paper: pndm); base: the base's own
    )
    guidance_scale: float = 2.5  # classifier-free guidance scale of the generated images (the paper: 7.5), [1, 30]
    negative_prompt: str = ""  # what the generated images shall not show; empty: the unconditional prediction
    # ---- Alignment
    benchmark: str = ""  # folder of images that people ranked (`python -m faceprior.human_eval rank`), of any protocol
    # ---- AB test
    comparison: str = ""  # folder of images that people compared (`... compare`); empty: restoration/ of the output
    # ---- Faces, and how it runs
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto: without a download
    min_confidence: float = 0.9  # lowest confidence of the detector that counts as a face, [0, 1]
    min_face_size: int = 16  # minimum shorter side of a face box in pixels, [8, 1024]
    batch_size: int = 1  # images at once in a network, [1, inf)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the networks
    seed: int = 0  # seed of the noise and the degradations, [0, inf)
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    RENAMED = {"resolution": ("generation_resolution", "restoration_resolution")}
    FREE = {"protocols", "restorers", "generators", "published", "reference", "benchmark", "comparison"}
    FREE |= {"measures", "weights"}


PROTOCOLS = ("restoration", "generation", "alignment", "ab")


def main(config: Config) -> None:
    # ---- check the inputs before anything is loaded
    quiet_libraries()
    device, dtype = resolve_device(config.device), weight_dtype(config.mixed_precision)
    published = published_rows(config.published)
    measures = {protocol: measures_of(protocol, config.measures) for protocol in PROTOCOLS}
    weights = named_weights(config.scorer, read_weights(config.weights), config.detector)
    if config.benchmark:
        read_rankings(read_benchmark(config.benchmark))  # raises before hours of measuring
    methods = choose_methods(config)
    folders = [method.source for chosen in methods.values() for method in chosen if method.kind == "images"]
    require_outside(config.output, [*folders, *filter(None, (config.lq, config.gt, config.reference))])
    if config.reference and (Path(config.reference) / MANIFEST).is_file():
        raise ValueError(f"`reference` is {config.reference}, with all that a stage wrote: give images/ in it")
    faces = choose_faces(config) if "restoration" in methods else None
    prompts = choose_prompts(config) if "generation" in methods else []

    # ---- open the output folder; rows of an earlier run are kept
    for protocol in PROTOCOLS if config.overwrite else ():
        require_no_answers(Path(config.output) / protocol)
    if not config.overwrite and saved_settings(config) is not None:
        require_weights(Path(config.output), weights)
    output = open_output(config)
    rows = EvaluationRows(output / ROWS_FILE)
    for protocol, chosen in methods.items():
        rows.require_sources(protocol, chosen)
        for method in chosen if protocol == "generation" else []:
            rows.require_same(protocol, method.name, "prompt", {prompt.id: prompt.text for prompt in prompts})

    # ---- make the images: one row each in rows.jsonl, where a run that was stopped resumes
    failed: Problems = []
    if faces is not None:
        restoration.prepare_faces(rows, faces, output)
        for place, method in enumerate(methods["restoration"]):
            arguments = (faces.faces, output, device, dtype, config.batch_size)
            try:
                failed += restoration.restore_faces(rows, method, *arguments)
            except FileNotFoundError as error:  # its files; the others have their rows
                methods["restoration"][place] = replace(method, missing=str(error))
    for place, method in enumerate(methods.get("generation", [])):
        sampling = {"size": config.generation_resolution, "steps": config.sample_steps}
        sampling |= {"guidance_scale": config.guidance_scale, "negative_prompt": config.negative_prompt}
        arguments = (prompts, output, device, dtype, config.sampler, sampling, config.batch_size)
        try:
            failed += generation.draw_images(rows, method, *arguments)
        except FileNotFoundError as error:
            methods["generation"][place] = replace(method, missing=str(error))

    # ---- measure them, one measure after the other; what an earlier run was given, and this one is not, does not count
    save_weights(output, weights)
    results: dict[str, Any] = {"rows": [], "notes": {}, "methods": [], "published": published, "items": {}}
    for protocol, chosen in methods.items():
        drawn = [row["id"] for row in rows.of_protocol(protocol)]
        given = {face.id for face in faces.faces} if protocol == "restoration" else {prompt.id for prompt in prompts}
        rows.select(protocol, [item for item in drawn if item in given or item.startswith(generation.OWN)])
        results["items"][protocol] = sorted({row["id"] for row in rows.of_protocol(protocol)})
        is_certain = config.min_confidence if protocol == "generation" else 0.5  # a degraded face is one, but unclear
        settings = measure_settings(config, chosen, str(device))
        options = (config.reference, is_certain, config.min_face_size)
        measuring = Measuring(protocol, measures[protocol], settings, rows, output, *options)
        measuring.run([method for method in chosen if not method.missing])
        failed += measuring.failed
        results["rows"] += protocol_rows(measuring, chosen)
        if published and published["protocol"] == protocol and RANK in published.get("columns", {}):
            results["rows"] += rank_rows(protocol, chosen, config)
        results["methods"] += described(chosen, protocol)
        if protocol == "generation":
            about, wanted = generation.notes_of(rows, chosen, prompts, config), [prompt.id for prompt in prompts]
        else:
            about, wanted = [f"{len(faces.faces)} faces: {faces.about}"], [face.id for face in faces.faces]
        results["notes"][protocol] = [
            *about,
            *method_notes(measuring, chosen, wanted),
            *set_notes(measuring, chosen),
            *weights_notes(measuring, weights),
            *(time_note(device, config.batch_size) for measure in measuring.taken() if measure.key == "seconds"),
        ]
    rows.compact()

    # ---- how often metrics order images as people do, and which of two methods people prefer
    if "alignment" in (config.protocols or PROTOCOLS) and config.benchmark:
        results["rows"] += alignment_rows(config, published, output, str(device))
    compared = Path(config.comparison or output / "restoration")
    if "ab" in config.protocols or config.comparison or (not config.protocols and (compared / "preferences").is_dir()):
        results["rows"] += preference_rows(compared, config.seed)

    # ---- from rows to tables
    for protocol in dict.fromkeys(row["protocol"] for row in results["rows"]):
        results["notes"].setdefault(protocol, []).extend(HOW[protocol])
    settings = {key: value for key, value in asdict(config).items() if key != "overwrite"}
    results |= {"settings": settings, "versions": library_versions()}
    table = write_results(output, results)
    write_evaluation(output, output / PAGE)
    if not failed:
        lacking = {row["title"] for row in results["rows"] if row["note"].startswith(NOT_MEASURED)}
        finish(output, rows=len(rows), **({"missing": sorted(lacking)} if lacking else {}))
    print_problems([*(faces.problems if faces else []), *failed], "image")
    print("\n".join(printable(line, sys.stdout.encoding) for line in table.split("\n")))
    print(f"Every number with its interval: {output / TABLE}; with the images: {output / PAGE}")
    if failed:
        print(f"{len(failed)} could not be measured: the same command tries them again")


# ---- inputs


def choose_methods(config: Config) -> dict[str, list[Method]]:
    """Return the methods of every protocol that is asked for, or whose inputs exist.

    Raises ValueError for an unknown protocol, FileNotFoundError if there is nothing to measure.
    """
    if unknown := [name for name in config.protocols if name not in PROTOCOLS]:
        raise ValueError(f"`protocols` has to hold some of {', '.join(PROTOCOLS)} but has {unknown[0]!r}")
    wanted = config.protocols or PROTOCOLS
    methods: dict[str, list[Method]] = {}
    if "generation" in wanted and config.generators:
        own = (config.base, config.vae, config.prediction_type)
        methods["generation"] = generation.generators_of(config.generators, *own)
    if "restoration" in wanted and config.restorers:
        methods["restoration"] = restoration.restorers_of(config.restorers)
    if "alignment" in config.protocols and not config.benchmark:
        raise ValueError("`protocols` has alignment, which needs `benchmark`, a folder of images that people ranked")

    # a method among others may be missing, but not all of those that somebody named
    reasons, settings = {}, {"generation": "generators", "restoration": "restorers"}
    for protocol, chosen in methods.items():
        made = [method for method in chosen if method.source not in ("input", config.base) or method.missing]
        if made and all(method.missing for method in made):
            reasons[protocol] = made[0].missing
            if getattr(config, settings[protocol]) != getattr(Config, settings[protocol]):
                raise FileNotFoundError(made[0].missing)
    has_scorer = config.scorer and (not looks_like_path(config.scorer) or Path(config.scorer).exists())
    if reasons and reasons.keys() == methods.keys() and not has_scorer:
        scorer = f"no scorer in {config.scorer}: `python stages/02_train_scorer.py` makes one"
        raise FileNotFoundError(f"there is nothing to measure: {'; '.join([scorer, *reasons.values()])}")
    return methods


def choose_faces(config: Config) -> FaceSet:
    """Return the faces of the test set, or clean ones to degrade."""
    if config.gt and not config.lq:
        raise ValueError("`gt` needs `lq`, the folder of degraded faces; clean faces to degrade are `images`")
    if config.lq:
        inputs, references = test_set_folders(config.lq)
        return faces_of_test_set(inputs, config.gt or references, config.num_faces, config.output)
    ranges = ranges_of(config, config.restoration_resolution)
    pictures = [Path(config.output) / "restoration", Path(config.output) / "generation"]
    size, seed = config.restoration_resolution, config.seed
    faces = degraded_faces(config.images, config.num_faces, size, ranges, seed, pictures)
    return replace(faces, about=f"{faces.about} as {config.degradation}'s at {size} pixels, seed {seed}")


def choose_prompts(config: Config) -> list[Prompt]:
    numbers = (config.num_prompts, config.num_people_prompts or config.num_prompts)
    return prompts_of(config.prompts, config.people_prompts, numbers, config.seed, config.images_per_prompt)


def measure_settings(config: Config, methods: list[Method], device: str) -> MeasureSettings:
    """Return what the measures are loaded with; the models are tiny where every one of them is."""
    models = [method for method in methods if method.kind == "model" and not method.missing]
    are_tiny = bool(models) and all(
        is_tiny(method.source) or is_tiny(method.options.get("base", "")) for method in models
    )
    return MeasureSettings(config.scorer, device, config.detector, are_tiny, read_weights(config.weights))


def alignment_rows(config: Config, published: dict[str, Any] | None, output: Path, device: str) -> list[dict[str, Any]]:
    """Measure the metrics of a benchmark folder that are missing, and return how they agree with people."""
    from faceprior.evaluation.judges import Weights
    from faceprior.human_eval.results import table_rows
    from faceprior.human_eval.scores import measure_missing
    from faceprior.human_eval.tables import write_tables

    benchmark = read_benchmark(config.benchmark)
    given = read_weights(config.weights)
    files = {name: Path(given[name]) for name in ("hps", "hps_v2") if name in given}
    weights = Weights(config.scorer, given.get("image_reward", REWARD_ID), **files)
    reasons = measure_missing(benchmark, weights, config.detector, device)
    tables = write_tables(config.benchmark, output / "alignment", config.seed, reasons)
    is_beside = published and published["protocol"] == "alignment"
    columns = {key for row in published["rows"] for key in row["values"]} if is_beside else {"accuracy", "pearson"}
    return [result_row("alignment", *row) for row in table_rows(tables, columns)]


def rank_rows(protocol: str, methods: list[Method], config: Config) -> list[dict[str, Any]]:
    """Return the mean rank that people gave each method in `benchmark`, where it has the same name."""
    measure = Measure(RANK, "mean rank by people", None, better="lower", spec=".2f")
    found: dict[str, Any] = {}
    if config.benchmark:
        from faceprior.human_eval.tables import tables

        found = {row.model: row.rank.to_row() for row in tables(config.benchmark, config.seed).mean_ranks}
    reason = not_measured(
        f"{config.benchmark} has no such model" if config.benchmark else "nobody has ranked the images:"
        " `python -m faceprior.human_eval make FOLDER --models NAME=SOURCE ...` draws them for three models, `... rank"
        " FOLDER` asks people, then `--benchmark FOLDER`"
    )  # fmt: skip
    return [result_row(protocol, method.name, measure, found.get(method.name, reason)) for method in methods]


def preference_rows(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Return the shares of answers for the first method, for neither and for the second, of each pair of methods."""
    keys = {"first": "first preferred", "same": "same", "second": "second preferred"}
    measures = [Measure(key, title, None, "", spec=".2%") for key, title in keys.items()]
    if not (folder / "preferences").is_dir():
        reason = f"nobody has compared images yet: `python -m faceprior.human_eval compare {folder}` asks people"
        return [result_row("ab", "no answers", measure, not_measured(reason)) for measure in measures]

    from faceprior.human_eval.preferences import preference_estimates

    try:
        estimates = preference_estimates(folder, seed)
    except (FileNotFoundError, BenchmarkError) as error:  # the other protocols have their numbers
        return [result_row("ab", "no answers", measure, not_measured(str(error))) for measure in measures]
    return [
        result_row("ab", f"{first} against {second}", measure, estimate.to_row())
        for (first, second), shares in estimates.items()
        for measure, estimate in zip(measures, shares.values(), strict=True)
    ]


def is_tiny(source: str) -> bool:
    return source == tiny.NAME or bool(source and tiny.info(source))


if __name__ == "__main__":
    run_stage(main, Config)
