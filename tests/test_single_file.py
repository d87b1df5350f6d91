"""Bases in one file: loaded without a hub, in every layout that people trade, or refused with the way out."""

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import regex
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
    infer_diffusers_model_type,
)
from original_layout import clip_tensors, original_tensors, unet_tensors, write_zeros
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from faceprior.bases import load_pipeline, require_base
from faceprior.bases.single_file import CONFIGS, make_tokenizer
from faceprior.diffusion import make_noise_scheduler, pred_original_sample
from faceprior.tiny import tiny_sd15, tiny_sdxl
from faceprior.training import seeded

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("sd15", "sd21", "sdxl")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Whoever asks the hub, fails."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def same_weights(module, other):
    mine, others = module.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


# ---- the configs that ship


def read(part):
    return json.loads(next((CONFIGS / part).glob("*config.json")).read_text())


@cache
def full_size(kind):
    """The models of the configs that ship, without memory for their weights."""
    with init_empty_weights():
        models = SimpleNamespace(
            unet=UNet2DConditionModel.from_config(read(f"{kind}/unet")),
            vae=AutoencoderKL.from_config(read(f"{kind}/vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig(**read(f"{kind}/text_encoder"))),
        )
        if kind == "sdxl":
            models.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**read(f"{kind}/text_encoder_2")))
    return models


PUBLISHED = {  # numbers of parameters
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_make_models_of_the_published_sizes(kind):
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in vars(full_size(kind)).items()}
    assert sizes == PUBLISHED[kind]


# What the authors' own config files say: v1-inference.yaml, v2-inference-v.yaml, sd_xl_base.yaml.
UNET = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2}
HEADS_OF_64 = {"num_head_channels": 64, "use_linear_in_transformer": True}
ORIGINALS = {
    "sd15": (
        UNET | {"attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "num_heads": 8}
        | {"transformer_depth": 1, "context_dim": 768},
        0.18215,
    ),
    "sd21": (
        UNET | HEADS_OF_64 | {"attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4]}
        | {"transformer_depth": 1, "context_dim": 1024},
        0.18215,
    ),
    "sdxl": (
        UNET | HEADS_OF_64 | {"attention_resolutions": [4, 2], "channel_mult": [1, 2, 4], "num_classes": "sequential"}
        | {"transformer_depth": [1, 2, 10], "context_dim": 2048, "adm_in_channels": 2816},
        0.13025,
    ),
}  # fmt: skip
AUTOENCODER = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_are_what_diffusers_derives_from_the_authors(kind):
    unet, scale = ORIGINALS[kind]
    stages = {"unet_config": {"params": unet}, "first_stage_config": {"params": {"ddconfig": AUTOENCODER}}}
    original = {"model": {"params": {**stages, "scale_factor": scale}}}
    models = full_size(kind)
    tensors = original_tensors(models, openclip=kind == "sd21")
    assert infer_diffusers_model_type(tensors) == {"sd15": "v1", "sd21": "v2", "sdxl": "xl_base"}[kind]

    for model, derive in (
        (models.unet, create_unet_diffusers_config_from_ldm),
        (models.vae, create_vae_diffusers_config_from_ldm),
    ):
        derived, mine = derive(original, tensors), json.loads(json.dumps(dict(model.config)))
        assert {key: mine[key] for key in derived} == json.loads(json.dumps(derived))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_checkpoint_has_its_place(kind):
    models = full_size(kind)
    tensors = original_tensors(models, openclip=kind == "sd21")
    for model, translate in ((models.unet, convert_ldm_unet_checkpoint), (models.vae, convert_ldm_vae_checkpoint)):
        found = {name: tensor.shape for name, tensor in translate(tensors, dict(model.config)).items()}
        assert found == {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_what_the_hub_says_of_the_text_encoders_and_samplers():
    encoders = [read(f"{kind}/text_encoder") for kind in KINDS] + [read("sdxl/text_encoder_2")]
    facts = [(c["hidden_act"], c["num_hidden_layers"], c["num_attention_heads"], c["projection_dim"]) for c in encoders]
    clip = ("quick_gelu", 12, 12, 768)
    assert facts == [clip, ("gelu", 23, 16, 512), clip, ("gelu", 32, 20, 1280)]
    schedulers = {kind: read(f"{kind}/scheduler") for kind in KINDS}
    for config in schedulers.values():
        assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
        assert (config["num_train_timesteps"], config["steps_offset"]) == (1000, 1)
    assert [schedulers[kind].get("prediction_type", "epsilon") for kind in KINDS] == [
        "epsilon",
        "v_prediction",
        "epsilon",
    ]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "sd21")) for kind in KINDS])
def test_a_checkpoint_of_full_size_loads_without_a_hub(kind, tmp_path, caplog):
    """A file of zeros in half precision, a hole on the disk; its weights are mapped, so that they take no memory."""
    path = tmp_path / f"{kind}.safetensors"
    write_zeros(path, original_tensors(full_size(kind), openclip=kind == "sd21"))
    caplog.set_level(logging.INFO, "faceprior")
    info, loaded = require_base(path, "tune"), load_pipeline(path, torch.float16)

    assert type(loaded) is (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline)
    assert loaded.config.get("force_zeros_for_empty_prompt", False) == (kind == "sdxl")
    for name in PUBLISHED[kind]:
        part = getattr(loaded, name)
        assert sum(p.numel() for p in part.parameters()) == PUBLISHED[kind][name]
        assert part.dtype == (torch.float32 if name == "vae" else torch.float16)
    assert (info.prediction_type, info.sample_size) == (
        loaded.scheduler.config.get("prediction_type", "epsilon"),
        loaded.unet.config.sample_size,
    )
    assert loaded.name_or_path == str(path)
    guesses = [message for message in caplog.messages if "v_prediction is a guess, `--prediction_type`" in message]
    assert len(guesses) == (kind == "sd21")


def test_the_512_base_of_stable_diffusion_2(tmp_path, caplog):
    """It has the shapes of the 768 model, and predicts epsilon: by the option, or by its trainer's metadata."""
    tensors = original_tensors(full_size("sd21"), openclip=True)
    write_zeros(tmp_path / "base.safetensors", tensors)
    info = require_base(tmp_path / "base.safetensors", "tune", prediction_type="epsilon")
    loaded = load_pipeline(tmp_path / "base.safetensors", torch.float16, prediction_type="epsilon")
    assert (info.architecture, info.prediction_type, info.sample_size) == ("Stable Diffusion 2", "epsilon", 64)
    assert (loaded.scheduler.config.prediction_type, loaded.unet.config.sample_size) == ("epsilon", 64)

    few = {name: torch.zeros(tensors[name].shape) for name in FEW}
    save_file(few, tmp_path / "few.safetensors", {"modelspec.prediction_type": "epsilon"})
    info = require_base(tmp_path / "few.safetensors", "tune")
    assert (info.prediction_type, info.sample_size) == ("epsilon", 64)
    assert not [message for message in caplog.messages if "guess" in message]


# Enough of Stable Diffusion 2 to be described.
FEW = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "first_stage_model.decoder.conv_in.weight",
    "cond_stage_model.model.token_embedding.weight",
)


@pytest.mark.slow
def test_a_random_checkpoint_of_full_size_encodes_a_prompt(tmp_path):
    """Stable Diffusion 1.5 in half precision, 2.1 GB, in a process that may not ask the hub."""
    models, generator = full_size("sd15"), torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in original_tensors(models).items()}
    tensors = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    code = (
        "import sys, torch; from faceprior.bases import load_pipeline;"
        "pipeline = load_pipeline(sys.argv[1], torch.bfloat16);"
        "embeds, _ = pipeline.encode_prompt('A face.', 'cpu', 1, False);"
        "torch.save([embeds, pipeline.unet.conv_in.weight.detach().clone()], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.safetensors"), str(tmp_path / "found.pt")]
    subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=ROOT, check=True)
    embeds, weight = torch.load(tmp_path / "found.pt", weights_only=True)
    assert embeds.shape == (1, 77, 768) and embeds.isfinite().all() and embeds.std() > 0
    assert torch.equal(weight, tensors["model.diffusion_model.input_blocks.0.0.weight"].bfloat16())


# ---- CLIP's tokenizers


TOKENIZERS = ("sd15/tokenizer", "sd21/tokenizer", "sdxl/tokenizer", "sdxl/tokenizer_2")
BPE = CONFIGS / "clip/bpe_simple_vocab_16e6.txt.gz"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_known_token_ids(name):
    """CLIP's ids as published; Stable Diffusion 1 pads with the end, OpenCLIP with 0."""
    tokenizer = make_tokenizer(CONFIGS / name)
    pad = 0 if name in ("sd21/tokenizer", "sdxl/tokenizer_2") else 49407
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer(["a photo of a cat", ""], padding="max_length").input_ids
    assert padded[0] == [49406, 320, 1125, 539, 320, 2368, 49407, *[pad] * 70]
    assert padded[1] == [49406, 49407, *[pad] * 75]
    assert (tokenizer.pad_token_id, len(tokenizer), tokenizer.model_max_length) == (pad, 49408, 77)
    assert tokenizer.decode([320, 1125, 539, 320, 2368]) == "a photo of a cat"


@cache
def bpe_ranks():
    """CLIP's pairs in the order in which they are merged, and its tokens' ids: simple_tokenizer.py, from the file."""
    pairs = [
        tuple(line.split()) for line in gzip.decompress(BPE.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    ]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [*letters.values(), *(letter + "</w>" for letter in letters.values()), *map("".join, pairs)]
    return {pair: rank for rank, pair in enumerate(pairs)}, letters, {token: i for i, token in enumerate(tokens)}


def encode_by_hand(text):
    """Merge the pair of lowest rank, everywhere in a word, until there is none."""
    ranks, letters, ids = bpe_ranks()
    found = [49406]
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", " ".join(text.lower().split())):
        pieces = [letters[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]:
            best, merged = min(pairs, key=ranks.get), []
            for piece in pieces:
                if merged and (merged[-1], piece) == best and not isinstance(merged[-1], list):
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        found += [ids[piece] for piece in pieces]
    return [*found, 49407]


TEXTS = [
    "A face.",
    "Portrait of a 30-year-old woman, smiling; soft light, f/1.8 (85mm)",
    "she'll've   don't\n\tI'M they're",
    "Ein Mädchen mit grünen Augen, æøå ÿ",
    "北京の女の人 😀👩‍🦰 ©2024",
    "supercalifragilisticexpialidocious bad_anatomy, <lora:x:1> {{best quality}} ((face:1.2))",
    "banana mississippi aaaaaaaaaaa 1234567890",
    "",
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_clips_own_algorithm(name):
    tokenizer = make_tokenizer(CONFIGS / name)
    for text in TEXTS:
        assert tokenizer(text).input_ids == encode_by_hand(text)
    long = "a portrait of an old man with a beard " * 20
    cut = tokenizer(long, truncation=True, max_length=77).input_ids
    assert cut == [*encode_by_hand(long)[:76], 49407]


@pytest.mark.parametrize(("name", "exclamation"), [("sd15/tokenizer", 256), ("sd21/tokenizer", 0)])
def test_an_exclamation_mark_is_read_as_from_the_folders_on_the_hub(name, exclamation, tmp_path):
    """Those hold the same vocabulary as vocab.json and merges.txt."""
    tokenizer = make_tokenizer(CONFIGS / name)
    ranks, _, ids = bpe_ranks()
    vocab = {**ids, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, ranks), ""]))
    special = {"pad_token": "!" if exclamation == 0 else "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, **special}))
    hub = CLIPTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "Hello!"]:
        assert tokenizer(text, padding="max_length").input_ids == hub(text, padding="max_length").input_ids
    assert tokenizer("Hello!").input_ids == [49406, 3306, exclamation, 49407]
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert saved("Hello!", padding="max_length").input_ids == tokenizer("Hello!", padding="max_length").input_ids


@pytest.mark.slow
def test_a_wheel_holds_the_configs_and_the_vocabulary_with_its_licence(tmp_path):
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "checkpoints", "build"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(source)], check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    shipped = [path.relative_to(ROOT).as_posix() for path in CONFIGS.rglob("*") if path.is_file()]
    assert set(shipped) <= set(names) and len(shipped) == 40


# ---- the weights, in every layout


def narrow(kind):
    """A random pipeline with the structure of the configs that ship, few channels, and the true tokenizers."""
    widths = {"text_encoder": 16, "text_encoder_2": 24} if kind == "sdxl" else {"text_encoder": 16}
    encoders = {}
    for name, width in widths.items():
        few = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPTextConfig(**{**read(f"{kind}/{name}"), **few, "projection_dim": width})
        encoders[name] = (CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel)(config)
    config = read(f"{kind}/unet")
    levels = len(config["block_out_channels"])
    config |= {"block_out_channels": (16, 16, 32, 32)[:levels], "norm_num_groups": 8, "attention_head_dim": 2}
    config |= {"cross_attention_dim": sum(widths.values()), "sample_size": 8}
    if kind == "sdxl":
        config |= {"transformer_layers_per_block": (1, 2, 3), "addition_time_embed_dim": 4}
        config |= {"projection_class_embeddings_input_dim": 6 * 4 + widths["text_encoder_2"]}
    vae = read(f"{kind}/vae") | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
    tokenizers = [path for path in CONFIGS.glob(f"{kind}/tokenizer*")]
    parts = {
        **encoders,
        **{path.name: make_tokenizer(path) for path in tokenizers},
        "unet": UNet2DConditionModel.from_config(config),
        "vae": AutoencoderKL.from_config(vae),
        "scheduler": DDIMScheduler.from_config(read(f"{kind}/scheduler"), clip_sample=False),
    }
    if kind == "sdxl":
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    """A narrow pipeline, its folder without weights, and its tensors in the original layout."""
    with seeded(0):
        pipeline = narrow(request.param)
    folder = tmp_path_factory.mktemp("narrow") / request.param
    pipeline.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    tensors = original_tensors(pipeline, openclip=request.param == "sd21")
    return SimpleNamespace(kind=request.param, pipeline=pipeline, folder=folder, tensors=tensors)


def models_of(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize(
    ("base", "stored", "dtype"),
    [
        *((kind, torch.float16, torch.float16) for kind in KINDS),
        ("sdxl", torch.float32, torch.float32),
        ("sdxl", torch.float32, torch.bfloat16),
    ],
    indirect=["base"],
)
def test_the_weights_of_a_file_bit_for_bit(base, stored, dtype):
    """The VAE stays in float32; a file's own precision is converted once, tensor by tensor."""
    path = base.folder / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in base.tensors.items()}, path)
    loaded, models = load_pipeline(path, dtype), models_of(base.pipeline)
    assert models_of(loaded).keys() == models.keys()
    for name, model in models.items():
        kept = torch.float32 if name == "vae" else dtype
        found = getattr(loaded, name).state_dict()
        for key, tensor in model.state_dict().items():
            assert found[key].dtype == kept and torch.equal(found[key], tensor.to(stored).to(kept)), (name, key)


def own_names(pipeline):
    """Return a pipeline's weights by diffusers' names, each part with its own before them."""
    return {f"{name}.{k}": v for name, part in models_of(pipeline).items() for k, v in part.state_dict().items()}


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_a_file_with_diffusers_names(base):
    """transformers wrote `text_model.` before all names of a text encoder, and reads them so."""
    tensors = {name: tensor for name, tensor in own_names(base.pipeline).items() if not name.startswith("text_")}
    for name in ("text_encoder", "text_encoder_2"):
        encoder = clip_tensors(getattr(base.pipeline, name), f"{name}.")
        tensors |= {key.replace("text_model.text_projection", "text_projection"): encoder[key] for key in encoder}
    save_file(tensors, base.folder / "model.safetensors")
    loaded = load_pipeline(base.folder / "model.safetensors")
    for name, model in models_of(base.pipeline).items():
        assert same_weights(getattr(loaded, name), model)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_a_unet_alone_takes_the_other_parts_from_the_folder_that_it_lies_in(base, tmp_path, caplog):
    caplog.set_level(logging.INFO, "faceprior")
    base.pipeline.save_pretrained(tmp_path)
    names = {"original": {f"model.diffusion_model.{k}": v for k, v in unet_tensors(base.pipeline.unet).items()}}
    names["diffusers"] = base.pipeline.unet.state_dict()
    for layout, tensors in names.items():
        path = tmp_path / f"{layout}.safetensors"
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
        assert require_base(path, "tune").text_width == base.pipeline.unet.config.cross_attention_dim
        loaded = load_pipeline(path, torch.float16)
        assert torch.equal(loaded.unet.conv_in.weight, (base.pipeline.unet.conv_in.weight + 1).half())
        assert same_weights(loaded.vae, base.pipeline.vae)
        assert loaded.text_encoder.dtype == torch.float16
        assert f"text_encoder: not in {path}, taken from {tmp_path}" in caplog.messages


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_a_unet_alone_without_a_folder_says_what_is_missing(base):
    unet = {name: tensor for name, tensor in base.tensors.items() if name.startswith("model.")}
    save_file(unet, base.folder / "unet.safetensors")
    for attempt in (load_pipeline, lambda path: require_base(path, "tune")):
        with pytest.raises(
            ValueError, match=r"no text encoder \(`text_encoder`.*: give the whole checkpoint, or put it"
        ):
            attempt(base.folder / "unet.safetensors")
    first = {name: t for name, t in base.tensors.items() if not name.startswith("conditioner.embedders.1.")}
    save_file(first, base.folder / "unet.safetensors")
    with pytest.raises(ValueError, match=r"no text encoder \(`text_encoder_2`"):
        load_pipeline(base.folder / "unet.safetensors")


# ---- beside the configs of its architecture


@pytest.fixture(scope="module")
def sd15():
    return tiny_sd15()


@pytest.fixture(scope="module")
def single_file(sd15, tmp_path_factory):
    """The tiny pipeline's weights in one file, as checkpoints are traded."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(original_tensors(sd15), path)
    return path


@pytest.fixture(scope="module")
def configs(sd15, tmp_path_factory):
    """The pipeline's folder without weights."""
    folder = tmp_path_factory.mktemp("configs") / "sd15"
    sd15.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def copy(configs, tmp_path):
    return shutil.copytree(configs, tmp_path / "sd15")


@pytest.fixture
def beside(single_file, copy):
    """A single file beside the configs of its architecture, and a function that writes another with changed tensors."""
    tensors = load_file(single_file)

    def write(add=(), drop=(), metadata=None, name="model.safetensors"):
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(drop or ("no tensor",))}
        save_file({**kept, **{key: torch.zeros(1) for key in add}}, copy / name, metadata)
        return copy / name

    return write


def test_single_file_beside_the_configs_of_its_architecture(sd15, beside):
    """The file's weights, not those of the folder, which only lends its configs and tokenizer."""
    path = beside()
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(tiny_sd15(seed=1), name)
        part.save_pretrained(path.parent / name)
    loaded = load_pipeline(str(path))
    assert all(same_weights(getattr(loaded, name), getattr(sd15, name)) for name in ("unet", "vae", "text_encoder"))
    assert loaded.tokenizer("a face.").input_ids == sd15.tokenizer("a face.").input_ids
    assert loaded.safety_checker is None


def test_single_file_of_no_known_architecture_says_what_to_do(single_file):
    reason = "prompts of 64 features, not Stable Diffusion 1's 768.*: put it into the diffusers folder"
    for attempt in (load_pipeline, lambda path: require_base(path, "tune")):
        with pytest.raises(ValueError, match=reason):
            attempt(single_file)


def test_single_file_of_another_architecture_is_named(single_file, tmp_path):
    tiny_sdxl().save_pretrained(tmp_path / "sdxl")
    shutil.copy(single_file, tmp_path / "sdxl")
    with pytest.raises(ValueError, match="model.safetensors does not fit .*sdxl"):
        load_pipeline(str(tmp_path / "sdxl" / single_file.name))


def test_a_single_file_of_an_inpainting_unet(sd15, beside):
    """Its sizes overrule those of the configs beside it, for `require_base` and for the loading alike."""
    path, entry = beside(), "model.diffusion_model.input_blocks.0.0.weight"
    tensors = load_file(path)
    save_file({**tensors, entry: torch.cat([tensors[entry], torch.ones(48, 5, 3, 3)], 1)}, path)
    assert require_base(path, "inpaint").in_channels == load_pipeline(path).unet.config.in_channels == 9
    with pytest.raises(ValueError, match="9 input channels"):
        require_base(path, "tune")


def test_an_old_file_names_the_text_encoder_without_text_model(sd15, beside):
    path = beside()
    tensors = load_file(path)
    save_file({name.replace("transformer.text_model.", "transformer."): t for name, t in tensors.items()}, path)
    assert same_weights(load_pipeline(path).text_encoder, sd15.text_encoder)


def test_training_never_changes_the_file(beside):
    """Its weights are mapped into memory."""
    path = beside()
    before, loaded = path.read_bytes(), load_pipeline(path)
    with torch.no_grad():
        for parameter in loaded.unet.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before


def test_averaged_weights_in_the_file_are_not_taken_and_it_is_said(sd15, beside, caplog):
    caplog.set_level(logging.INFO, "faceprior")
    path, start = beside(), "model.diffusion_model."
    tensors = load_file(path)
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
    save_file({**tensors, **averaged}, path)
    assert same_weights(load_pipeline(path).unet, sd15.unet)
    assert f"{path} holds averaged weights too (model_ema): the plain ones are used" in caplog.text


def test_tensors_that_a_unet_has_no_place_for_are_not_dropped(beside):
    """Such as the scales of 8-bit weights, without which they would be wrong."""
    path = beside(add=("model.diffusion_model.input_blocks.1.0.in_layers.2.scale_weight",))
    with pytest.raises(ValueError, match=r"does not fit .*: its U-Net has no place for .*2.scale_weight \(1 in all\)"):
        load_pipeline(path)


def test_truncated_single_file(single_file, tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(single_file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="torn.safetensors is truncated or no safetensors file"):
        load_pipeline(str(torn))


def test_a_single_file_that_lacks_a_tensor(beside):
    path = beside(drop=("model.diffusion_model.out.2.bias",))
    with pytest.raises(ValueError, match="model.safetensors does not fit .*: the weights of unet lack conv_out.bias"):
        load_pipeline(path)


def test_a_pickle_is_not_loaded(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    with pytest.raises(ValueError, match="has to be a .safetensors file: a pickle can run code"):
        load_pipeline(str(tmp_path / "model.ckpt"))


def test_a_lora_is_no_base(tmp_path):
    save_file({"lora_unet_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors has no U-Net.*not a LoRA"):
        load_pipeline(str(tmp_path / "lora.safetensors"))


def test_a_suffix_in_upper_case_is_no_pickle(sd15, beside):
    assert same_weights(load_pipeline(beside(name="model.SAFETENSORS")).unet, sd15.unet)


def test_a_single_file_without_vae_names_the_option(sd15, beside, tmp_path):
    path = beside(drop=("first_stage_model",))
    with pytest.raises(ValueError, match="has no VAE .*: name one with `--vae`"):
        load_pipeline(path)
    with pytest.raises(ValueError, match="cannot inpaint faces: it has no VAE: name one with `--vae`"):
        require_base(path, "inpaint")
    sd15.vae.save_pretrained(tmp_path / "vae")
    assert require_base(path, "inpaint", str(tmp_path / "vae")).latent_channels == 4
    assert same_weights(load_pipeline(path, vae=str(tmp_path / "vae")).vae, sd15.vae)


def test_a_given_vae_takes_the_place_of_the_files_own(beside, tmp_path):
    other = tiny_sd15(seed=1).vae
    other.save_pretrained(tmp_path / "vae")
    assert same_weights(load_pipeline(beside(), vae=str(tmp_path / "vae")).vae, other)


# ---- what a file predicts


@pytest.mark.parametrize(
    ("marks", "option", "kind", "zero_snr"),
    [
        ({"add": ("v_pred",)}, "auto", "v_prediction", False),
        ({"add": ("v_pred", "ztsnr")}, "auto", "v_prediction", True),
        ({"metadata": {"modelspec.prediction_type": "v"}}, "auto", "v_prediction", False),
        ({"metadata": {"modelspec.prediction_type": "epsilon"}}, "auto", "epsilon", False),
        ({}, "auto", "epsilon", False),
        ({}, "v_prediction", "v_prediction", False),
        ({"add": ("v_pred",)}, "epsilon", "epsilon", False),
    ],
)
def test_marks_of_a_single_file_and_the_option(beside, marks, option, kind, zero_snr):
    """At zero terminal SNR alpha_bar of the last timestep is 0, so that x_t is noise and x_0 = -v (DDPM's formula)."""
    path = beside(**marks)
    pipeline, info = load_pipeline(path, prediction_type=option), require_base(path, "tune", prediction_type=option)
    assert info.prediction_type == kind and info.noise == ("zero_snr" if zero_snr else "ddpm")
    assert pipeline.scheduler.config.prediction_type == kind
    scheduler = make_noise_scheduler(pipeline)
    assert scheduler.config.prediction_type == kind
    assert (scheduler.alphas_cumprod[-1].item() == 0) == zero_snr
    assert (pipeline.scheduler.config.get("timestep_spacing") == "trailing") == zero_snr
    if zero_snr:
        sample, velocity, last = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 0.5), torch.tensor([999])
        assert torch.equal(pred_original_sample(scheduler, velocity, last, sample), -velocity)
        pipeline.scheduler.set_timesteps(4)
        assert pipeline.scheduler.timesteps[0] == 999


def test_an_inpainting_unet_of_stable_diffusion_2_predicts_epsilon(tmp_path):
    tensors = original_tensors(full_size("sd21"), openclip=True)
    few = {name: torch.zeros(tensors[name].shape) for name in FEW}
    save_file({**few, FEW[0]: torch.zeros(320, 9, 3, 3)}, tmp_path / "inpaint.safetensors")
    info = require_base(tmp_path / "inpaint.safetensors", "inpaint")
    assert (info.in_channels, info.prediction_type, info.sample_size) == (9, "epsilon", 64)


def test_epsilon_at_zero_snr_is_refused(beside):
    path = beside(add=("v_pred", "ztsnr"))
    with pytest.raises(ValueError, match="zero terminal SNR.*give `--prediction_type v_prediction`"):
        require_base(path, "tune", prediction_type="epsilon")


def test_a_sampler_without_zero_snr_is_replaced(beside, copy):
    """Stable Diffusion 1.5 comes with PNDM, which cannot end at pure noise."""
    path, index = beside(add=("v_pred", "ztsnr")), copy / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", "PNDMScheduler"]}))
    shutil.rmtree(copy / "scheduler")
    PNDMScheduler.from_config(read("sd15/scheduler")).save_pretrained(copy / "scheduler")
    loaded = load_pipeline(path).scheduler
    assert isinstance(loaded, DDIMScheduler) and loaded.alphas_cumprod[-1] == 0


# ---- other kinds


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("edm_mean", "edm_std"), "EDM noise .*: give a base with DDPM noise"),
        (("model.diffusion_model.joint_blocks.0.x",), "Stable Diffusion 3 checkpoint: give its diffusers folder"),
        (("double_blocks.0.img_attn.norm.key_norm.scale",), "FLUX checkpoint: give its diffusers folder"),
        (("conditioner.embedders.0.model.ln_final.bias",), "SDXL's refiner, without the first text encoder"),
    ],
)
def test_single_files_of_other_kinds_are_refused(beside, names, reason):
    path = beside(add=names)
    for attempt in (load_pipeline, lambda path: require_base(path, "prior")):
        with pytest.raises(ValueError, match=reason):
            attempt(path)
