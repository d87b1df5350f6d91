"""--plan: the table, the options that make a run fit, and the command of each stage."""

import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from conftest import load_stage
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tiny_bases import build
from torch import nn

from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.bases.empty import KNOWN
from faceprior.config import load_section, make_config, memory_options, run_stage
from faceprior.diffusion import encode_prompts
from faceprior.memory import SAMPLES, Rehearsal
from faceprior.models import quantizable, quiet_libraries
from faceprior.plan import (
    GIB,
    Plan,
    command_options,
    find_fitting,
    find_needless,
    make_plan,
    options,
    parse_size,
    show_plan,
)
from faceprior.quantization import quantized_bytes
from faceprior.scorer import FaceScorer

SCORER, GUIDANCE, PRIOR, RESTORER = "02_train_scorer", "04_guidance_tune", "05_prior_tune", "06_train_restorer"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny pipelines that have configs and no weights."""
    root = tmp_path_factory.mktemp("bases")
    for kind in ("sd1", "sdxl", "sd3.5", "flux-dev"):
        build(kind).save_pretrained(root / kind)
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


@pytest.mark.parametrize("written", ["large", "8TB", "0", "-1", "8GB of it", "9" * 400])
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
        {"cache": "data/cache"},
        {"batch_size": 3, "accumulation": 4},
        {"batch_size": 1, "accumulation": 12},
        {"gradient_checkpointing": True},
        {"mixed_precision": "bf16"},
        {"optimizer": "adamw8bit"},
        {"train": "lora"},
        {"train": "lora", "quantization": "8bit"},
        {"train": "lora", "quantization": "nf4"},
        {"scorer": "none"},
        {"resolution": 384},
        {"resolution": 256},
    ]


def test_options_go_on_where_the_settings_are():
    config = load_stage(GUIDANCE).Config(batch_size=1, train="lora", quantization="8bit", cache="mine", ema_decay=0.9)
    rest = {"mixed_precision": "bf16"}, {"optimizer": "adamw8bit"}, {"quantization": "nf4"}, {"scorer": "none"}
    assert list(options(config)) == [{"gradient_checkpointing": True}, {"ema_device": "cpu"}, *rest]


@pytest.mark.parametrize("name", [SCORER, GUIDANCE, PRIOR, RESTORER])
def test_an_error_for_lack_of_memory_names_the_same_options(name):
    """Of several steps, the first, and of 8 and 4 bits the last."""
    config = load_stage(name).Config(resolution=512) if name != SCORER else load_stage(name).Config()
    advised = [o for o in memory_options(asdict(config)) if "resolution" not in o]
    tried = list(options(config))
    assert [option for option in tried if option in advised] == advised
    assert {key for option in tried for key in option} - {"resolution"} == {key for o in advised for key in o}


def test_options_of_a_stage_without_train_and_resolution():
    config = load_stage(SCORER).Config(batch_size=1, mixed_precision="bf16")
    assert list(options(config)) == [{"gradient_checkpointing": True}, {"optimizer": "adamw8bit"}]


@dataclass
class Config:
    """Settings of two phases: images take 64 KB each, weights 256 or 64 KB, and 96 KB are always there."""

    batch_size: int = 4  # images, [1, inf)
    accumulation: int = 1  # micro-batches, [1, inf)
    train: Literal["full", "lora"] = "full"  # what is trained
    quantization: Literal["none", "8bit", "nf4"] = "none"  # of the base
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
    assert search(150)[3:] == [({"train": "lora", "quantization": kind}, 160, False) for kind in ("8bit", "nf4")]
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


def test_what_a_later_option_makes_needless_is_taken_back(capsys):
    """All in one phase, 608 KB: two images 480, one 416, a LoRA 224; with the LoRA two images fit into 400 KB."""

    def one_phase(config, rehearsal):
        with rehearsal, rehearsal.phase("all"):
            weights = 64 if config.train == "lora" else 256
            torch.zeros((96 + weights + 64 * config.batch_size) * 1024, dtype=torch.uint8)

    halved, one, lora = {"batch_size": 2, "accumulation": 2}, {"batch_size": 1, "accumulation": 4}, {"train": "lora"}
    found = find_needless(one_phase, Config(), 400 * 1024, [halved, one, lora])
    assert [(option, plan.peak // 1024) for option, plan in found] == [(one, 288)]
    assert list(find_needless(one_phase, Config(), 230 * 1024, [halved, one, lora])) == []
    assert show_plan(one_phase, Config(), f"{400 / 1024}MB") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("not needed any more" in line for line in lines) == 1
    assert lines[-1].endswith("with --batch_size 2 --accumulation 2 --train lora")


def test_a_stage_says_what_fits(capsys):
    config = replace(Config(), train="lora")
    assert show_plan(rehearse, config, "0.16MB") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "it fits into 0 MiB with --batch_size 1 --accumulation 4" in lines[-1]
    assert show_plan(rehearse, config, "0.1MB") == 1
    assert "nothing fits into 0 MiB: the least is 0 MiB with --batch_size 1" in capsys.readouterr().out
    assert show_plan(rehearse, config, "1MB") == show_plan(rehearse, config) == 0


def test_a_plan_beside_it_is_a_line(capsys):
    """Of what is trained, each part where it takes most; nothing where the run has those settings."""
    config = replace(Config(), train="lora", quantization="nf4")
    full = {"train": "full", "quantization": "none"}
    phases = [{"trained weights": 2 * GIB}, {"trained weights": 2 * GIB, "gradients": GIB, "optimizer state": 4 * GIB}]
    words = "7.00 GiB, of which trained weights 2.00 GiB, gradients 1.00 GiB, optimizer state 4.00 GiB"
    assert Plan(dict(zip("ab", phases, strict=True)), "cpu").training() == words
    assert show_plan(rehearse, config, beside=full) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.match("with --train full --quantization none: 0 MiB, of which trained weights 0 MiB, gradients", line)
    assert show_plan(rehearse, replace(config, **full), beside=full) == 0
    assert "with --train" not in capsys.readouterr().out


def test_options_are_written_as_the_command_line_takes_them():
    values = {"gradient_checkpointing": True, "batch_size": 1, "optimizer": "adamw8bit"}
    assert command_options(values) == "--gradient_checkpointing --batch_size 1 --optimizer adamw8bit"


# ---- bases without weights


def shapes(module):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3.5", "flux-dev"])
def test_an_empty_pipeline_has_the_parts_of_a_loaded_one(bases, tmp_path, kind):
    build(kind).save_pretrained(tmp_path)
    empty, loaded = load_pipeline(bases / kind, torch.bfloat16, weights=False), load_pipeline(tmp_path, torch.bfloat16)
    assert type(empty) is type(loaded) and empty.components.keys() == loaded.components.keys()
    for name, part in loaded.components.items():
        assert type(getattr(empty, name)) is type(part)
        if isinstance(part, nn.Module):
            assert shapes(getattr(empty, name)) == shapes(part)


def test_a_single_file_is_planned_by_its_own_shapes(tmp_path):
    """An inpainting U-Net reads 9 channels, which the configs that come with the package do not say."""
    weights = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3),
        "model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(512, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(49408, 768),
    }
    save_file(weights, tmp_path / "model.safetensors")
    with Rehearsal("cpu"):
        pipeline = load_pipeline(tmp_path / "model.safetensors", weights=False)
        assert pipeline.unet.conv_in.weight.shape == (320, 9, 3, 3)
        assert encode_prompts(pipeline, ["a face"]).prompt_embeds.shape == (1, 77, 768)
    del weights["first_stage_model.decoder.conv_in.weight"]
    save_file(weights, tmp_path / "no_vae.safetensors")
    with pytest.raises(ValueError, match="has no VAE: name one with `--vae`"):
        load_pipeline(tmp_path / "no_vae.safetensors", weights=False)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", {"unet": 859_520_964, "vae": 83_653_863}),
        (
            "stabilityai/stable-diffusion-xl-base-1.0",
            {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
        ("stabilityai/stable-diffusion-3.5-medium", {"transformer": 2.243e9, "text_encoder_3": 4.762e9}),
        ("stabilityai/stable-diffusion-3.5-large", {"transformer": 8.057e9}),
        ("black-forest-labs/FLUX.1-dev", {"transformer": 11.90e9, "text_encoder_2": 4.762e9}),
    ],
)
def test_the_bases_that_are_known_have_the_published_sizes(name, counts, monkeypatch):
    """As the published checkpoints' tensors add up to: exactly, or as rounded by their publishers."""
    monkeypatch.setattr("faceprior.bases.empty.find_folder", not_reached)
    with Rehearsal("cpu"):
        pipeline = load_pipeline(name, weights=False)
        found = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in counts}
    for part, count in counts.items():
        assert found[part] == (count if isinstance(count, int) else pytest.approx(count, rel=0.001))


def not_reached(*_, **options):
    raise FileNotFoundError("the hub")


def test_the_presets_name_bases_that_are_known():
    presets = (Path(__file__).parent.parent / "stages" / "presets").glob("*.yaml")
    values = [value for path in presets for value in yaml.safe_load(path.read_text()).values()]
    sections = [section for section in values if isinstance(section, dict)]
    named = {section[key] for section in sections for key in ("base", "vae") if section.get(key)}
    assert {name for name in named if not Path(name).exists()} <= KNOWN.keys()


@pytest.mark.parametrize("name", ["none", "my_model.safetensors", ""])
def test_a_path_without_a_base_is_named_and_not_sought_on_the_hub(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no base model (at|in) {re.escape(str(tmp_path / name))}"):
        load_pipeline(str(tmp_path / name), weights=False)
    with pytest.raises(FileNotFoundError, match=r"no base model at my_model\.safetensors: the path does not exist"):
        load_pipeline("my_model.safetensors", weights=False)


# ---- the stages


def settings(bases, name):
    """Small settings of a stage, on bases without weights."""
    values = {
        SCORER: {"batch_size": 2, "vae": str(bases / "sd1")},
        GUIDANCE: {"base": str(bases / "sd1"), "train": "self_attention", "resolution": 64, "batch_size": 2},
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
    planned = as_with_data(name, config)
    assert planned.keys() >= {"training", "optimizer step", "report" if name == SCORER else "samples"}


def as_with_data(name, config, tolerance=0.01):
    """Return a plan's phases, which are those of the same step with data to within `tolerance`."""
    planned, real = make_plan(load_stage(name).rehearse, config).phases, Rehearsal("cpu", fake=False)
    load_stage(name).rehearse(config, real)
    assert planned.keys() == real.peaks.keys()
    for phase, parts in real.peaks.items():
        assert sum(planned[phase].values()) == pytest.approx(sum(parts.values()), rel=tolerance), phase
    return planned


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_prior_with_all_its_options(train, bases, tmp_path, monkeypatch):
    """With a cache the encoders are away in the step; on a GPU, an average on the CPU takes nothing of it."""
    monkeypatch.chdir(tmp_path)
    options = {"train": train, "cache": "unused", "min_snr_gamma": 5.0, "ema_decay": 0.9, "validate_every": 1}
    config = replace(settings(bases, PRIOR), **options)
    phases = as_with_data(PRIOR, config)
    assert not [part for part, size in phases["training"].items() if part.startswith(("text", "VAE")) and size]
    on_gpu = replace(config, device="auto", mixed_precision="no", num_samples=1)
    plans = {
        place: make_plan(load_stage(PRIOR).rehearse, replace(on_gpu, ema_device=place)) for place in ("auto", "cpu")
    }
    trained = plans["auto"].phases["training"]["trained weights"]
    assert plans["auto"].phases["training"]["averaged weights"] == trained
    for phase, parts in plans["cpu"].phases.items():
        assert "averaged weights" not in parts
        # nor do the trained weights that are on the CPU while images are drawn
        assert phase != SAMPLES or parts["activations"] < trained or train == "lora"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"cache": "unused", "flip_prob": 0.5}, {"reward_weight": 0.1, "reward_t_end": 1.0}]
)
def test_the_restorer_with_a_cache_or_a_reward(options, bases, tmp_path, monkeypatch):
    """With a cache the VAE is away in the step; the text encoders are in any case."""
    monkeypatch.chdir(tmp_path)
    scorer = {"reward_scorer": "tiny"} if "reward_weight" in options else {}
    config = replace(settings(bases, RESTORER), facial_loss="none", **options, **scorer)
    phases = as_with_data(RESTORER, config)
    held = [part for part in phases["training"] if phases["training"][part]]
    assert not [part for part in held if part.startswith("text encoders")]
    assert any(part.startswith("VAE") for part in held) == ("cache" not in options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sd1", {"objective": "dpo", "cache": "unused", "ema_decay": 0.9, "validate_every": 1}),
        pytest.param("sdxl", {"train": "full", "cache": "a", "mixed_precision": "bf16"}, marks=pytest.mark.slow),
        ("sd3.5", {"objective": "denoising"}),
        ("flux-dev", {"cache": "unused", "gradient_checkpointing": True}),
    ],
)
def test_every_kind_of_base_and_objective(kind, options, bases, tmp_path, monkeypatch):
    """With a cache the encoders are there while they fill it and while images are drawn, and not in between."""
    monkeypatch.chdir(tmp_path)
    config = load_stage(GUIDANCE).Config(base=str(bases / kind), batch_size=2, resolution=64, device="cpu")
    phases = as_with_data(GUIDANCE, replace(config, **{"train": "lora", **options}))
    encoders = {phase: any(part.startswith(("VAE", "text")) for part in parts) for phase, parts in phases.items()}
    in_step = "cache" not in options
    expected = {"encoding": True, "training": in_step, "optimizer step": in_step, "samples": True}
    assert encoders == expected and list(tmp_path.iterdir()) == []
    assert not options.get("ema_decay") or phases["training"]["averaged weights"] > 0


def test_the_scorer_takes_memory_as_a_reward_and_while_it_scores(bases, tmp_path):
    tiny.tiny_scorer().save_pretrained(tmp_path / "scorer")
    scorer = {"scorer": str(tmp_path / "scorer"), "reward_scorer": str(tmp_path / "scorer")}
    config = load_stage(GUIDANCE).Config(base=str(bases / "sd1"), batch_size=1, resolution=64, device="cpu", **scorer)
    config = replace(config, train="lora", cache="unused", objective="reward", reward_steps=2, num_samples=1)
    phases = make_plan(load_stage(GUIDANCE).rehearse, config).phases
    weights = 4 * sum(p.numel() for p in tiny.tiny_scorer().parameters())
    assert phases["training"]["scorer"] == pytest.approx(weights, rel=0.01)
    assert phases["scores"]["scorer"] == pytest.approx(2 * weights, rel=0.01)
    assert "VAE, float32" in phases["training"] and "text encoders, float32" not in phases["training"]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sd1", {"quantization": "nf4"}, "quantized weights cannot be trained"),
        ("sd1", {"train": "lora", "single_file": "fp16"}, "`single_file` is a whole checkpoint"),
        ("sd1", {"train": "lora", "extract_lora": 4}, "`extract_lora` is of trained self-attention"),
        ("sd1", {"train": "lora", "lora_variant": "dora", "lora_format": "kohya"}, "drops the magnitudes of a DoRA"),
        ("flux-dev", {"train": "lora", "lora_format": "kohya"}, "kohya is for U-Nets"),
        ("flux-dev", {"train": "lora", "sampler": "ddim"}, "`sampler` is ddim, which cannot sample a base"),
        ("sd1", {"resolution": 66}, "`resolution` has to be a multiple of 4 for this base but is 66"),
        ("sd1", {"keep_best": True}, "`keep_best` goes by the Face Score of validations"),
    ],
)
def test_a_plan_refuses_what_the_training_refuses(kind, settings, message, bases):
    config = load_stage(GUIDANCE).Config(base=str(bases / kind), batch_size=1, device="cpu", scorer="none", **settings)
    with pytest.raises(ValueError, match=message):
        make_plan(load_stage(GUIDANCE).rehearse, config)


@pytest.mark.slow
def test_a_plan_never_advises_what_the_training_refuses(bases):
    """A LoRA would take less, but a single file is asked for, which holds none."""
    stage = load_stage(GUIDANCE)
    config = stage.Config(base=str(bases / "sd1"), batch_size=1, resolution=64, device="cpu", num_samples=0, cache="c")
    config = replace(config, gradient_checkpointing=True, mixed_precision="bf16", optimizer="adamw8bit")
    for single_file, advised in (("none", True), ("fp16", False)):
        config = replace(config, single_file=single_file)
        tried = [option for option, *_ in find_fitting(stage.rehearse, config, 1, make_plan(stage.rehearse, config))]
        assert any(option.get("train") == "lora" for option in tried) == advised


@pytest.mark.parametrize("mode", ["8bit", "nf4"])
def test_a_quantized_base(mode, tmp_path):
    """Layers of 64 and 128 inputs: as with data to within 5%, and of the bytes that `quantized_bytes` says."""
    pipeline = build("sd1")
    config = {**pipeline.unet.config, "block_out_channels": (64, 128), "use_linear_projection": True}
    pipeline.unet = UNet2DConditionModel.from_config(config)
    pipeline.save_pretrained(tmp_path)
    wide, layers = pipeline.unet, quantizable(pipeline.unet)
    saved = sum(4 * wide.get_submodule(n).weight.numel() - quantized_bytes(wide.get_submodule(n), mode) for n in layers)
    config = load_stage(GUIDANCE).Config(base=str(tmp_path), batch_size=2, resolution=64, device="cpu")
    config = replace(config, train="lora", rank=64, optimizer="adamw8bit", num_samples=1, quantization=mode)
    phases = as_with_data(GUIDANCE, config, 0.05)
    size = next(size for part, size in phases["training"].items() if part.startswith("U-Net"))
    assert size == pytest.approx(4 * sum(p.numel() for p in wide.parameters()) - saved, rel=0.05)


def test_the_command_plans_and_writes_nothing(bases, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = load_stage(GUIDANCE)
    command = ["--base", str(bases / "sd1"), "--device", "cpu", "--num_samples", "0", "--train", "lora"]
    command += ["--cache", "unused", "--quantization", "nf4"]
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
    assert code("much") == 2  # 1 says that it does not fit, and nothing else
    message = "04_guidance_tune.py: error: `--plan` takes the memory of a card, such as 8GB, but got 'much'"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert list(tmp_path.iterdir()) == []


def test_plan_is_an_option_of_the_stages_that_train(capsys):
    for name in (SCORER, GUIDANCE, PRIOR, RESTORER):
        source = Path(load_stage(name).__file__).read_text()
        assert "run_stage(main, Config, plan=partial(show_plan, rehearse" in source
    stage = load_stage(GUIDANCE)
    with pytest.raises(SystemExit):
        run_stage(stage.main, stage.Config, ["--help"], show_plan)
    assert "--plan [SIZE]" in capsys.readouterr().out


# ---- the presets' aims


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "size"), [("sd15_lora", 6), ("sdxl_lora", 10), ("sd35_lora", 12), ("flux_lora", 16)]
)
def test_a_lora_preset_fits(preset, size, monkeypatch):
    """With the images and the scorer that judge it; the weights of SD 1.5 are known: 859.5 M in 16 bits."""
    monkeypatch.setattr("faceprior.bases.empty.find_folder", not_reached)
    stage = load_stage(GUIDANCE)
    path = Path(stage.__file__).parent / "presets" / f"{preset}.yaml"
    plan = make_plan(stage.rehearse, make_config(stage.Config, load_section(path, GUIDANCE, stage.Config)))
    assert plan.device == "cuda" and plan.needed < size * GIB
    if preset == "sd15_lora":
        parts = plan.phases["training"]
        assert parts["U-Net, bfloat16"] == pytest.approx(2 * 859_520_964, rel=0.001)
        assert parts["activations"] > 4 * 2 * 64 * 64 * 320  # at least one of the U-Net's widest maps


@pytest.mark.slow
def test_the_restorer_fits_into_24_gb(monkeypatch):
    """By the preset: neither encoders nor VAE are there in the step, and the frozen U-Net is in 4 bits."""
    monkeypatch.setattr("faceprior.bases.empty.find_folder", not_reached)
    stage = load_stage(RESTORER)
    path = Path(stage.__file__).parent / "presets" / "sdxl_lora.yaml"
    values = load_section(path, RESTORER, stage.Config) | {"prior": "stabilityai/stable-diffusion-xl-base-1.0"}
    plan = make_plan(stage.rehearse, make_config(stage.Config, values))
    assert plan.device == "cuda" and plan.needed < 18 * GIB
    step = plan.phases["training"]
    assert not [part for part, size in step.items() if part.startswith(("text encoders", "VAE")) and size]
    assert step["U-Net, 4-bit and bfloat16"] < 2 * GIB
    assert step["optimizer state"] < 0.6 * step["trained weights"]  # two moments of a byte for weights of four


@pytest.mark.slow
def test_the_prior_fits_into_24_gb(monkeypatch, capsys):
    """A LoRA by the preset does; full tuning, of 2567 million weights, their gradients and moments, does not."""
    monkeypatch.setattr("faceprior.bases.empty.find_folder", not_reached)
    stage, count = load_stage(PRIOR), 2_567_463_684
    folder = Path(stage.__file__).parent / "presets"
    lora, paper = (
        make_config(stage.Config, load_section(folder / f"{name}.yaml", PRIOR, stage.Config))
        for name in ("sdxl_lora", "sdxl")
    )
    assert show_plan(stage.rehearse, lora, "24GB", beside=stage.FULL) == 0
    out = capsys.readouterr().out
    size = 4 * count / GIB
    words = f"GiB, of which trained weights {size:.2f} GiB, gradients {size:.2f} GiB, optimizer state 4."
    assert "with --train full: " in out and words in out and out.endswith("it fits into 24.00 GiB\n")

    plan = make_plan(stage.rehearse, paper)  # AdamW keeps two moments of 4 bytes
    parts = plan.phases["optimizer step"]
    assert parts["trained weights"] == parts["gradients"] == pytest.approx(4 * count, rel=0.001)
    assert parts["optimizer state"] == pytest.approx(8 * count, rel=0.001) and plan.needed > 48 * GIB


@pytest.mark.slow
def test_the_scorer_at_full_size():
    """446 million parameters; the default sizes stand for hub ids and official files."""
    config = replace(load_stage(SCORER).Config(init="THUDM/ImageReward", vae=""), batch_size=4, device="cpu")
    plan = make_plan(load_stage(SCORER).rehearse, config)
    parts = plan.phases["training"]
    count = sum(p.numel() for p in FaceScorer().parameters())
    assert parts["scorer"] + parts["trained weights"] == pytest.approx(4 * count, rel=0.001)
