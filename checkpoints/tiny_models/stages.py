"""The steps that the stages do, run as a user would run them, and their models written in float16."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from checkpoints.tiny_models.data import Drawings, tidy_configs, write_info
from faceprior import tiny
from faceprior.align import align_face
from faceprior.images import save_image
from faceprior.lora import LORA_FILE
from faceprior.procedural import TRAIN_SEEDS, draw_portrait, draw_scenes, save_captioned
from faceprior.restorer import AuthFaceRestorer
from faceprior.scorer import FaceScorer

ROOT = Path(__file__).resolve().parents[2]
# Stages 1 and 3 draw other seeds: the reward model and the restorer know other people.
REWARD_FIRST = 1000  # number of the first drawing for the reward model's pairs
REWARD_SCENES = TRAIN_SEEDS + 9000  # seed of the first scene for them
FACE_SEEDS = TRAIN_SEEDS + 1000  # seed of the first face for the restorer

# Every layer but those of the timestep and of the latents, so that details can change too, in a LoRA of few bytes.
LAYERS = "to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, proj_in, proj_out, conv1, conv2"
# The guidance loss alone takes detail away with the faults; of a larger reward, skin becomes lighter.
GUIDANCE = {
    "train": "lora",
    "rank": 4,
    "alpha": 4,
    "lora_targets": LAYERS,
    "objective": "guidance_reward",
    "reward_weight": 1e-4,
    "reward_steps": 10,
    "reward_last": 5,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 5,
}


def run(stage: str, output: Path, **options) -> None:
    """Run a stage of the checkout, which resumes, or returns at once when it is complete."""
    options = {"output": output, **options}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, str(ROOT / "stages" / f"{stage}.py"), *arguments], check=True)


def precision(config) -> dict[str, str]:
    return {"mixed_precision": config.mixed_precision, "device": config.device}


def make_reward_pairs(config, work: Path) -> None:
    """Stage 1 on drawings that the later pairs do not use: ImageReward, too, was trained on generated images.

    With fewer sampling steps than the pairs of the method: there are many, and none of them is measured.
    """
    drawn, drawings = work / "reward_drawn", Drawings(work, "train")
    portraits = [i for i, record in enumerate(drawings.records) if record["kind"] == "portrait" and i >= REWARD_FIRST]
    for index in portraits[: config.num_reward_portraits]:
        path = drawn / f"portrait_{index:05d}.png"
        if not path.is_file():
            save_captioned(drawings.images[index], drawings.captions[index], path)
    seeds = range(REWARD_SCENES, REWARD_SCENES + config.num_reward_scenes)
    draw_scenes(drawn, seeds, 4 * config.resolution)
    run("01_make_pairs", work / "reward_pairs", images=drawn, batch_size=16, steps=20, **precision(config))


def make_pairs(config, work: Path) -> None:
    """Stage 1: pairs in all four bins of Table 8."""
    options = {"num_drawn": config.num_pairs, "num_scenes": config.num_pairs // 4}
    run("01_make_pairs", work / "pairs", **options, **precision(config))


def train_scorer(config, work: Path) -> None:
    """Stage 2: the scorer from the reward model, 70% of whose layers are frozen.

    The low rate keeps what the reward model knows of blur: the two sides of a pair do not differ in it.
    """
    options = {"pairs": work / "pairs", "steps": config.scorer_steps, "learning_rate": 1e-4}
    run("02_train_scorer", work / "scorer", **options, **precision(config))
    scorer = FaceScorer.from_pretrained(work / "scorer").to(torch.float16)
    ship(work / "scorer", scorer.save_pretrained, config.scorer_steps)


def tune(config, work: Path) -> None:
    """Stages 1 and 4: the guidance loss and the Face Score of images, for a LoRA on attention and convolutions.

    The pairs are those of `make_reward_pairs` in which the face fills a portrait, as it does in the samples.
    """
    portraits = work / "reward_drawn" / "portrait_*.png"
    run("01_make_pairs", work / "tuning_pairs", images=portraits, batch_size=16, steps=20, **precision(config))
    options = {"pairs": work / "tuning_pairs", "steps": config.guidance_steps}
    run("04_guidance_tune", work / "guided", **options, **GUIDANCE, **precision(config))
    ship(work / "guided", lambda folder: save_lora_in_half(work / "guided", folder), config.guidance_steps)


def save_lora_in_half(source: Path, folder: Path) -> None:
    """Write the LoRA of a run in float16, with its metadata."""
    with safe_open(source / LORA_FILE, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name).half() for name in file.keys()}, file.metadata()  # noqa: SIM118
    folder.mkdir(parents=True)
    save_file(tensors, folder / LORA_FILE, metadata)


def train_prior(config, work: Path) -> None:
    """Stages 3 and 5: portraits, and the SDXL type base tuned on them."""
    run("03_curate_portraits", work / "portraits", num_drawn=config.num_portraits)
    options = {"portraits": work / "portraits", "steps": config.prior_steps, "batch_size": 16, "learning_rate": 2e-4}
    options |= {"schedule": "cosine"}
    run("05_prior_tune", work / "prior", **options, **precision(config))


def draw_faces(config, work: Path) -> None:
    """Draw clean faces, aligned by their true landmarks, in place of FFHQ."""
    for seed in tqdm(range(FACE_SEEDS, FACE_SEEDS + config.num_faces), desc="drawing", unit="face"):
        path = work / "faces" / f"{seed:05d}.png"
        if not path.is_file():
            drawing = draw_portrait(seed, 2 * config.resolution)
            save_image(align_face(drawing.image, drawing.landmarks, config.resolution).crop, path)


def train_restorer(config, work: Path) -> None:
    """Stage 6: the ControlNet learns to follow the degraded face, first without, then with the time-aware facial loss.

    The facial loss starts late, when eyes and mouths can be seen; so the three kinds of it (AuthFace, Table 2) share
    the first run.
    """
    options = {"images": work / "faces", "prior": work / "prior", "batch_size": 8, "schedule": "cosine"}
    options |= {"warmup_steps": 50, "save_every": 100, **precision(config)}
    start = tiny.tiny_folder() / "restorer" if config.go_on else ""

    # ---- without the facial loss
    first = {"init": start, "facial_loss": "none", "steps": config.control_steps, "learning_rate": 1e-3}
    run("06_train_restorer", work / "control", **options, **first)

    # ---- with it
    last = {"init": work / "control", "steps": config.restorer_steps, "learning_rate": 3e-4}
    run("06_train_restorer", work / "restorer", **options, **last)

    restorer = AuthFaceRestorer.from_pretrained(work / "restorer", torch.float16)
    restorer.pipeline.to(dtype=torch.float16)
    ship(work / "restorer", restorer.save_pretrained, config.control_steps + config.restorer_steps)


def ship(source: Path, save, steps: int) -> None:
    """Write what a run trained to checkpoints/tiny with its `tiny.json`, once for each work folder."""
    folder, mark = tiny.tiny_folder() / source.name, source / "shipped"
    if not mark.exists():
        shutil.rmtree(folder, ignore_errors=True)
        save(folder)
        tidy_configs(folder)
        write_info(folder, steps)
        mark.touch()
