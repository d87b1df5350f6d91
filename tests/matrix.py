"""The matrix: every kind of base x what is trained, its losses, its files, and the forms that a base comes in.

    python tests/matrix.py            # or `make matrix`: prints it, in minutes; --table and --kind print a part

A cell trains a tiny random base of the kind for two steps at 32 px, by stage 4's `main` and by `GuidanceTuner.fit`, and
checks that both write the same tensors, and that they give the tuner's own image in stock diffusers. Where a pair makes
no sense the cell checks that it is refused before anything is made, and by what sentence.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import load_stage  # first: it sets the number of threads  # isort: skip
import faceprior  # noqa: F401  # before what loads bitsandbytes, which else warns  # isort: skip

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from original_layout import original_tensors
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_bases import KINDS, SIZE, TRANSFORMERS, build, widened

from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.detect import Face, box_mask
from faceprior.diffusion import sample_images
from faceprior.dino import dino_distance
from faceprior.guidance import OBJECTIVES, GuidanceTuner
from faceprior.images import save_image
from faceprior.lora import LORA_FORMATS
from faceprior.models import quiet_libraries, weight_dtype
from faceprior.pairs import FacePair
from faceprior.procedural import draw_portrait
from faceprior.reward_tuning import FaceReward

STAGE = "04_guidance_tune"
FORMS = ("folder", "single file", "hub id")  # of a base
COMMON = {"train": "lora", "rank": 2, "alpha": 4, "resolution": SIZE, "steps": 2, "batch_size": 2}
COMMON |= {"learning_rate": 0.02, "num_samples": 1, "sample_steps": 2, "device": "cpu"}
SAME = 1e-4  # of pixels in [0, 1]: the rounding of sums, which the place of loaded weights in memory decides
CHANGED = 1e-3  # of the tuned image's pixels, at least one is as far from the untuned one's
LITTLE_MEMORY = {"quantization": "nf4", "mixed_precision": "bf16", "gradient_checkpointing": True}
LITTLE_MEMORY |= {"optimizer": "adamw8bit", "ema_decay": 0.5, "cache": "cache", "rank": 64}
LITTLE_MEMORY |= {"learning_rate": 0.2}  # so that the training changes more than the rounding to bfloat16

# Title -> the columns, each with its settings of stage 4 and the form of the base; the rows are KINDS.
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "trained weights": {
        "self_attention": {"train": "self_attention"},
        "full": {"train": "full"},
        "lora": {},
        "lora 8bit": {"quantization": "8bit"},
        "lora nf4": {"quantization": "nf4"},
        "self_attention 8bit": {"train": "self_attention", "quantization": "8bit"},
        "full nf4": {"train": "full", "quantization": "nf4"},
    },
    "loss": {
        **{objective: {"objective": objective} for objective in OBJECTIVES},
        "guidance dino": {"distance": "dino"},
    },
    "layers and kind of the LoRA": {
        "attention": {"lora_targets": "attention"},
        "all": {"lora_targets": "all"},
        "names": {"lora_targets": "to_q, to_v"},
        "rslora": {"lora_variant": "rslora"},
        "dora": {"lora_variant": "dora"},
        "dora 8bit": {"lora_variant": "dora", "quantization": "8bit"},
        "dora nf4": {"lora_variant": "dora", "quantization": "nf4"},
        "rslora nf4": {"lora_variant": "rslora", "quantization": "nf4"},
    },
    "files": {
        "kohya": {"lora_format": "kohya"},
        "kohya rslora all": {"lora_format": "kohya", "lora_variant": "rslora", "lora_targets": "all"},
        "kohya dora": {"lora_format": "kohya", "lora_variant": "dora"},
        "kohya nf4": {"lora_format": "kohya", "quantization": "nf4"},
        "extracted": {"train": "self_attention", "extract_lora": 64},
        "extracted kohya": {"train": "self_attention", "extract_lora": 64, "lora_format": "kohya"},
        "single fp16": {"train": "full", "single_file": "fp16"},
        "single fp32": {"train": "self_attention", "single_file": "fp32"},
    },
    "form of the base, memory": {
        "single file": {"form": "single file"},
        "single file nf4": {"form": "single file", "quantization": "nf4"},
        "hub id": {"form": "hub id"},
        "cache": {"cache": "cache"},
        "little memory": LITTLE_MEMORY,
    },
}


@dataclass(frozen=True)
class Cell:
    """A kind of base with settings of stage 4, and a form of the base."""

    table: str
    column: str
    kind: str
    settings: dict[str, Any] = field(hash=False)
    form: str = "folder"

    def __str__(self) -> str:
        return f"{self.table}: {self.column}: {self.kind}"

    @property
    def refusal(self) -> str:
        """What the sentence has in it that refuses the pair; empty for one that has to work."""
        train, quantization, variant = self("train"), self("quantization", "none"), self("lora_variant", "plain")
        if quantization != "none" and train != "lora":
            return f"`train` is {train} and `quantization` {quantization}, but quantized weights cannot be trained"
        if self.kind in TRANSFORMERS and train != "lora":
            return f"`train` is {train}, and of a transformer only a LoRA is trained"
        if self("lora_format") == "kohya" and self.kind in TRANSFORMERS:
            return "`lora_format` kohya is for U-Nets, and the base has a transformer"
        if self("lora_format") == "kohya" and variant == "dora":
            return "`lora_format` is kohya, from which diffusers drops the magnitudes of a DoRA"
        if self("single_file", "none") != "none" and self.kind.startswith("sd2"):
            return "a single file is written of Stable Diffusion 1 and SDXL but the base is Stable Diffusion 2"
        return ""

    def __call__(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)


def cells() -> list[Cell]:
    """All cells but those of single files of transformers, which are no base and refused as such elsewhere."""
    made = []
    for title, columns in TABLES.items():
        for kind in KINDS:
            for column, values in columns.items():
                values = {**COMMON, **values}
                form = values.pop("form", FORMS[0])
                if form != "single file" or kind not in TRANSFORMERS:
                    made.append(Cell(title, column, kind, values, form))
    return made


# ---- the bases and the pairs, made once


class Workshop:
    """A folder with the bases in all forms and some pairs of stage 1."""

    def __init__(self, root: Path):
        self.root, self.hub = root, root / "hub"
        self.pairs = _write_pairs(root / "pairs")
        self.scorer = tiny.tiny_scorer().eval()

    def base(self, cell: Cell) -> str:
        """Return the name of a cell's base, which is made if it is new; its folder is `folder`."""
        folder = self.folder(cell)
        if cell.form == "single file":
            file = self.root / "single" / folder.name / "model.safetensors"
            if not file.exists():
                pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
                shutil.copytree(folder, file.parent, ignore=shutil.ignore_patterns("*.safetensors"))
                save_file(original_tensors(pipeline, openclip=cell.kind.startswith("sd2")), file)
            return str(file)
        if cell.form == "hub id":
            cache = self.hub / f"models--faceprior--{folder.name}"
            if not cache.exists():
                (cache / "refs").mkdir(parents=True)
                (cache / "refs/main").write_text("1" * 40)
                shutil.copytree(folder, cache / "snapshots" / ("1" * 40))
            return f"faceprior/{folder.name}"
        return str(folder)

    def folder(self, cell: Cell) -> Path:
        is_wide = cell("quantization", "none") != "none"
        folder = self.root / "bases" / f"{cell.kind}{'-wide' if is_wide else ''}"
        if not folder.exists():
            pipeline = build(cell.kind)
            (widened(pipeline) if is_wide else pipeline).save_pretrained(folder)
        return folder

    def reward(self, *_: Any) -> FaceReward:
        """Reward a face that every image has at the same place: those of untrained bases show none."""
        box = (6, 4, 27, 29)
        return FaceReward(self.scorer, lambda rgb: [Face(box, None, 0.99)], steps=2, guidance_scale=2.5)


def _write_pairs(folder: Path) -> str:
    """Write three pairs: a drawn face, upright and upside down."""
    drawing = draw_portrait(1, 64)
    good = Image.fromarray(drawing.image)
    for name, image in (("good", good), ("bad", good.rotate(180)), ("mask", box_mask((64, 64), drawing.box))):
        save_image(image, folder / f"{name}.png")
    pair = FacePair(
        id="a", photograph="a.png", good="good.png", bad="bad.png", mask="mask.png", box=list(drawing.box),
        landmarks=None, confidence=1.0, area_ratio=0.2, strength=0.4, prompt="a man", seed=0, base="tiny",
        difference=9.0,
    ).to_row()  # fmt: skip
    rows = [{**pair, "id": str(i), "prompt": prompt} for i, prompt in enumerate(("a man", "a woman", "a boy"))]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


# ---- one cell


def run(cell: Cell, shop: Workshop, folder: Path) -> str:
    """Run a cell in an empty folder; return the sentence that refuses it, empty if it works.

    Raises AssertionError where stage, SDK and stock diffusers disagree, and whatever else goes wrong.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(shop.hub))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(logging.getLogger("huggingface_hub"), "level", logging.ERROR)  # that there is no network
        patch.setattr(load_stage(STAGE), "load_reward", shop.reward)
        if cell.refusal:
            return _refused(cell, shop, folder)
        _check(cell, shop, folder)
    return ""


def _refused(cell: Cell, shop: Workshop, folder: Path) -> str:
    """Check that stage and SDK refuse a cell by one sentence: the stage before its output, the SDK before `fit`."""
    with pytest.raises(ValueError, match=re.escape(cell.refusal)) as refusal:
        run_stage(cell, shop, folder / "stage")
    assert not (folder / "stage").exists()
    with pytest.raises(ValueError, match=re.escape(cell.refusal)):
        save(cell, load(cell, shop), folder / "sdk")
    assert not list(folder.rglob("*.safetensors"))
    return str(refusal.value)


def _check(cell: Cell, shop: Workshop, folder: Path) -> None:
    # ---- the stage and the SDK write the same tensors
    run_stage(cell, shop, folder / "stage")
    tuner = load(cell, shop)
    untuned = draw(tuner.pipeline())
    fit(cell, tuner, shop, folder)
    save(cell, tuner, folder / "sdk")
    written = [_weights(folder / made) for made in ("stage", "sdk")]
    assert written[0].keys() == written[1].keys(), "stage and SDK write other files"
    for file, tensors in written[0].items():
        assert tensors.keys() == written[1][file].keys(), file
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, written[1][file][name], rtol=1e-3, atol=1e-6, msg=f"{file}: {name}")

    # ---- what the stage wrote, in stock diffusers, gives the tuner's own image, and the stage's sample
    tuned = draw(tuner.pipeline())
    change = np.abs(tuned - untuned).max()
    assert change > CHANGED, "the training changed nothing"
    stock = stock_pipeline(cell, shop, folder / "stage")
    if stock is not None:
        off = np.abs(draw(stock) - tuned).max()
        bound = SAME if cell("mixed_precision", "no") == "no" else change / 4  # a loaded LoRA is rounded to bfloat16
        assert off < bound, f"stock diffusers draws another image, {off:.2g} off, where training changed {change:.2g}"
        (row,) = [json.loads(line) for line in (folder / "stage/samples.jsonl").read_text().splitlines()]
        (drawn,) = sample_images(stock, [row["prompt"]], [row["seed"]], SIZE, COMMON["sample_steps"], 2.5)
        with Image.open(folder / "stage" / row["after"]) as sample:
            assert np.abs(np.asarray(drawn, int) - np.asarray(sample, int)).max() <= max(1, 255 * bound)
    if cell("quantization", "none") != "none":
        layers = [m for m in tuner.denoiser.modules() if hasattr(m, "base_layer")]
        assert any(type(layer.base_layer).__name__ in ("Linear8bit", "Linear4bit") for layer in layers)
        plain = plain_base(cell, shop)
        before = draw(plain)
        load_stock(cell, plain, folder / "stage")
        likeness = cosine(draw(plain) - before, tuned - untuned)
        assert likeness > 0.5, f"on the plain base the LoRA does something else, cosine {likeness:.2g}"
    for pipeline, bound in other_forms(cell, shop, folder / "stage", tuned, untuned):
        off = np.abs(draw(pipeline) - tuned).max()
        assert off < bound, f"another file draws another image, {off:.2g} off"

    # ---- the log
    rows = [json.loads(line) for line in (folder / "stage/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)


def run_stage(cell: Cell, shop: Workshop, output: Path) -> None:
    stage = load_stage(STAGE)
    values = {**cell.settings, "base": shop.base(cell), "pairs": shop.pairs, "output": str(output), "scorer": "none"}
    if values.get("cache"):
        values["cache"] = str(output.parent / "stage-cache")
    stage.main(stage.Config(**values))


def load(cell: Cell, shop: Workshop) -> GuidanceTuner:
    options = {key: cell.settings[key] for key in ("train", "rank", "alpha")}
    options |= {key: cell(key) for key in ("quantization", "lora_targets", "lora_variant") if key in cell.settings}
    if "reward" in cell("objective", ""):
        options["reward"] = shop.reward()
    tuner = GuidanceTuner.from_pretrained(shop.base(cell), weight_dtype(cell("mixed_precision", "no")), **options)
    if cell("distance") == "dino":
        tuner.distance = dino_distance(tuner.pipeline().vae, load_stage(STAGE).load_features("tiny"))
    return tuner


def fit(cell: Cell, tuner: GuidanceTuner, shop: Workshop, folder: Path) -> None:
    names = ("steps", "batch_size", "learning_rate", "resolution", "device", "objective", "mixed_precision")
    names += ("gradient_checkpointing", "optimizer", "ema_decay")
    options = {key: cell(key) for key in names if key in cell.settings}
    if cell("cache"):
        options["cache"] = folder / "sdk-cache"
    tuner.fit(shop.pairs, **options)


def save(cell: Cell, tuner: GuidanceTuner, folder: Path) -> None:
    """Write the same files as the stage, to the same places."""
    lora_format = cell("lora_format", "diffusers")
    if cell("train") == "lora":
        tuner.save_lora(folder, lora_format)
    elif cell("single_file", "none") == "none":
        tuner.save_pretrained(folder)
    if cell("extract_lora"):
        tuner.save_lora(folder / "lora", lora_format, cell("extract_lora"))
    if cell("single_file", "none") != "none":
        tuner.save_single_file(folder / "guided.safetensors", _dtype(cell))
        tuner.save_pretrained(folder)


def stock_pipeline(cell: Cell, shop: Workshop, folder: Path) -> diffusers.DiffusionPipeline | None:
    """Return what stock diffusers makes of the stage's main file; with its base as it was trained on."""
    if cell("train") != "lora":
        return _quiet(diffusers.DiffusionPipeline.from_pretrained(folder))
    pipeline = plain_base(cell, shop)
    if cell("quantization", "none") != "none" or cell("mixed_precision", "no") != "no":
        # diffusers' own quantization wants a GPU; the class of the pipeline, and its loader of LoRAs, are its own
        dtype = weight_dtype(cell("mixed_precision", "no"))
        pipeline = load_pipeline(shop.base(cell), dtype, quantization=cell("quantization", "none"))
    load_stock(cell, pipeline, folder)
    return pipeline


def load_stock(cell: Cell, pipeline: diffusers.DiffusionPipeline, folder: Path) -> None:
    # peft, which makes a DoRA on `meta` first, would put an 8-bit base there too
    sparing = cell("lora_variant") != "dora" or cell("quantization") != "8bit"
    file = LORA_FORMATS[cell("lora_format", "diffusers")]
    pipeline.load_lora_weights(folder, weight_name=file, low_cpu_mem_usage=sparing)


def plain_base(cell: Cell, shop: Workshop) -> diffusers.DiffusionPipeline:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if cell.kind == "sd3-no-t5" else {}
    return _quiet(diffusers.DiffusionPipeline.from_pretrained(shop.folder(cell), **absent))


def other_forms(cell: Cell, shop: Workshop, folder: Path, tuned, untuned):
    """Give the pipelines of the other files that were asked for, each with how far its image may be off."""
    change = np.abs(tuned - untuned).max()
    if cell("extract_lora"):  # its rank is that of the layers' sides, so that only the biases' change is lost
        pipeline = plain_base(cell, shop)
        load_stock(cell, pipeline, folder / "lora")
        yield pipeline, change / 2
    if cell("single_file", "none") != "none":
        yield load_pipeline(folder / "guided.safetensors"), SAME if cell("single_file") == "fp32" else change / 2


def draw(pipeline: diffusers.DiffusionPipeline) -> np.ndarray:
    options = {"num_inference_steps": 2, "height": SIZE, "width": SIZE}
    return pipeline("a man", output_type="np", generator=torch.Generator().manual_seed(3), **options).images


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def _weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = [path for path in folder.rglob("*.safetensors") if "resume" not in path.parts]
    return {path.relative_to(folder).as_posix(): load_file(path) for path in files}


def _dtype(cell: Cell) -> torch.dtype:
    return {"fp16": torch.float16, "fp32": torch.float32}[cell("single_file")]


def _quiet(pipeline: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- the table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, help="one table only")
    parser.add_argument("--kind", choices=KINDS, help="one kind of base only")
    asked = parser.parse_args()
    quiet_libraries()
    notes: list[str] = []  # why a cell was refused or failed, by number
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        shop = Workshop(Path(root))
        for title, columns in TABLES.items():
            if asked.table not in (None, title):
                continue
            found = {(c.kind, c.column): c for c in cells() if c.table == title}
            width = [max(len(column), 12) + 2 for column in columns]
            print(f"\n{title}\n{'':15}" + "".join(f"{c:{w}}" for c, w in zip(columns, width, strict=True)))
            for kind in KINDS if asked.kind is None else (asked.kind,):
                print(f"{kind:15}", end="", flush=True)
                for column, wide in zip(columns, width, strict=True):
                    cell = found.get((kind, column))
                    text = _result(cell, shop, notes) if cell else "-"
                    failed += text.startswith("FAILED")
                    print(f"{text:{wide}}", end="", flush=True)
                print()
    for number, note in enumerate(notes, 1):
        print(textwrap.fill(f"[{number}] {note}", 120, subsequent_indent="    "))
    return min(failed, 1)


def _result(cell: Cell, shop: Workshop, notes: list[str]) -> str:
    folder, printed = Path(tempfile.mkdtemp(dir=shop.root)), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            reason = run(cell, shop, folder)
        word = "refused"
    except (Exception, pytest.fail.Exception) as error:
        reason, word = f"{cell}: {type(error).__name__}: {error}", "FAILED"
        print(f"\n{traceback.format_exc()}", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    if not reason:
        return "ok"
    reason = reason.replace(str(shop.root), "").strip()
    if reason not in notes:
        notes.append(reason)
    return f"{word} [{notes.index(reason) + 1}]"


if __name__ == "__main__":
    sys.exit(main())
