"""Base models: described and refused by their configs, loaded from folders and the hub's cache."""

import json
import logging
import re
import shutil
from functools import cache

import huggingface_hub
import pytest
import tiny_bases
import torch
from conftest import load_stage
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines import auto_pipeline
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_bases import build

from faceprior.bases import BaseInfo, describe_base, load_pipeline, require_base
from faceprior.bases.parts import class_problem
from faceprior.diffusion import make_noise_scheduler
from faceprior.tiny import tiny_sd15, tiny_sdxl


@pytest.fixture(scope="module")
def sd15():
    return tiny_sd15()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


@pytest.fixture(scope="module")
def sd15_folder(sd15, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    sd15.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl_folder(sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    sdxl.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(sd15_folder, tmp_path):
    """A copy of the pipeline's folder, to be damaged."""
    return shutil.copytree(sd15_folder, tmp_path / "sd15")


def same_weights(module, other):
    mine, others = module.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


# ---- loading


def test_folder_round_trip(sd15, sd15_folder):
    loaded = load_pipeline(str(sd15_folder))
    for name in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(sd15, name), getattr(loaded, name))
    assert loaded.tokenizer("a face.").input_ids == sd15.tokenizer("a face.").input_ids
    assert loaded.safety_checker is None


def test_other_lists_in_the_index_are_no_parts(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_ignore_files": ["old.bin"]}))
    load_pipeline(copy)


def test_dtype_leaves_the_vae_in_float32_unrounded(sd15, sd15_folder):
    loaded = load_pipeline(str(sd15_folder), torch.float16)
    assert (loaded.unet.dtype, loaded.text_encoder.dtype) == (torch.float16, torch.float16)
    assert loaded.vae.dtype == torch.float32 and same_weights(loaded.vae, sd15.vae)


def test_another_vae_takes_the_place_of_the_bases_own(sdxl, copy, tmp_path):
    """Also where the base has none, as Realistic Vision."""
    sdxl.vae.save_pretrained(tmp_path / "vae")
    assert same_weights(load_pipeline(str(copy), vae=str(tmp_path / "vae")).vae, sdxl.vae)
    shutil.rmtree(copy / "vae")
    assert same_weights(load_pipeline(str(copy), vae=str(tmp_path / "vae")).vae, sdxl.vae)


def test_a_base_without_vae_says_how_to_name_one(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with pytest.raises(ValueError, match="it has no VAE: name one with `--vae`"):
        load_pipeline(str(copy))


def test_missing_path_is_looked_at_before_the_network(tmp_path):
    for name in (tmp_path / "nothing", tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match="no base model at .*does not exist; `--base` takes a diffusers"):
            load_pipeline(str(name))


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match="no base model in .*: there is no model_index.json; `--base` takes"):
        load_pipeline(str(tmp_path))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(path, name):
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGES = {
    "truncated weights": (lambda f: truncate(f / UNET), "diffusion_pytorch_model"),
    "missing weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "model.safetensors"),
    "missing tensor": (lambda f: drop_tensor(f / UNET, "conv_out.bias"), "weights of unet lack conv_out.bias"),
    "missing folder": (lambda f: shutil.rmtree(f / "tokenizer"), "names tokenizer"),
    "empty tokenizer": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "tokenizer has no vocabulary"),
    "torn config": (lambda f: (f / "vae/config.json").write_text("{"), "not a valid JSON"),
    "torn index": (lambda f: (f / "model_index.json").write_text("{"), "not a valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named(copy, damage):
    harm, reason = DAMAGES[damage]
    harm(copy)
    with pytest.raises(ValueError, match=f"(?s)the pipeline in .*sd15 is damaged: .*{reason}"):
        load_pipeline(str(copy))


def test_an_unknown_hub_id_names_the_command():
    """Without a network the error comes at once; with one, there is no such model either."""
    with pytest.raises(FileNotFoundError, match="no base model 'faceprior/none'.*hf download faceprior/none"):
        load_pipeline("faceprior/none")


def test_hub_ids_are_served_from_the_cache_without_a_network(sd15, sd15_folder, tmp_path, monkeypatch):
    cache = tmp_path / "models--faceprior--cached"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("1" * 40)
    shutil.copytree(sd15_folder, cache / "snapshots" / ("1" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same_weights(load_pipeline("faceprior/cached").unet, sd15.unet)


# ---- what a base predicts


def test_the_option_of_a_folder(sdxl_folder):
    assert load_pipeline(sdxl_folder, prediction_type="v_prediction").scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="`prediction_type` has to be auto, epsilon or v_prediction but is 'v'"):
        load_pipeline(sdxl_folder, prediction_type="v")


# ---- what a method can use


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edm(folder):
    EDMDPMSolverMultistepScheduler(sigma_data=0.5).save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", "EDMDPMSolverMultistepScheduler"])
    change(folder / "vae/config.json", latents_mean=[0.0] * 4, latents_std=[2.0] * 4)


def refiner(folder):
    change(folder / "model_index.json", text_encoder=[None, None], _class_name="StableDiffusionXLImg2ImgPipeline")


def flow(folder):
    change(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    change(folder / "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")


def transformer(folder):
    (folder / "unet").rename(folder / "transformer")
    change(folder / "model_index.json", unet=[None, None], transformer=["diffusers", "PixArtTransformer2DModel"])


def predicts(kind):
    return lambda folder: change(folder / "scheduler/scheduler_config.json", prediction_type=kind)


def unet(**values):
    return lambda folder: change(folder / "unet/config.json", **values)


# kind -> (the tiny base that it is made of, the change, methods that can use it, the reason that the others give)
KINDS = {
    "sd15": ("sd15", lambda folder: None, {"inpaint", "tune"}, "has to be of SDXL type but is Stable Diffusion 1"),
    "sdxl": ("sdxl", lambda folder: None, {"inpaint", "tune", "prior", "restore"}, ""),
    "inpaint9": ("sdxl", unet(in_channels=9), {"inpaint"}, "9 input channels .*: give the text-to-image"),
    "edit8": ("sdxl", unet(in_channels=8), set(), "8 input channels"),
    "upscale7": ("sdxl", unet(in_channels=7), set(), "7 input channels"),
    "variance": ("sdxl", unet(out_channels=8), set(), "8 output channels"),
    "foreign text": ("sdxl", unet(cross_attention_dim=96), set(), "reads prompts of 96 features, .* give 128"),
    "edm": ("sdxl", edm, set(), r"noise is not DDPM's .*\(EDMDPMSolverMultistepScheduler\)"),
    "flow": ("sdxl", flow, set(), r"noise is not DDPM's .*\(flow\)"),
    "refiner": ("sdxl", refiner, set(), "SDXL's refiner"),
    "pixart": ("sdxl", transformer, set(), "type but is PixArtTransformer2DModel"),
    "pixart's class": (
        "sd15",
        lambda folder: change(folder / "model_index.json", _class_name="PixArtAlphaPipeline"),
        set(),
        "(pipeline is PixArtAlphaPipeline, which is not known as one of Stable Diffusion 1|has to be of SDXL type)",
    ),
    "sample": (
        "sdxl",
        predicts("sample"),
        set(),
        "`prediction_type` is sample, .*: give `--prediction_type` epsilon or v",
    ),
    "unknown": ("sdxl", predicts("noise"), set(), "`prediction_type` is noise"),
    "latent mean": (
        "sd15",
        lambda f: change(f / "vae/config.json", latents_mean=[0.0] * 4, latents_std=[2.0] * 4),
        set(),
        "(latents_mean|SDXL type)",
    ),  # fmt: skip
    "no VAE": ("sdxl", lambda f: change(f / "model_index.json", vae=[None, None]), set(), "no VAE: name one with"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_method_takes_its_bases_and_refuses_the_others_in_one_sentence(kind, sd15_folder, sdxl_folder, tmp_path):
    source, alter, usable, reason = KINDS[kind]
    folder = shutil.copytree({"sd15": sd15_folder, "sdxl": sdxl_folder}[source], tmp_path / "base")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()  # configs are enough
    alter(folder)
    for method in ("inpaint", "tune", "prior", "restore"):
        if method in usable:
            assert isinstance(require_base(folder, method), BaseInfo)
        else:
            with pytest.raises(ValueError, match=f"^the base .*base cannot .*: .*{reason}") as error:
                require_base(folder, method)
            assert "\n" not in str(error.value)


def test_a_base_is_described_alike_before_and_after_it_is_loaded(sdxl_folder, sdxl, caplog):
    caplog.set_level(logging.INFO, "faceprior")
    before, after = require_base(sdxl_folder, "prior"), describe_base(sdxl)
    assert (before.architecture, before.prediction_type, before.sample_size) == ("SDXL", "epsilon", 32)
    fields = before.__dict__.keys() - {"name"}
    assert {key: getattr(before, key) for key in fields} == {key: getattr(after, key) for key in fields}
    assert caplog.messages == [f"base {sdxl_folder}: SDXL, epsilon, DDPM noise, 4 channels"]


def test_edm_noise_is_never_trained_as_ddpm(sdxl_folder, tmp_path):
    edm(shutil.copytree(sdxl_folder, tmp_path / "edm"))
    with pytest.raises(ValueError, match="EDMDPMSolverMultistepScheduler has other noise than DDPM"):
        make_noise_scheduler(load_pipeline(tmp_path / "edm"))


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("sd15", "StableDiffusionImg2ImgPipeline", StableDiffusionPipeline),
        ("sdxl", "StableDiffusionXLInpaintPipeline", StableDiffusionXLPipeline),
        ("sdxl", "StableDiffusionXLControlNetPipeline", StableDiffusionXLPipeline),
    ],
)
def test_other_pipeline_classes_load_as_text_to_image(kind, name, expected, sd15_folder, sdxl_folder, tmp_path):
    folder = shutil.copytree({"sd15": sd15_folder, "sdxl": sdxl_folder}[kind], tmp_path / "base")
    change(folder / "model_index.json", _class_name=name)
    assert type(load_pipeline(folder)) is expected


@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "FluxPipeline", "StableDiffusionXLPipeline", "MyPipeline"])
def test_a_pipeline_of_another_family_is_not_loaded_as_what_its_parts_are(name, copy):
    """By its class in model_index.json, or its file of code; the option that says what it predicts is no way around."""
    change(copy / "model_index.json", _class_name=name)
    reason = f"its pipeline is {name}, .* name StableDiffusionPipeline in its model_index.json if it is one"
    with pytest.raises(ValueError, match=f"the pipeline in .* cannot be loaded: {reason}"):
        load_pipeline(copy, prediction_type="epsilon")
    with pytest.raises(ValueError, match=f"cannot be tuned with the guidance loss: {reason}"):
        require_base(copy, "tune", prediction_type="epsilon")
    change(copy / "model_index.json", _class_name=["my_code", name])
    with pytest.raises(ValueError, match=f"its pipeline is my_code.{name}"):
        load_pipeline(copy)


def test_known_classes_are_those_of_diffusers_tasks():
    """Every class that diffusers lists for text-to-image, image-to-image and inpainting, by its family there.

    FLUX's control and Kontext models read other latents; the union ControlNets and PAG share the parts.
    """
    families = {"stable-diffusion": "Stable Diffusion 1", "stable-diffusion-xl": "SDXL", "lcm": "Stable Diffusion 1"}
    families |= {"stable-diffusion-3": "Stable Diffusion 3", "flux": "FLUX"}
    tasks = [getattr(auto_pipeline, f"AUTO_{t}_PIPELINES_MAPPING") for t in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT")]
    found = {cls.__name__: key for task in tasks for key, cls in task.items()}
    for name, key in found.items():
        family = families.get(re.sub("(-controlnet(-union)?)?(-pag)?$", "", key))
        for architecture in families.values():
            assert (class_problem(name, architecture) is None) == (architecture == family), name
    assert (
        len(found) > 60 and class_problem("FluxKontextPipeline", "FLUX") and class_problem("FluxFillPipeline", "FLUX")
    )


class MyOwnPipeline(StableDiffusionPipeline):
    """A class of a user's, which diffusers does not know."""


def test_a_pipeline_of_a_users_own_class_is_what_it_derives_from(sd15):
    assert require_base(MyOwnPipeline(**sd15.components, requires_safety_checker=False), "tune").in_channels == 4


# ---- Stable Diffusion 3 and FLUX


LINES = {
    "sd1": "Stable Diffusion 1, epsilon, DDPM noise, 4 channels",
    "sd2": "Stable Diffusion 2, epsilon, DDPM noise, 4 channels",
    "sd2-v": "Stable Diffusion 2, v_prediction, DDPM noise, 4 channels",
    "sdxl": "SDXL, epsilon, DDPM noise, 4 channels",
    "sdxl-v-ztsnr": "SDXL, v_prediction, DDPM noise to zero SNR, 4 channels",
    "sd3": "Stable Diffusion 3, flow matching, 16 channels",
    "sd3-no-t5": "Stable Diffusion 3, flow matching, 16 channels, without T5",
    "sd3.5": "Stable Diffusion 3, flow matching, 16 channels",
    "flux-dev": "FLUX, flow matching, 16 channels",
    "flux-schnell": "FLUX, flow matching, 16 channels",
}


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory):
    @cache
    def folder(kind):
        path = tmp_path_factory.mktemp("kinds") / kind
        build(kind).save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("kind", tiny_bases.KINDS)
def test_every_kind_is_described_and_loaded(kind, tiny_folders):
    """All its weights as they were saved, but the VAE's in `dtype`, and its tokenizers."""
    folder, saved = tiny_folders(kind), build(kind)
    info = require_base(folder, "tune", train="lora")
    assert str(info) == f"{folder}: {LINES[kind]}"
    loaded = load_pipeline(folder, torch.bfloat16)
    assert type(loaded) is type(saved)
    again = describe_base(loaded)
    assert {**vars(info), "name": ""} == {**vars(again), "name": ""}
    for name, part in saved.components.items():
        mine = loaded.components[name]
        if isinstance(part, torch.nn.Module):
            dtype = torch.float32 if name == "vae" else torch.bfloat16
            assert mine.dtype == dtype and same_weights(mine, part.to(dtype))
        elif "tokenizer" in name and part is not None:
            assert mine("a face, foo").input_ids == part("a face, foo").input_ids
    for method in ("inpaint", "prior", "restore"):
        if kind in tiny_bases.TRANSFORMERS:
            with pytest.raises(ValueError, match=rf"has to be of .*SDXL type but is {info.architecture}$"):
                require_base(folder, method)


@pytest.mark.parametrize("name", ["StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"])
def test_stable_diffusion_3_loads_as_text_to_image(name, tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders("sd3"), tmp_path / "base")
    change(folder / "model_index.json", _class_name=name)
    assert type(load_pipeline(folder)) is StableDiffusion3Pipeline


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline"])
def test_flux_loads_as_text_to_image(name, tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders("flux-dev"), tmp_path / "base")
    change(folder / "model_index.json", _class_name=name)
    assert type(load_pipeline(folder)) is FluxPipeline


def network(**values):
    return lambda folder: change(folder / "transformer/config.json", **values)


def ddim(folder):
    DDIMScheduler().save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])


def without(*names):
    return lambda folder: change(folder / "model_index.json", **{name: [None, None] for name in names})


def named(class_name):
    return lambda folder: change(folder / "model_index.json", _class_name=class_name)


# (base, change, reason): what is no base of its kind
MISFITS = {
    "Fill": ("flux-dev", network(in_channels=384, out_channels=64), "transformer has 96 input channels .*96: Fill"),
    "Fill's class": ("flux-dev", named("FluxFillPipeline"), "pipeline is FluxFillPipeline"),
    "Depth": ("flux-dev", network(in_channels=128, out_channels=64), "transformer has 32 input channels"),
    "Control's class": ("flux-dev", named("FluxControlPipeline"), "pipeline is FluxControlPipeline"),
    "Kontext's class": ("flux-dev", named("FluxKontextPipeline"), "pipeline is FluxKontextPipeline"),
    "out": ("sd3", network(out_channels=32), "transformer has 32 output channels, and the latents have 16"),
    "SD3's latents": ("sd3", lambda f: change(f / "vae/config.json", latent_channels=4), "16 input .* latents have 4"),
    "SD3's T5": ("sd3", network(joint_attention_dim=4096), "reads prompts of 4096 features, .* give 64"),
    "FLUX's T5": ("flux-dev", network(joint_attention_dim=4096), "reads prompts of 4096 features, .* give 64"),
    "SD3's CLIP": ("sd3", network(pooled_projection_dim=2048), "reads pooled prompts of 2048 features, .* give 48"),
    "FLUX's CLIP": ("flux-dev", network(pooled_projection_dim=768), "reads pooled prompts of 768 features, .* give 16"),
    "no T5": ("flux-dev", without("text_encoder_2", "tokenizer_2"), "text encoders have to be CLIP's and T5's but are"),
    "one CLIP": ("sd3", without("text_encoder_2", "tokenizer_2"), "to be CLIP's twice and T5's, which may be missing"),
    "no VAE": ("sd3", without("vae"), "no VAE: name one with"),
    "DDIM": ("sd3", ddim, "trained with flow matching, and its noise is given as ddpm, predicted by epsilon: give the"),
    "FLUX's DDIM": ("flux-dev", ddim, "trained with flow matching"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_transformers_that_do_not_fit_are_refused_in_one_sentence(misfit, tiny_folders, tmp_path):
    kind, alter, reason = MISFITS[misfit]
    folder = shutil.copytree(tiny_folders(kind), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    alter(folder)
    with pytest.raises(ValueError, match=f"^the base .* cannot be tuned with the guidance loss: .*{reason}") as error:
        require_base(folder, "tune", train="lora")
    assert "\n" not in str(error.value)


def test_what_a_flow_base_predicts_is_no_option(tiny_folders):
    with pytest.raises(ValueError, match="trained with flow matching, .* leave `prediction_type` at auto"):
        require_base(tiny_folders("sd3"), "tune", prediction_type="v_prediction")


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_a_t5_tokenizer_without_words_is_refused(kind, tiny_folders, tmp_path):
    """transformers would make one of its special tokens."""
    folder = shutil.copytree(tiny_folders(kind), tmp_path / "base")
    name = "tokenizer_3" if kind == "sd3" else "tokenizer_2"
    for file in (folder / name).iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=f"is damaged: .*{name} has no vocabulary"):
        load_pipeline(folder)


def test_t5_without_its_tokenizer_is_refused(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders("sd3"), tmp_path / "base")
    without("tokenizer_3")(folder)
    with pytest.raises(ValueError, match="is damaged: .*tokenizer_3"):
        load_pipeline(folder)


# ---- variants of weights


def as_variant(folder, variant="fp16", parts=("unet", "vae", "text_encoder")):
    for part in parts:
        for weights in (folder / part).glob("*.safetensors"):
            weights.rename(weights.with_name(f"{weights.stem}.{variant}.safetensors"))


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("unet",), ("vae",)])
def test_weights_that_are_there_in_one_variant_only(sd15, copy, caplog, parts):
    caplog.set_level(logging.INFO, "faceprior")
    as_variant(copy, parts=parts)
    assert require_base(copy, "inpaint").variant == "fp16"
    loaded = load_pipeline(copy)
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(loaded, part), getattr(sd15, part))
        said = f"{part}: loaded from its fp16 weights, there are no others" in caplog.messages
        assert said == (part in parts)
    assert "fp16 weights" in caplog.messages[0]


def test_plain_weights_come_before_a_variant(sd15, copy):
    plain = copy / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(plain, copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    truncate(copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert require_base(copy, "tune").variant == "" and same_weights(load_pipeline(copy).unet, sd15.unet)


def test_a_repository_with_half_precision_only_is_downloaded(sd15, copy, tmp_path, monkeypatch):
    """`download` without a variant brings no weights then, as the hub's does; it is asked once more."""
    as_variant(copy)
    asked = []

    def download(name, variant=None, **options):
        asked.append(variant)
        patterns = ["*.json", "*.txt", *(["*.fp16.safetensors"] if variant else ["*model.safetensors"])]
        names = [path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()]
        for file in filter_repo_objects(names, allow_patterns=patterns):
            (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(copy / file, tmp_path / "hub" / file)
        return str(tmp_path / "hub")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert same_weights(load_pipeline("owner/half").unet, sd15.unet)
    assert asked == [None, "fp16"]


# ---- the stages


def make_settings(stage, tmp_path, **values):
    return load_stage(stage).Config(output=str(tmp_path / "out"), device="cpu", **values)


@pytest.mark.parametrize(
    ("stage", "key", "reason"),
    [
        ("01_make_pairs", "base", "cannot inpaint faces: its noise"),
        ("04_guidance_tune", "base", "cannot be tuned with the guidance loss: its noise"),
        ("05_prior_tune", "base", "cannot be tuned into a portrait prior: its noise"),
        ("06_train_restorer", "prior", "cannot be the prior of a restorer: its noise"),
    ],
)
def test_a_stage_refuses_a_base_before_it_makes_its_output(stage, key, reason, sdxl_folder, tmp_path, monkeypatch):
    edm(shutil.copytree(sdxl_folder, tmp_path / "edm"))
    module, values = load_stage(stage), {key: str(tmp_path / "edm")}
    readers = {"04": ("gather_pairs", "pairs"), "05": ("read_portraits", ""), "06": ("readable_images", "")}
    if stage[:2] in readers:  # the inputs of the stage before do not matter here
        monkeypatch.setattr(module, readers[stage[:2]][0], lambda *args: ([], []))
    if stage[:2] == "06":
        values["images"] = str(tmp_path)
    with pytest.raises(ValueError, match=reason):
        module.main(make_settings(stage, tmp_path, **values))
    assert not (tmp_path / "out").exists()
