"""--plan: the table, the options that make a run fit, and the command of each stage."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from conftest import load_stage
from torch import nn

from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.bases.empty import CONFIGS, KNOWN
from faceprior.config import run_stage
from faceprior.memory import Rehearsal
from faceprior.models import quiet_libraries
from faceprior.plan import GIB, Plan, command_options, find_fitting, make_plan, options, parse_size, show_plan
from faceprior.scorer import FaceScorer

SCORER, GUIDANCE, PRIOR, RESTORER = "02_train_scorer", "04_guidance_tune", "05_prior_tune", "06_train_restorer"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny pipelines that have configs and no weights."""
    root = tmp_path_factory.mktemp("bases")
    for kind, build in (("sd15", tiny.tiny_sd15), ("sdxl", tiny.tiny_sdxl)):
        build().save_pretrained(root / kind)
        for weights in (root / kind).glob("*/*.safetensors"):
            weights.unlink()
    return root


# ---- sizes and the table


@pytest.mark.parametrize(
    ("written", "size"),
    [("8GB", 8 * GIB), ("8", 8 * GIB), ("7.5 GiB", 7.5 * GIB), ("11g", 11 * GIB), ("500MB", 500 * 2**20)],
)
def test_sizes(written, size):
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["large", "8TB", "0", "-1", "8GB of it"])
def test_what_is_no_size_is_named(written):
    with pytest.raises(ValueError, match=f"`--plan` takes the memory of a card, such as 8GB, but got '{written}'"):
        parse_size(written)


def test_the_table_by_hand():
    """The peak is 4 GiB, of training; CUDA takes 0.5 and 4% of it, 0.66 GiB. A row of nothing is left out."""
    phases = {
        "optimizer step": {"U-Net": 2 * GIB, "gradients": GIB, "VAE": GIB // 2},
        "training": {"activations": GIB, "U-Net": 2 * GIB, "gradients": GIB // 2, "VAE": GIB // 2, "tables": 1},
    }
    lines = str(Plan(phases, "cuda")).splitlines()
    assert [line.split() for line in lines[:7]] == [
        ["GiB", "training", "optimizer", "step"],
        ["U-Net", "2.00", "2.00"],
        ["VAE", "0.50", "0.50"],
        ["gradients", "0.50", "1.00"],
        ["activations", "1.00", "0.00"],
        ["-" * len(lines[0])],
        ["together", "4.00", "3.50"],
    ]
    assert lines[7] == "peak: 4.00 GiB and about 676 MiB for CUDA and fragmentation: 4.66 GiB"
    assert len({len(line) for line in lines[:7]}) == 1
    assert str(Plan(phases, "cpu")).endswith("peak: 4.00 GiB")


# ---- options


def test_options_keep_the_samples_of_a_step():
    config = load_stage(GUIDANCE).Config(batch_size=6, accumulation=2, train="full", resolution=512)
    assert list(options(config)) == [
        {"mixed_precision": "bf16"},
        {"batch_size": 3, "accumulation": 4},
        {"batch_size": 1, "accumulation": 12},
        {"gradient_checkpointing": True},
        {"optimizer": "adamw8bit"},
        {"train": "lora"},
        {"resolution": 384},
        {"resolution": 256},
    ]


def test_options_of_a_stage_without_train_and_resolution():
    config = load_stage(SCORER).Config(batch_size=1, mixed_precision="bf16")
    assert list(options(config)) == [{"gradient_checkpointing": True}, {"optimizer": "adamw8bit"}]


@dataclass
class Config:
    """Settings of two phases: images take 64 KB each, weights 256 or 64 KB, and 96 KB are always there."""

    batch_size: int = 4  # images, [1, inf)
    accumulation: int = 1  # micro-batches, [1, inf)
    train: Literal["full", "lora"] = "full"  # what is trained
    quantization: Literal["none", "nf4"] = "none"  # of the base
    mixed_precision: str = "bf16"  # dtype
    device: str = "cpu"  # where


def rehearse(config, rehearsal):
    with rehearsal:
        kept = torch.zeros(96 * 1024, dtype=torch.uint8)
        rehearsal.name("always there", kept)
        with rehearsal.phase("images"):
            torch.zeros(config.batch_size * 64 * 1024, dtype=torch.uint8)
        with rehearsal.phase("weights"):
            torch.zeros((64 if config.train == "lora" else 256) * 1024, dtype=torch.uint8)


def search(size):
    config = Config()
    found = find_fitting(rehearse, config, size * 1024, make_plan(rehearse, config))
    return [(option, plan.peak // 1024, kept) for option, plan, kept in found]


def test_every_phase_that_does_not_fit_is_lowered():
    """Both take 256 + 96 KB: fewer images lower the one, a LoRA the other; 4 bits lower none.

    With 240 KB two images fit already (128 + 96).
    """
    halved, one, lora = {"batch_size": 2, "accumulation": 2}, {"batch_size": 1, "accumulation": 4}, {"train": "lora"}
    assert search(240) == [(halved, 352, True), (one, 352, False), (lora, 224, True)]
    assert search(200) == [(halved, 352, True), (one, 352, True), (lora, 160, True)]
    assert search(150)[3:] == [({"quantization": "nf4"}, 160, False)]
    assert search(352) == []


def test_a_setting_that_cannot_be_is_passed_over():
    def only_one_image(config, rehearsal):
        if config.batch_size == 2:
            raise ValueError("no two images")
        rehearse(config, rehearsal)

    config = replace(Config(), train="lora")
    plan = make_plan(only_one_image, config)
    found = list(find_fitting(only_one_image, config, 200 * 1024, plan))
    assert [option for option, _, _ in found] == [{"batch_size": 1, "accumulation": 4}]


def test_a_stage_says_what_fits(capsys):
    config = replace(Config(), train="lora")
    assert show_plan(rehearse, config, "0.16MB") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "it fits into 0 MiB with --batch_size 1 --accumulation 4" in lines[-1]
    assert show_plan(rehearse, config, "0.1MB") == 1
    assert "nothing fits into 0 MiB: the least is 0 MiB with --batch_size 1" in capsys.readouterr().out
    assert show_plan(rehearse, config, "1MB") == show_plan(rehearse, config) == 0


def test_options_are_written_as_the_command_line_takes_them():
    values = {"gradient_checkpointing": True, "batch_size": 1, "optimizer": "adamw8bit"}
    assert command_options(values) == "--gradient_checkpointing --batch_size 1 --optimizer adamw8bit"


# ---- bases without weights


def shapes(module):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_an_empty_pipeline_has_the_parts_of_a_loaded_one(bases, tiny_models, kind):
    empty = load_pipeline(bases / kind, torch.bfloat16, weights=False)
    loaded = load_pipeline(tiny_models / kind, torch.bfloat16)
    assert type(empty) is type(loaded) and empty.components.keys() == loaded.components.keys()
    for name, part in loaded.components.items():
        assert type(getattr(empty, name)) is type(part)
        if isinstance(part, nn.Module):
            assert shapes(getattr(empty, name)) == shapes(part)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd15", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sdxl", {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_the_configs_of_the_package_have_the_published_sizes(name, counts):
    """As the published checkpoints' tensors add up to."""
    with Rehearsal("cpu"):
        pipeline = load_pipeline(CONFIGS / name, weights=False)
        assert {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in counts} == counts


def test_the_presets_name_bases_that_are_known():
    presets = (Path(__file__).parent.parent / "stages" / "presets").glob("*.yaml")
    sections = [section for path in presets for section in yaml.safe_load(path.read_text()).values()]
    named = {section[key] for section in sections for key in ("base", "vae") if section.get(key)}
    assert {name for name in named if not Path(name).exists()} <= KNOWN.keys()


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        load_pipeline(str(tmp_path / "none"), weights=False)


# ---- the stages


def settings(bases, name):
    """Small settings of a stage, on bases without weights."""
    values = {
        SCORER: {"batch_size": 2, "vae": str(bases / "sd15")},
        GUIDANCE: {"base": str(bases / "sd15"), "train": "lora", "resolution": 64, "num_samples": 2},
        PRIOR: {"base": str(bases / "sdxl"), "resolution": 64, "num_samples": 1, "mixed_precision": "bf16"},
        RESTORER: {"prior": str(bases / "sdxl"), "resolution": 64, "num_samples": 1, "batch_size": 2},
    }
    return load_stage(name).Config(**values[name], device="cpu")


@pytest.fixture
def tiny_reward(tmp_path):
    tiny.tiny_scorer().save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


@pytest.mark.parametrize("name", [SCORER, GUIDANCE, PRIOR, RESTORER])
def test_a_stage_rehearses_what_it_takes(name, bases, tiny_reward):
    """The same step, with data, on a CPU: within 1% in each phase."""
    config = settings(bases, name)
    config = replace(config, init=tiny_reward) if name == SCORER else config
    planned, real = make_plan(load_stage(name).rehearse, config), Rehearsal("cpu", fake=False)
    load_stage(name).rehearse(config, real)
    assert planned.phases.keys() == real.peaks.keys()
    assert planned.phases.keys() >= {"training", "optimizer step", "report" if name == SCORER else "samples"}
    for phase, parts in real.peaks.items():
        total = sum(planned.phases[phase].values())
        assert total == pytest.approx(sum(parts.values()), rel=0.01), phase


def test_the_command_plans_and_writes_nothing(bases, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = load_stage(GUIDANCE)
    command = ["--base", str(bases / "sd15"), "--device", "cpu", "--num_samples", "0", "--train", "lora"]
    command += ["--batch_size", "1", "--resolution", "64", "--mixed_precision", "bf16", "--optimizer", "adamw8bit"]
    command += ["--no-gradient_checkpointing", "--plan"]

    def code(*arguments):
        with pytest.raises(SystemExit) as caught:
            run_stage(stage.main, stage.Config, [*command, *arguments], partial(show_plan, stage.rehearse))
        return caught.value.code

    assert code() == 0
    assert "04_guidance_tune: a step rehearsed without data, for cpu" in capsys.readouterr().out
    assert code("1MB") == 1
    out = capsys.readouterr().out
    assert "it does not fit into 1 MiB" in out and "nothing fits into 1 MiB: the least is" in out
    assert "  --gradient_checkpointing " in out
    assert (
        code("much") == "04_guidance_tune.py: error: `--plan` takes the memory of a card, such as 8GB, but got 'much'"
    )
    assert list(tmp_path.iterdir()) == []


def test_plan_is_an_option_of_the_stages_that_train(capsys):
    for name in (SCORER, GUIDANCE, PRIOR, RESTORER):
        source = Path(load_stage(name).__file__).read_text()
        assert "run_stage(main, Config, plan=partial(show_plan, rehearse))" in source
    stage = load_stage(GUIDANCE)
    with pytest.raises(SystemExit):
        run_stage(stage.main, stage.Config, ["--help"], show_plan)
    assert "--plan [SIZE]" in capsys.readouterr().out


def full_size(name, folder, **values):
    return replace(load_stage(name).Config(base=str(CONFIGS / folder), mixed_precision="bf16"), **values)


def test_a_lora_of_stable_diffusion_1_fits_into_6_gb():
    """Batch 2 at 512 pixels with 8-bit Adam: the weights are known, 859.5 M in 16 bits, 83.7 M in 32, 123 M in 16."""
    lora = {"train": "lora", "optimizer": "adamw8bit", "resolution": 512, "batch_size": 2, "guidance_scale": 7.5}
    plan = make_plan(load_stage(GUIDANCE).rehearse, full_size(GUIDANCE, "sd15", **lora))
    assert plan.device == "cuda" and plan.needed < 6 * GIB
    parts = plan.phases["training"]
    assert parts["U-Net, bfloat16"] == pytest.approx(2 * 859_520_964, rel=0.001)
    assert parts["VAE, float32"] == pytest.approx(4 * 83_653_863, rel=0.001)
    assert parts["text encoders, bfloat16"] == pytest.approx(2 * 123_060_480, rel=0.001)
    assert parts["activations"] > 4 * 2 * 64 * 64 * 320  # at least one of the U-Net's widest maps


@pytest.mark.slow
def test_a_lora_of_sdxl_fits_into_12_gb():
    lora = {"train": "lora", "optimizer": "adamw8bit", "resolution": 1024, "batch_size": 1, "guidance_scale": 7.5}
    config = full_size(GUIDANCE, "sdxl", **lora, gradient_checkpointing=True)
    assert make_plan(load_stage(GUIDANCE).rehearse, config).needed < 12 * GIB


@pytest.mark.slow
def test_the_scorer_at_full_size():
    """446 million parameters; the default sizes stand for hub ids and official files."""
    config = replace(load_stage(SCORER).Config(init="THUDM/ImageReward", vae=""), batch_size=4, device="cpu")
    plan = make_plan(load_stage(SCORER).rehearse, config)
    parts = plan.phases["training"]
    count = sum(p.numel() for p in FaceScorer().parameters())
    assert parts["scorer"] + parts["trained weights"] == pytest.approx(4 * count, rel=0.001)
