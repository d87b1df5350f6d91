"""Small models of the real classes: the embedded default where there is no GPU and no hub.

They have the architectures of the published models and load with stock diffusers and transformers, so a preset changes
sizes and ids only, never the path through the code. Their folders are marked by `tiny.json`, which also says whether
the weights were trained.

Finding and naming them loads no model library; what builds them (`tiny.build`) is loaded on first use.
"""

import json
import logging
from importlib import import_module
from pathlib import Path

from faceprior.jsonl import require_keys

logger = logging.getLogger(__name__)
NAME = "tiny"
KINDS = ("sd15", "sdxl", "reward", "scorer", "restorer")
RESOLUTION = 128  # pixels; latents are a quarter of it
INFO_FILE = "tiny.json"
NOTICE = "the tiny embedded model: small, for drawn portraits and for trying the tools, not the published one"

# names of `tiny.build`
_BUILT = (
    "WORDS",
    "make_vae",
    "tiny_controlnet",
    "tiny_restorer",
    "tiny_scorer",
    "tiny_sd15",
    "tiny_sdxl",
    "write",
)


def __getattr__(name: str):
    if name not in _BUILT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.build"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_BUILT])


def resolve(name: str, kind: str, root: Path | None = None) -> str:
    """Return the folder of the tiny model of that `kind` for the name `tiny`; any other name is returned unchanged.

    kind: sd15, sdxl, reward (what stage 2 starts from), scorer or restorer. root: the folder of the tiny models,
    `tiny_folder()` by default. Shipped weights are used if there are any; else an untrained model is built from a seed
    once, with a warning.
    """
    if name != NAME:
        return name
    folder = (root or tiny_folder()) / kind
    if not (folder / INFO_FILE).is_file():
        from faceprior.tiny.build import write

        logger.warning("%s: building it from a seed, UNTRAINED", folder)
        write(folder, kind)
    return str(folder)


def tiny_folder() -> Path:
    """Return `checkpoints/tiny` of the checkout, or a cache folder if the package is installed without one."""
    checkpoints = Path(__file__).resolve().parents[2] / "checkpoints"
    return checkpoints / NAME if checkpoints.is_dir() else Path.home() / ".cache" / "faceprior" / NAME


def info(folder: str | Path) -> dict | None:
    """Return the content of a model's `tiny.json` ({kind, seed, trained}), None if the model is not tiny."""
    path = Path(folder) / INFO_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        require_keys(found, {"trained": bool})
        return found
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy the folder again") from error


def copy_info(source: str, folder: str | Path, root: Path | None = None) -> None:
    """Mark the model in `folder` as tiny if it was made from a tiny one: the name `tiny`, or a folder with `tiny.json`.

    The name `tiny` means the kind of model that `folder` holds now; root: as for `resolve`.
    """
    origin = info((root or tiny_folder()) / _kind_in(Path(folder)) if source == NAME else source)
    if origin is not None:
        (Path(folder) / INFO_FILE).write_text(json.dumps(origin))


def _kind_in(folder: Path) -> str:
    """Return the kind of a saved model by its class; a LoRA, which names no class, is of the SD1.5 type."""
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            return _KIND_OF_CLASS[json.loads((folder / name).read_text())["_class_name"]]
    return "sd15"


_KIND_OF_CLASS = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLControlNetPipeline": "restorer",
    "FaceScorer": "reward",  # stage 2 starts from it
}


def main() -> None:
    """Write all tiny models that do not exist yet."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for kind in KINDS:
        print(resolve(NAME, kind))
