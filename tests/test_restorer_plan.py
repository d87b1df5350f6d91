"""`faceprior restore --plan`: the memory of restoring, rehearsed without weights."""

from argparse import Namespace
from dataclasses import replace

import pytest

from faceprior import tiny
from faceprior.memory import Rehearsal
from faceprior.models import quiet_libraries
from faceprior.plan import GIB, make_plan, options
from faceprior.restorer import AuthFaceRestorer, print_restoring_plan
from faceprior.restorer.rehearsal import RestoringConfig, rehearse


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A restorer's configs, without its weights; it is sampled with guidance."""
    path, made = tmp_path_factory.mktemp("restorer"), tiny.tiny_restorer()
    settings = made.settings.override(guidance_scale=2.0, start="degraded")
    AuthFaceRestorer(made.pipeline, replace(settings, resolution=64)).save_pretrained(path)
    for weights in path.glob("*/*.safetensors"):
        weights.unlink()
    return str(path)


def test_a_batch_takes_what_it_takes_with_data(folder):
    """In each phase to within 1%, on a CPU."""
    config = RestoringConfig(checkpoint=folder, batch_size=2, device="cpu")
    planned, real = make_plan(rehearse, config).phases, Rehearsal("cpu", fake=False)
    rehearse(config, real)
    assert planned.keys() == real.peaks.keys() == {"encoding", "samples", "decoding"}
    for phase, parts in real.peaks.items():
        assert sum(planned[phase].values()) == pytest.approx(sum(parts.values()), rel=0.01), phase
    assert make_plan(rehearse, replace(config, batch_size=4)).peak > make_plan(rehearse, config).peak


def test_the_text_encoders_leave_the_card(folder):
    phases = make_plan(rehearse, RestoringConfig(checkpoint=folder, device="cpu")).phases
    names = {phase: {part.partition(",")[0] for part in parts} for phase, parts in phases.items()}
    assert "text encoders" in names["encoding"]
    for phase in ("samples", "decoding"):
        assert names[phase] >= {"U-Net", "ControlNet", "VAE"} and "text encoders" not in names[phase]


def test_offloaded_networks_are_not_on_the_card(folder):
    """By model: the text encoders, then U-Net and ControlNet, then the VAE, beside which the ControlNet stays."""
    config = RestoringConfig(checkpoint=folder, batch_size=1, offload="model", device="cpu")
    phases = make_plan(rehearse, config).phases
    names = {phase: {part.partition(",")[0] for part in parts} - {"activations"} for phase, parts in phases.items()}
    assert names["encoding"] == {"text encoders"}
    assert names["samples"] == {"U-Net", "ControlNet", "VAE"}  # the VAE, as sampling starts from the input
    assert names["decoding"] == {"ControlNet", "VAE"}
    by_layer = make_plan(rehearse, replace(config, offload="sequential"))
    unet = sum(p.nbytes for p in tiny.tiny_restorer().pipeline.unet.parameters())
    weights = {
        phase: sum(n for part, n in parts.items() if part != "activations") for phase, parts in by_layer.phases.items()
    }
    assert weights["samples"] < unet / 4 and by_layer.peak < make_plan(rehearse, config).peak


def test_options_from_the_cheapest_to_the_slowest():
    config = RestoringConfig(batch_size=4)
    assert list(options(config)) == [
        {"batch_size": 2},
        {"batch_size": 1},
        {"vae_tiling": True},
        {"dtype": "bfloat16"},
        {"offload": "model"},
        {"quantization": "8bit"},
        {"quantization": "nf4"},
        {"offload": "sequential"},
    ]
    with pytest.raises(ValueError, match="`offload` has to be one of none, model, sequential but is 'disk'"):
        RestoringConfig(offload="disk")


def test_the_command_prints_what_fits(folder, capsys):
    options = Namespace(checkpoint=folder, batch_size=2, device="cpu", offload=None, plan="", quantization="none")
    assert print_restoring_plan(options) == 0
    out = capsys.readouterr().out
    assert "restore: 2 faces, rehearsed without data, for cpu" in out and "U-Net, float32" in out
    needed = make_plan(rehearse, RestoringConfig(checkpoint=str(folder), batch_size=2, device="cpu")).needed
    options.plan = f"{0.97 * needed / 2**20}MB"
    assert print_restoring_plan(options) == 0
    out = capsys.readouterr().out
    assert "it does not fit into" in out and "it fits into" in out.splitlines()[-1] and "--batch-size 1" in out


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no restorer at .*none"):
        make_plan(rehearse, RestoringConfig(checkpoint=str(tmp_path / "none")))


@pytest.mark.slow
def test_sdxl_in_4_bits_fits_into_8_gb():
    """With four faces of 512 pixels at once and official guidance; the U-Net's 2567 million weights are in 4 bits."""
    plan = make_plan(rehearse, RestoringConfig(dtype="bfloat16", quantization="nf4"))
    assert plan.device == "cuda" and plan.needed < 8 * GIB
    unet = next(size for part, size in plan.phases["samples"].items() if part.startswith("U-Net"))
    assert 2_567_463_684 / 2 < unet < 2_567_463_684
