"""The matrix of `tests/matrix.py`: a few cells that no other test has, the rest `slow`; all options at once, killed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import load_stage
from safetensors.torch import load_file

pytest.register_assert_rewrite("matrix")
from matrix import COMMON, LITTLE_MEMORY, STAGE, TABLES, Cell, Workshop, cells, run  # noqa: E402
from tiny_bases import KINDS  # noqa: E402

from faceprior.jsonl import read_rows  # noqa: E402
from faceprior.models import quiet_libraries  # noqa: E402

# Column -> the kinds of which the suite has it.
SUBSET = {
    "self_attention": ["sd2-v"],
    "full nf4": ["sd1", "flux-dev"],
    "lora 8bit": ["flux-dev"],
    "dora 8bit": ["sd1"],
    "kohya nf4": ["sdxl-v-ztsnr"],
    "single fp32": ["sd1", "sd2"],
    "dpo": ["sd3.5"],
    "hub id": ["sd3-no-t5"],
    "single file nf4": ["sdxl"],
    "little memory": ["sd3"],
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("matrix"))


def marked(cell: Cell):
    fast = cell.kind in SUBSET.get(cell.column, [])
    return pytest.param(cell, id=f"{cell.kind}-{cell.column}".replace(" ", "-"), marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize("cell", [marked(cell) for cell in cells()])
def test_stage_sdk_and_stock_diffusers_agree(cell, shop, tmp_path):
    """Or the pair is refused, by both and before anything is made."""
    assert bool(run(cell, shop, tmp_path)) == bool(cell.refusal)


def test_the_matrix_has_every_kind_and_the_subset_exists():
    columns = [column for table in TABLES.values() for column in table]
    assert len(columns) == len(set(columns)) and SUBSET.keys() <= set(columns)
    assert {cell.kind for cell in cells()} == set(KINDS)
    assert sum(len(kinds) for kinds in SUBSET.values()) == sum(c.kind in SUBSET.get(c.column, []) for c in cells())


# ---- all options at once, killed and resumed


def killed(stage, config, step):
    """Run stage 4 and send it SIGTERM in its `step`-th step, as a scheduler does; the same call resumes."""
    calls, check = [], stage.TrainingRun.check

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(stage.TrainingRun, "check", interrupted)
        stage.main(config)
    assert stopped.value.code == 143 and not Path(config.output, "done.json").exists()
    assert json.loads(Path(config.output, "resume/state.json").read_text())["step"] == step


def require_same_results(one, other):
    """All but the settings, and the order of a file's metadata, which safetensors draws by chance."""
    for name in ("metrics.jsonl", "validation.jsonl", "samples.jsonl", "samples/000_after.png", "done.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    whole, resumed = (load_file(run / "pytorch_lora_weights.safetensors") for run in (one, other))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_everything_at_once_is_killed_and_resumed_to_the_same_files(shop, tmp_path):
    """The shipped tiny model, whose images have faces: quantized, from a cache, averaged, and the best validation kept.

    Its cross-attention has layers of 64 inputs, which are quantized; the cache is filled by each run anew.
    """
    stage = load_stage(STAGE)
    values = {**COMMON, **LITTLE_MEMORY, "pairs": shop.pairs, "base": "tiny", "lora_targets": "attention"}
    values |= {"resolution": 128, "steps": 3, "save_every": 1, "validate_every": 1, "num_validation": 1}
    values |= {"keep_best": True, "scorer": "tiny", "detector": "mtcnn", "sample_steps": 4, "learning_rate": 1e-2}
    runs = [tmp_path / name for name in ("whole", "cut")]
    whole, cut = (stage.Config(**values | {"output": str(run), "cache": f"{run}-cache"}) for run in runs)
    stage.main(whole)
    killed(stage, cut, step=2)
    shutil.rmtree(cut.cache)
    stage.main(cut)

    require_same_results(*runs)
    rows, _ = read_rows(runs[0] / "metrics.jsonl")
    scores = {row["step"]: row["validation_score"] for row in rows}
    assert json.loads((runs[0] / "done.json").read_text())["best_step"] == max([1, 2, 3], key=scores.get)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_killed_and_resumed_with_little_memory(shop, tmp_path, kind):
    stage, values = load_stage(STAGE), {**COMMON, **LITTLE_MEMORY, "pairs": shop.pairs, "steps": 3, "save_every": 1}
    base = shop.base(Cell("", "", kind, values))
    runs = [tmp_path / name for name in ("whole", "cut")]
    values |= {"base": base, "validate_every": 1, "num_validation": 1, "cache": str(tmp_path / "cache")}
    whole, cut = (stage.Config(**values, output=str(run)) for run in runs)
    stage.main(whole)
    killed(stage, cut, step=2)
    stage.main(cut)
    require_same_results(*runs)


# ---- what is found only when the base is loaded


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_targets": "attn1.to_w"}, "`lora_targets` names 'attn1.to_w'"),
        ({"resolution": 66}, "`resolution` has to be a multiple of"),
        (
            {"objective": "reward", "reward_last": 9, "reward_steps": 3},
            "up to 3, but is 9 .`reward_last` of stage 4",
        ),
    ],
)
def test_the_corrected_command_needs_no_overwrite(shop, tmp_path, values, message):
    """A run that failed before its first step leaves its settings at most."""
    stage, output = load_stage(STAGE), tmp_path / "out"
    given = {**COMMON, "pairs": shop.pairs, "base": shop.base(Cell("", "", "sd1", COMMON)), "num_samples": 0}
    with pytest.raises(ValueError, match=message):
        stage.main(stage.Config(**given | values, output=str(output)))
    assert [path.name for path in output.glob("*")] in ([], ["config.yaml"])
    stage.main(stage.Config(**given, output=str(output)))
    assert (output / "done.json").is_file()
