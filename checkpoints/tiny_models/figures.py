"""
Measure the trained tiny models on test seeds, which no training saw.

    python -m checkpoints.tiny_models.figures                   # everything that is not measured yet
    python -m checkpoints.tiny_models.figures --only damage     # one piece, or all whose names begin with it

Reads   checkpoints/tiny/, and what make_tiny left in `work`; trains the ablations there where they are missing
Writes  results/tiny/: figures.md (the table), figures.json (its rows, with what each piece depends on), sheets/ (images
        to look at), samples/, pairs/, restored/ (images that several figures share)

Every piece is kept with the settings and the weights that it was measured with. So a stopped run resumes, and a model
that was trained again is measured again. A figure that cannot be measured stays in the table, with the way to get it.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from checkpoints.tiny_models.bench import Bench, drawing_digest
from checkpoints.tiny_models.figures_bases import BASES, measure_prompts, measure_samples, measure_vae
from checkpoints.tiny_models.figures_ladders import measure_judges, measure_ladders
from checkpoints.tiny_models.figures_restorer import measure_facial_loss, measure_restorer
from checkpoints.tiny_models.figures_scorer import measure_damage, measure_pairs, measure_ranking, measure_sharpness
from checkpoints.tiny_models.figures_tuning import measure_ablation, measure_blind, measure_tuning
from checkpoints.tiny_models.readme import machine
from checkpoints.tiny_models.table import make_row, markdown
from faceprior.config import run_stage
from faceprior.files import atomic_write
from faceprior.metrics import MetricUnavailable
from faceprior.models import quiet_libraries
from faceprior.tables import Estimate

TABLE, RESULTS = "figures.md", "figures.json"


@dataclass
class Config:
    work: str = "data/tiny"  # folder that make_tiny works in
    models: str = ""  # folder of the shipped models; empty: checkpoints/tiny
    output: str = "results/tiny"  # folder for the table and the images
    only: str = "all"  # piece to measure, or the beginning of the names of several
    num_portraits: int = 200  # number of drawn test portraits: reconstructions, proportions, [1, 3000]
    num_samples: int = 192  # number of samples of every base and tuned model, [1, 3000]
    sample_steps: int = 50  # sampling steps of DDPM, the bases' own sampler, [1, 1000]
    guidance_scale: float = 2.5  # classifier-free guidance scale; 7.5, as for large models, is too much here, [1, 30]
    pair_portraits: int = 112  # number of portraits for unseen pairs, the last bin of Table 8, [0, 3000]
    pair_scenes: int = 150  # number of scenes for the other three bins, [0, 2000]
    pair_steps: int = 50  # inpainting steps, of which the last int(strength x steps) are run, [17, 1000]
    num_damaged: int = 48  # number of faces that are spoiled in twelve ways, [1, 3000]
    num_climbers: int = 96  # number of people who are taken through the base at growing strength, [4, 1000]
    num_faces: int = 192  # number of faces that are blurred, degraded and restored, [1, 2000]
    restore_steps: int = 0  # sampling steps of the restorer; 0: its own number, [0, 1000]
    train_ablations: bool = True  # train the models that the tuned one and the restorer are compared with
    untrained: bool = False  # measure untrained models too, to try the measuring out
    mixed_precision: Literal["no", "bf16"] = "bf16"  # precision of the U-Nets; the VAE and all judges run in float32
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # measure everything again


@dataclass(frozen=True)
class Piece:
    """A part of the table: its heading, the function that returns its rows, and what its numbers depend on."""

    title: str
    measure: Callable[[Bench], list[dict]]
    settings: tuple[str, ...]
    models: tuple[str, ...]


SAMPLING = ("num_samples", "sample_steps", "guidance_scale", "mixed_precision")
PAIRING = ("pair_portraits", "pair_scenes", "pair_steps", "mixed_precision")
JUDGING = (*SAMPLING, "num_portraits")
CLIMBING = ("num_climbers", "num_faces", "mixed_precision")
RESTORING = ("num_faces", "restore_steps", "mixed_precision")


def make_pieces() -> dict[str, Piece]:
    """Return the pieces of the table, in their order."""
    pieces = {"vae": Piece("Autoencoder", measure_vae, ("num_portraits",), ("sd15",))}
    for base in BASES:
        title = f"Faces in samples of {base}"
        pieces[f"samples_{base}"] = Piece(title, partial(measure_samples, base=base), SAMPLING, (base,))
    for base in BASES:
        title, models = f"Prompts followed by {base}", (base, "features")
        pieces[f"prompts_{base}"] = Piece(title, partial(measure_prompts, base=base), SAMPLING, models)
    return {
        **pieces,
        "pairs": Piece("Scorer on unseen pairs", measure_pairs, PAIRING, ("sd15", "scorer")),
        "damage": Piece("Scorer against strength of damage", measure_damage, ("num_damaged",), ("scorer",)),
        "sharpness": Piece("Scorer does not only measure sharpness", measure_sharpness, PAIRING, ("sd15", "scorer")),
        "ladders": Piece("Scorer on ladders of known order", measure_ladders, CLIMBING, ("sd15", "scorer")),
        "judges": Piece(
            "Judges on ladders of known order",
            measure_judges,
            (*CLIMBING, "num_portraits"),
            ("sd15", "judge", "features"),
        ),
        "ranking": Piece(
            "Samples in the scorer's order", measure_ranking, SAMPLING, ("sd15", "scorer", "features", "judge")
        ),
        "tuning": Piece("Guidance tuning", measure_tuning, JUDGING, ("sd15", "scorer", "guided", "judge")),
        "blind": Piece("Guidance tuning in a blind look", measure_blind, (), ("sd15", "guided")),
        "ablations_all": Piece(
            "Guidance tuning against all timesteps",
            partial(measure_ablation, name="guided_all"),
            JUDGING,
            ("sd15", "scorer", "guided", "guided_all", "judge"),
        ),
        "ablations_denoising": Piece(
            "Guidance tuning against plain fine-tuning",
            partial(measure_ablation, name="guided_denoising"),
            JUDGING,
            ("sd15", "scorer", "guided", "guided_denoising", "judge"),
        ),
        "restorer": Piece("Restorer", measure_restorer, RESTORING, ("restorer", "features", "scorer")),
        "facial_loss": Piece(
            "Facial loss over time (AuthFace, Table 2)",
            measure_facial_loss,
            RESTORING,
            ("restorer", "features", "restorer_constant", "restorer_none"),
        ),
    }


def main(config: Config) -> None:
    quiet_libraries()
    logging.getLogger("faceprior").setLevel(logging.WARNING)

    # ---- the pieces to measure
    bench, pieces = Bench(config), make_pieces()
    chosen = [name for name in pieces if config.only in ("all", name) or name.startswith(f"{config.only}_")]
    if not chosen:
        raise ValueError(f"`only` has to be all or one of {', '.join(pieces)} but is {config.only!r}")

    # ---- measure what is not measured yet, and write the table after every piece
    groups = read_groups(bench.output / RESULTS)
    for name in chosen:
        piece = pieces[name]
        if config.overwrite or not is_measured(groups.get(name), key_of(bench, piece)):
            print(f"{name} ...", flush=True)
            groups[name] = measure(bench, piece)
            write(config, {name: groups[name] for name in pieces if name in groups})

    # ---- the table, also when nothing was left to measure
    write(config, {name: groups[name] for name in pieces if name in groups})
    print((bench.output / TABLE).read_text())


def key_of(bench: Bench, piece: Piece) -> dict[str, Any]:
    """Return what a piece's numbers depend on: settings, models and the drawings."""
    settings = {name: getattr(bench.config, name) for name in piece.settings}
    models = {kind: bench.digest(kind) for kind in piece.models}
    return {"settings": settings, "models": models, "drawings": drawing_digest()}


def is_measured(group: dict[str, Any] | None, key: dict[str, Any]) -> bool:
    """Tell whether a piece was measured completely, with that key."""
    return group is not None and group["key"] == key and all(row["value"] is not None for row in group["cells"])


def measure(bench: Bench, piece: Piece) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        cells = piece.measure(bench)
    except MetricUnavailable as error:
        cells = [make_row(piece.title, Estimate(reason=str(error)))]
    seconds = time.perf_counter() - start
    # the key comes last: measuring may have trained a model
    return {"title": piece.title, "key": key_of(bench, piece), "cells": cells, "seconds": round(seconds, 1)}


def read_groups(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text())["groups"] if path.is_file() else {}


def write(config: Config, groups: dict[str, dict[str, Any]]) -> None:
    """Write the table and its rows, each file completely or not at all."""
    output = Path(config.output)
    command = command_of(config)
    with atomic_write(output / RESULTS, "w") as file:
        json.dump({"command": command, "machine": machine(), "groups": groups}, file, indent=1)
    with atomic_write(output / TABLE, "w") as file:
        file.write(markdown(groups, command, machine()))


def command_of(config: Config) -> str:
    """Return the command that measures the same figures."""
    words = ["python -m checkpoints.tiny_models.figures"]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in ("only", "overwrite") and (value != field.default or field.name == "work"):
            name = field.name if value is not False else f"no-{field.name}"
            words.append(f"--{name}" if isinstance(value, bool) else f"--{name} {value}")
    return " ".join(words)


if __name__ == "__main__":
    run_stage(main, Config)
