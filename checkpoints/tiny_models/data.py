"""What the steps share: the drawn images, in files of CHUNK drawings below `work`, and how a model is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from faceprior import tiny
from faceprior.procedural import TRAIN_SEEDS, VALIDATION_SEEDS, Drawing, Scene, draw_portrait, draw_scene

CHUNK = 200  # drawings in a file
SCENE_EVERY = 5  # every fifth training drawing is a scene, the others are portraits
SCENE_SEEDS = 5_000  # offset of the scenes' seeds: they take the upper half of the training seeds
SCENE_BIN = 2  # bin of Table 8 (Face Score): faces of 13 to 40 pixels at 128

CONFIGS = ("config.json", "model_index.json", "tokenizer_config.json")
ORIGINS = ("_name_or_path", "is_local", "local_files_only")  # keys in them that tell of the machine that wrote them


def draw(config, work: Path) -> None:
    """Draw the training images (a scene, then four portraits, and so on) and 200 validation portraits."""
    jobs = [("train", first) for first in range(0, config.num_drawn, CHUNK)] + [("validation", 0)]
    for split, first in tqdm(jobs[config.shard :: config.num_shards], desc="drawing", unit="file"):
        path = work / split / f"{first:06d}.npz"
        if not path.is_file():
            drawings = [draw_one(config.resolution, split, first + i) for i in range(CHUNK)]
            save_arrays(
                path,
                images=np.stack([drawing.image for drawing in drawings]),
                captions=np.array([drawing.caption() for drawing in drawings]),
                records=np.array([json.dumps(describe(drawing)) for drawing in drawings]),
            )


def draw_one(resolution: int, split: str, index: int) -> Drawing | Scene:
    if split == "validation":
        return draw_portrait(VALIDATION_SEEDS + index, resolution)
    if index % SCENE_EVERY:
        return draw_portrait(TRAIN_SEEDS + index, resolution)
    return draw_scene(TRAIN_SEEDS + SCENE_SEEDS + index // SCENE_EVERY, resolution, area_bin=SCENE_BIN)


def describe(drawing: Drawing | Scene) -> dict[str, Any]:
    """Return what is known about a drawing, as JSON: its kind, and its faces with landmarks, box and tags."""
    faces = drawing.faces if isinstance(drawing, Scene) else [drawing]
    return {
        "kind": "scene" if isinstance(drawing, Scene) else "portrait",
        "faces": [
            {
                "landmarks": face.landmarks.round(2).tolist(),
                "box": [round(edge, 2) for edge in face.box],
                "tags": {name: value if isinstance(value, str) else float(value) for name, value in face.tags.items()},
            }
            for face in faces
        ],
    }


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file: the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


class Drawings(Dataset):
    """The drawn images of a split, `train` or `validation`: {"pixel_values": (3, R, R) in [-1, 1], "caption"}.

    Attributes: images (N, R, R, 3) uint8; captions; records, as `describe` returns them. Raises FileNotFoundError
    where nothing was drawn.
    """

    def __init__(self, work: Path, split: str):
        files = [np.load(path) for path in sorted((work / split).glob("??????.npz"))]
        if not files:
            raise FileNotFoundError(
                f"no drawings in {work / split}: `python -m checkpoints.tiny_models.make_tiny --only draw`"
            )
        self.images = np.concatenate([file["images"] for file in files])
        self.captions = [str(text) for file in files for text in file["captions"]]
        self.records = [json.loads(str(text)) for file in files for text in file["records"]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        pixels = torch.from_numpy(self.images[index]).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixel_values": pixels, "caption": self.captions[index]}


def tidy_configs(folder: Path) -> None:
    """Drop the paths of where parts came from, and let transformers load text encoders in float32."""
    for path in (path for name in CONFIGS for path in folder.rglob(name)):
        config = {key: value for key, value in json.loads(path.read_text()).items() if key not in ORIGINS}
        if path.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")


def write_info(folder: Path, steps: int, seed: int = 0) -> None:
    """Write the `tiny.json` of a trained model; the folder is named after the model's kind."""
    info = {"kind": folder.name, "seed": seed, "trained": True, "steps": steps}
    (folder / tiny.INFO_FILE).write_text(json.dumps(info))
