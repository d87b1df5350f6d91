"""Names of models: a local path, the hub's cache, the hub; parts loaded by them."""

import inspect
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from faceprior.models import HUB_OPTIONS, MODEL_FILES, load_part, looks_like_path, resolve_model, weights_variant

HINT = "the command that makes one"


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(norm_num_groups=8, block_out_channels=(8,), latent_channels=2)


@pytest.fixture
def folder(vae, tmp_path):
    """A model in its sub-folder."""
    vae.save_pretrained(tmp_path / "model/vae")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, empty, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put_in_cache(cache, name, folder):
    """Lay a folder down as a download does: one commit, and the branch that points to it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("1" * 40)
    return shutil.copytree(folder, repository / "snapshots" / ("1" * 40))


class Hub:
    """A download function that notes its options and returns `folder`."""

    def __init__(self, folder=None):
        self.folder, self.calls = folder, []

    def __call__(self, name, **options):
        self.calls.append(options)
        if self.folder is None:
            raise FileNotFoundError("nothing of that id")
        return self.folder


# ---- the rule


def test_a_local_folder_is_taken_before_the_hub(folder, tmp_path, monkeypatch):
    """Also where the name could be an id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    folder.rename(tmp_path / "owner/name")
    hub = Hub()
    found = resolve_model("owner/name", "VAE", HINT, subfolder="vae", download=hub)
    assert found.as_posix() == "owner/name/vae" and hub.calls == []


def test_a_missing_path_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path)
    for name in ("./model", "~/no_such_model", "a/b/c", "checkpoints/model", "m.safetensors", Path("owner/model")):
        with pytest.raises(FileNotFoundError) as error:
            resolve_model(name, "VAE", HINT, download=hub)
        assert str(error.value) == f"no VAE at {name}: the path does not exist; {HINT}"
    assert hub.calls == []


def test_a_folder_without_the_required_files(folder):
    with pytest.raises(FileNotFoundError, match=f"no VAE in .*model: there is no config.json; {HINT}"):
        resolve_model(folder, "VAE", HINT)
    with pytest.raises(FileNotFoundError, match="there is no other/a.json or other/b.json"):
        resolve_model(folder, "VAE", HINT, subfolder="other", required=("a.json", "b.json"))
    assert resolve_model(folder, "VAE", HINT, required=("model.pt", "vae/config.json")) == folder


def test_a_file_is_no_folder():
    with pytest.raises(ValueError, match="the VAE .*test_models.py is a file: give the folder that holds it"):
        resolve_model(__file__, "VAE", HINT)


def test_the_hub_is_asked_once_and_its_error_names_the_command():
    hub = Hub()
    with pytest.raises(FileNotFoundError) as error:
        resolve_model("owner/name", "VAE", HINT, download=hub)
    message = str(error.value)
    assert message.startswith("no VAE 'owner/name': ") and message.endswith(HINT)
    assert "`hf download owner/name --local-dir FOLDER`" in message
    assert len(hub.calls) == 1


def test_options_of_the_hub_reach_it(folder):
    hub, options = Hub(folder), {"local_files_only": True, "revision": "main"}
    assert resolve_model("owner/name", "VAE", HINT, subfolder="vae", download=hub, **options) == folder / "vae"
    assert hub.calls == [options]
    assert set(HUB_OPTIONS) <= inspect.signature(snapshot_download).parameters.keys()


def test_looks_like_path():
    paths = ["./a", "/a/b", "~/a", "a/b/c", "a.safetensors", "owner/a.ckpt", "C:\\models", "checkpoints/prior"]
    paths += ["data/prior", "results/scorer", "owner/A.SAFETENSORS"]
    assert all(looks_like_path(name) for name in paths)
    assert not any(looks_like_path(name) for name in ("owner/name", "owner/name-v1.5", "name"))


def test_variants_of_weights_are_not_downloaded():
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", "model.onnx"]
    assert list(huggingface_hub.utils.filter_repo_objects(files + others, allow_patterns=list(MODEL_FILES))) == files


def test_variants_are_downloaded_where_there_is_nothing_else(vae, tmp_path, monkeypatch):
    """By patterns of a repository, whose plain weights are asked for first."""
    vae.save_pretrained(tmp_path / "repository/vae", variant="fp16")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        files = [p.relative_to(tmp_path / "repository").as_posix() for p in (tmp_path / "repository").rglob("*.*")]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "repository" / file, tmp_path / "hub" / file)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same_weights(load_part(AutoencoderKL, "owner/name", "VAE", subfolder="vae"), vae)
    assert len(asked) == 2 and "vae/diffusion_pytorch_model.fp16-0*.safetensors" in asked[1]


def test_the_variant_to_load(tmp_path):
    """Plain weights first, then fp16, then any other; files that are no weights do not count."""
    for number, (name, variant) in enumerate(
        [
            ("config.json", None),
            ("optimizer.safetensors", None),
            ("diffusion_pytorch_model.bf16.safetensors", "bf16"),
            ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
            ("diffusion_pytorch_model-00001-of-00002.safetensors", ""),
        ]
    ):
        (tmp_path / name).touch()
        assert weights_variant(tmp_path) == variant, number


# ---- parts


def same_weights(module, other):
    mine, others = module.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


def test_a_part_from_a_folder_and_from_the_cache(vae, folder, cache):
    put_in_cache(cache, "owner/cached", folder)
    for name in (folder, "owner/cached"):
        assert same_weights(load_part(AutoencoderKL, name, "VAE", subfolder="vae"), vae)
    assert load_part(AutoencoderKL, folder, "VAE", torch.bfloat16, "vae").dtype == torch.bfloat16


def test_a_part_without_weights(tmp_path):
    DDPMScheduler(num_train_timesteps=7).save_pretrained(tmp_path / "scheduler")
    required = ("scheduler_config.json",)
    loaded = load_part(DDPMScheduler, tmp_path, "scheduler", torch.float16, "scheduler", required)
    assert loaded.config.num_train_timesteps == 7


def test_a_missing_part(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match="no VAE at .*nothing: the path does not exist"):
        load_part(AutoencoderKL, tmp_path / "nothing", "VAE")
    with pytest.raises(FileNotFoundError, match="no VAE in .*: there is no config.json"):
        load_part(AutoencoderKL, tmp_path, "VAE")
    with pytest.raises(FileNotFoundError, match="no VAE 'owner/none'.*hf download owner/none"):
        load_part(AutoencoderKL, "owner/none", "VAE")


def test_a_damaged_part_is_named(folder):
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["quant_conv.bias"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="the VAE in .*vae is damaged: .* lack quant_conv.bias"):
        load_part(AutoencoderKL, folder, "VAE", subfolder="vae")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="the VAE in .*vae is damaged"):
        load_part(AutoencoderKL, folder, "VAE", subfolder="vae")
    config = folder / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()))[:-5])
    with pytest.raises(ValueError, match="the VAE in .*vae is damaged"):
        load_part(AutoencoderKL, folder, "VAE", subfolder="vae")
