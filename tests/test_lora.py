"""LoRA: its layers, its files in stock diffusers and in the web UIs' format, what is extracted, found and refused."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import load_stage
from diffusers import StableDiffusionPipeline
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_bases import TRANSFORMERS, build
from torch import nn

from faceprior.bases import load_pipeline
from faceprior.detect import box_mask
from faceprior.diffusion import denoiser_of
from faceprior.guidance import GuidanceTuner, load_tuned
from faceprior.images import save_image
from faceprior.lora import (
    LORA_FORMATS,
    add_lora,
    extract_lora,
    find_lora,
    find_lora_layers,
    load_lora,
    save_lora,
    trained_lora,
)
from faceprior.models import quiet_libraries
from faceprior.pairs import FacePair
from faceprior.procedural import draw_portrait

LORA_FILE, KOHYA_FILE = LORA_FORMATS["diffusers"], LORA_FORMATS["kohya"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def bases():
    """Untuned pipelines by kind, each built once; a LoRA goes on a copy."""
    built = {}

    def get(kind):
        if kind not in built:
            built[kind] = build(kind)
            for part in built[kind].components.values():
                if isinstance(part, nn.Module):
                    part.eval()
        return copy.deepcopy(built[kind])

    return get


def perturb(parameters, scale=0.1):
    """Move weights, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def with_lora(pipeline, targets="self_attention", variant="plain", rank=4, alpha=6):
    """Put a LoRA on the pipeline's network that changes its images."""
    add_lora(pipeline, rank, alpha, targets, variant)
    perturb(parameter for name, parameter in denoiser_of(pipeline).named_parameters() if "lora_" in name)
    return pipeline


def draw(pipeline, size=32):
    options = {"num_inference_steps": 2, "height": size, "width": size, "guidance_scale": 2.0}
    stream = torch.Generator().manual_seed(3)
    return np.asarray(pipeline("a man", output_type="np", generator=stream, **options).images)


def same_image(one, other):
    """To the rounding of sums, which the place of loaded weights in memory decides; pixels lie in [0, 1]."""
    return np.abs(one - other).max() < 2e-5


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# ------------------------------------------------------------------------------------------------ layers


def linear(module):
    return {name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_presets_of_a_unet(bases, kind):
    """`all` is every linear layer and 1 x 1 convolution of the spatial transformers, found by their class."""
    pipeline = bases(kind)
    modules = pipeline.unet.named_modules()
    spatial = {f"{n}.{layer}" for n, m in modules if isinstance(m, Transformer2DModel) for layer in linear(m)}
    expected = {
        "self_attention": {name for name in spatial if ".attn1." in name},
        "attention": {name for name in spatial if ".attn" in name},
        "all": spatial,
    }
    assert {preset: set(find_lora_layers(pipeline, preset)) for preset in expected} == expected
    assert len({len(layers) for layers in expected.values()}) == 3


@pytest.mark.parametrize("kind", ["sd3", "sd3.5", "flux-dev"])
def test_presets_of_a_transformer(bases, kind):
    """`all` is every linear layer in a block but for those of its norms, which the timestep sets."""
    pipeline = bases(kind)
    blocks = {name for name in linear(pipeline.transformer) if "blocks." in name and ".norm" not in name}
    text_side = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    expected = {
        "self_attention": {name for name in blocks if ".attn" in name and not name.endswith(text_side)},
        "attention": {name for name in blocks if ".attn" in name},
        "all": blocks,
    }
    assert {preset: set(find_lora_layers(pipeline, preset)) for preset in expected} == expected
    assert len({len(layers) for layers in expected.values()}) == 3
    add_lora(pipeline, 2, 2, "all")  # peft's choice is ours: not the last layer, `proj_out`, too
    assert {name.removesuffix(".lora_A.default") for name in linear(pipeline.transformer) if "lora_A" in name} == blocks


def test_layers_by_name(bases):
    pipeline = bases("sd1")
    expected = {name for name in linear(pipeline.unet) if name.endswith((".attn2.to_k", ".conv1"))}
    for targets in (["attn2.to_k", "conv1"], "attn2.to_k, conv1"):
        assert set(find_lora_layers(pipeline, targets)) == expected
    for wrong in ("attn1", "ttn1.to_q", "attn1.to_q,", "attn1.to_q, nowhere", ["self_attention", "attn1.to_q"]):
        with pytest.raises(ValueError, match="`lora_targets` names .*: give self_attention, attention, all, or names"):
            find_lora_layers(pipeline, wrong)
    with pytest.raises(ValueError, match="`lora_variant` has to be one of plain, rslora, dora but is 'lokr'"):
        GuidanceTuner(pipeline, "lora", lora_variant="lokr")


def test_the_tuner_trains_the_layers_and_the_variant_that_are_asked_for(bases):
    """DoRA has a third tensor in each layer, its magnitudes, which start at the lengths of the base's weights."""
    tuner = GuidanceTuner(bases("sd1"), "lora", rank=4, alpha=8, lora_targets="attn2.to_k", lora_variant="dora")
    layers = {n: m for n, m in tuner.denoiser.named_modules() if hasattr(m, "lora_A")}
    assert layers and all(name.endswith("attn2.to_k") for name in layers)
    assert len(tuner.trainable_parameters()) == 3 * len(layers)
    for layer in layers.values():
        lengths = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(lengths, layer.base_layer.weight.norm(dim=1))
    stable = GuidanceTuner(bases("sd1"), "lora", rank=4, alpha=8, lora_variant="rslora").denoiser
    assert {m.scaling["default"] for m in stable.modules() if hasattr(m, "lora_A")} == {4.0}  # 8 / sqrt(4)


# ------------------------------------------------------------------------------ files in stock diffusers


@pytest.mark.parametrize(
    ("kind", "targets", "variant", "lora_format"),
    [
        ("sd1", "all", "plain", "diffusers"),
        ("sd1", "self_attention", "dora", "diffusers"),
        ("sdxl", "all", "dora", "diffusers"),
        ("sdxl", "attention", "rslora", "diffusers"),
        ("sd3.5", "all", "dora", "diffusers"),
        ("sd3", "self_attention", "rslora", "diffusers"),
        ("flux-dev", "all", "plain", "diffusers"),
        ("flux-schnell", "attention", "dora", "diffusers"),
        ("sd1", "all", "rslora", "kohya"),
        ("sd2-v", "attention", "plain", "kohya"),
        ("sdxl", "all", "rslora", "kohya"),
        ("sdxl", "conv1, conv2, conv_shortcut, proj_in", "plain", "kohya"),
    ],
)
def test_a_saved_lora_draws_the_tuned_image(bases, tmp_path, kind, targets, variant, lora_format):
    """In stock diffusers and by `load_lora`; alpha 6 and rank 4: the strength has to survive the file."""
    tuned = with_lora(bases(kind), targets, variant)
    file = save_lora(tuned, trained_lora(denoiser_of(tuned)), tmp_path, lora_format)
    assert file == tmp_path / LORA_FORMATS[lora_format] == find_lora(tmp_path)
    image, stock, ours = draw(tuned), bases(kind), bases(kind)
    assert np.abs(draw(stock) - image).max() > 0.01
    stock.load_lora_weights(tmp_path, weight_name=file.name)
    assert same_image(draw(stock), image)
    load_lora(ours, file)
    assert same_image(draw(ours), image)


@pytest.mark.parametrize(("kind", "variant"), [("sdxl", "dora"), ("flux-dev", "plain")])
def test_the_tensors_alone_draw_the_tuned_image(bases, tmp_path, kind, variant):
    """For a loader that does not read metadata: the strength is in B, also where DoRA divides by its length."""
    tuned = with_lora(bases(kind), "all", variant)
    file = save_lora(tuned, trained_lora(denoiser_of(tuned)), tmp_path)
    stock = bases(kind)
    stock.load_lora_weights(load_file(file))
    assert same_image(draw(stock), draw(tuned))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` has to be a whole number of at least 1 but is 0"),
        ({"rank": 2.5}, "`rank` has to be a whole number of at least 1 but is 2.5"),
        ({"alpha": 0}, "`alpha` has to be above 0 but is 0"),  # it would train nothing
        ({"alpha": math.nan}, "`alpha` has to be above 0 but is nan"),
        ({"alpha": math.inf}, "`alpha` has to be above 0 but is inf"),
    ],
)
def test_a_lora_without_size_or_strength_is_refused(bases, options, message):
    with pytest.raises(ValueError, match=message):
        GuidanceTuner(bases("sd1"), train="lora", **options)


def test_a_second_lora_goes_on_a_pipeline_once_the_first_is_in_its_weights(bases, tmp_path):
    GuidanceTuner(bases("sd1"), train="lora").save_pretrained(tmp_path)
    pipeline = bases("sd1")
    load_lora(pipeline, tmp_path / LORA_FILE)
    for train in ("lora", "self_attention", "full"):
        with pytest.raises(ValueError, match="has a LoRA already: `pipeline.fuse_lora"):
            GuidanceTuner(pipeline, train=train)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert GuidanceTuner(pipeline, train="lora", rank=2).trainable_parameters()


@pytest.mark.parametrize(("rank", "alpha"), [(8, 2), (16, 4), (4, 10)])
def test_the_strength_of_a_lora_is_in_its_tensors(bases, tmp_path, rank, alpha):
    """Folded: the product of the saved factors is alpha / rank B A; the trained weights themselves do not change."""
    tuner = GuidanceTuner(bases("sd1"), train="lora", rank=rank, alpha=alpha)
    perturb(tuner.trainable_parameters())
    layers = {n: m for n, m in tuner.denoiser.named_modules() if hasattr(m, "lora_A")}
    expected = {
        f"unet.{n}": alpha / rank * m.lora_B["default"].weight.detach() @ m.lora_A["default"].weight.detach()
        for n, m in layers.items()
    }
    tuner.save_pretrained(tmp_path)
    tensors, metadata = load_file(tmp_path / LORA_FILE), metadata_of(tmp_path / LORA_FILE)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert len(names) * 2 == len(tensors)
    products = {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}
    torch.testing.assert_close(products, expected)

    # ---- the metadata: alpha = rank, and the trained alpha under our key
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.lora_alpha"] == config["unet.r"] == rank
    assert json.loads(metadata["faceprior_lora"]) == {"rank": rank, "alpha": alpha, "rank_stabilized": False}


def test_layers_of_another_rank_and_alpha_keep_their_strength(bases, tmp_path):
    """Rank-stabilized, alpha 8 and rank 4 give 8 / sqrt(4) = 4, and one layer of its own 2 / sqrt(1) = 2."""
    pipeline, own = bases("sd1"), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pipeline.unet.add_adapter(
        LoraConfig(
            r=4, lora_alpha=8, use_rslora=True, target_modules=["attn1.to_q"], init_lora_weights=False,
            rank_pattern={own: 1}, alpha_pattern={own: 2},
        )
    )  # fmt: skip
    lora = trained_lora(pipeline.unet)
    assert lora.alphas == {name: 2.0 if name == own else 16.0 for name in lora.alphas}  # alpha / rank: 2 / 1, 16 / 4
    for lora_format in LORA_FORMATS:
        stock = bases("sd1")
        load_lora(stock, save_lora(pipeline, lora, tmp_path, lora_format))
        assert same_image(draw(stock), draw(pipeline))


def test_saving_copies_nothing_of_the_base(bases):
    """The tensors of a LoRA are the network's own, and no other's."""
    pipeline = with_lora(bases("sd1"))
    tensors, parameters = trained_lora(pipeline.unet).tensors, dict(pipeline.unet.named_parameters())
    adapter = {p.data_ptr() for name, p in parameters.items() if "lora_" in name}
    assert {tensor.data_ptr() for tensor in tensors.values()} == adapter


# ------------------------------------------------------------------------------------------- kohya's format


@pytest.mark.parametrize(
    ("kind", "version", "layer"),
    [
        ("sd1", "sd_v1", "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("sd2", "sd_v2", "up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"),
        ("sd2-v", "sd_v2_v", "mid_block_attentions_0_transformer_blocks_0_attn1_to_v"),
        ("sdxl", "sdxl_base_v1-0", "input_blocks_3_1_transformer_blocks_0_attn1_to_q"),  # level 1: 1 + 1 (1 + 1) + 0
    ],
)
def test_a_kohya_file_by_hand(bases, tmp_path, kind, version, layer):
    """Alpha 4 and rank 16: both as trained, and so are the factors; names and metadata as the web UIs read them."""
    tuner = GuidanceTuner(bases(kind), "lora", rank=16, alpha=4)
    perturb(tuner.trainable_parameters())
    tuner.save_lora(tmp_path, "kohya")
    tensors, metadata = load_file(tmp_path / KOHYA_FILE), metadata_of(tmp_path / KOHYA_FILE)
    layers = [m for m in tuner.denoiser.modules() if hasattr(m, "lora_A")]
    assert len(tensors) == 3 * len(layers)
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    down, up, alpha = (tensors[f"lora_unet_{layer}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert alpha.shape == () and alpha.item() == 4 and down.shape[0] == up.shape[1] == 16
    assert any(torch.equal(down, m.lora_A["default"].weight) for m in layers)
    assert any(torch.equal(up, m.lora_B["default"].weight) for m in layers)
    assert metadata["ss_base_model_version"] == version and metadata["ss_v2"] == str("v2" in version)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("16", "4.0")
    assert metadata["ss_network_module"] == "networks.lora"

    stock = bases(kind)
    stock.load_lora_weights(tmp_path, weight_name=KOHYA_FILE)
    assert same_image(draw(stock), draw(tuner.pipeline()))


def test_the_alpha_of_a_rank_stabilized_lora_is_that_of_its_strength(bases, tmp_path):
    """Alpha 4 and rank 16: 4 / sqrt(16) = 1, which is 16 / 16 for those who know no rank-stabilized LoRA."""
    tuned = with_lora(bases("sd1"), variant="rslora", rank=16, alpha=4)
    tensors = load_file(save_lora(tuned, trained_lora(tuned.unet), tmp_path, "kohya"))
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith("alpha")} == {16.0}


@pytest.mark.parametrize(("kind", "variant"), [("sd1", "dora"), *((kind, "plain") for kind in TRANSFORMERS[::3])])
def test_what_kohyas_format_loses_is_refused_by_name(bases, tmp_path, kind, variant):
    tuned = with_lora(bases(kind), variant=variant)
    reason = "drops the magnitudes of a DoRA" if variant == "dora" else "the base has a transformer"
    with pytest.raises(ValueError, match=f"`lora_format` .*kohya.*{reason}"):
        save_lora(tuned, trained_lora(denoiser_of(tuned)), tmp_path, "kohya")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`lora_format` has to be one of diffusers, kohya but is 'a1111'"):
        save_lora(tuned, trained_lora(denoiser_of(tuned)), tmp_path, "a1111")


# ------------------------------------------------------------------------------------------- extraction


def changed(shapes, rank=None, bias=0.0):
    """Layers before and after a change, of random full rank or of `rank`; their biases move by `bias`."""
    generator = torch.Generator().manual_seed(0)
    before, after = {}, {}
    for name, (rows, columns) in shapes.items():
        sizes = (rows, columns) if rank is None else (rows, rank, columns)
        factors = [torch.randn(pair, generator=generator) for pair in zip(sizes, sizes[1:], strict=False)]
        before[f"{name}.weight"] = torch.randn(rows, columns, generator=generator)
        after[f"{name}.weight"] = before[f"{name}.weight"] + torch.linalg.multi_dot([*factors, torch.eye(columns)])
        before[f"{name}.bias"] = torch.zeros(rows)
        after[f"{name}.bias"] = torch.full((rows,), bias)
    return before, after


def product(lora, layer):
    return lora.tensors[f"{layer}.lora_B.weight"] @ lora.tensors[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("rank", [3, 5, 40])
def test_extraction_is_exact_from_the_true_rank_on(rank):
    """The change has rank 3; 40 is more than the layers' sides."""
    before, after = changed({"a": (12, 8), "b": (6, 16)}, rank=3)
    lora = extract_lora(before, after, rank)
    for layer in ("a", "b"):
        torch.testing.assert_close(product(lora, layer), after[f"{layer}.weight"] - before[f"{layer}.weight"])
        assert lora.tensors[f"{layer}.lora_A.weight"].shape[0] == rank
    assert lora.alphas == {"a": rank, "b": rank} and lora.info["lost"] < 1e-6


def test_extraction_loses_the_tail_of_the_singular_values():
    """Eckart and Young: the squared error is the sum of the squares of those that were cut, and no less is possible.

    With singular values by numpy; the layer a has a change of rank 2, which rank 2 does not lose.
    """
    before, after = changed({"a": (9, 9)}, rank=2)
    full = changed({"b": (10, 7)})
    before, after = before | full[0], after | full[1]
    lora = extract_lora(before, after, 2)
    values = np.linalg.svd((after["b.weight"] - before["b.weight"]).numpy())[1]
    squares = [np.square((after[f"{n}.weight"] - before[f"{n}.weight"]).numpy()).sum() for n in ("a", "b")]
    tail = np.square(values[2:]).sum()
    error = (after["b.weight"] - before["b.weight"] - product(lora, "b")).square().sum().item()
    assert error == pytest.approx(tail, rel=1e-4)
    assert lora.info["lost"] == pytest.approx((tail / sum(squares)) ** 0.5, rel=1e-4)
    assert lora.info["most_lost"] == pytest.approx((tail / squares[1]) ** 0.5, rel=1e-4)
    assert lora.info["most_lost_layer"] == "b"
    assert f"{lora.info['lost']:.1%} of the change" in lora.loss()


def test_a_bias_is_lost_and_counted():
    """All of the change of b is its bias, 2 in each of 4 rows: 16 of squares, to those of a's weight and bias."""
    before, after = changed({"a": (4, 4)}, rank=1, bias=2.0)
    before |= {"b.weight": torch.ones(4, 4), "b.bias": torch.zeros(4)}
    after |= {"b.weight": torch.ones(4, 4), "b.bias": torch.full((4,), 2.0)}
    info = extract_lora(before, after, 1).info
    weight = (after["a.weight"] - before["a.weight"]).square().sum().item()
    assert info["lost"] == pytest.approx((32 / (32 + weight)) ** 0.5, rel=1e-5)
    assert (info["most_lost"], info["most_lost_layer"]) == (1.0, "b")


def test_unchanged_weights_lose_nothing():
    before, _ = changed({"a": (4, 4)})
    info = extract_lora(before, before, 1).info
    assert info["lost"] == info["most_lost"] == 0
    with pytest.raises(ValueError, match="`rank` has to be at least 1 but is 0"):
        extract_lora(before, before, 0)


@pytest.mark.parametrize(("kind", "lora_format"), [("sd1", "kohya"), ("sdxl", "diffusers")])
def test_a_lora_of_trained_self_attention_draws_its_image(bases, tmp_path, kind, lora_format):
    """Of rank 32, the layers' sides, and without the biases: exact. Then with biases moved, and of rank 1: stated."""
    tuner = GuidanceTuner(bases(kind))
    perturb((p for name, p in tuner.denoiser.named_parameters() if ".attn1." in name and "bias" not in name), 0.1)
    lora = tuner.save_lora(tmp_path, lora_format, rank=32)
    info = json.loads(metadata_of(tmp_path / LORA_FORMATS[lora_format])["faceprior_lora"])
    assert info == lora.info and info["lost"] < 1e-5
    stock = bases(kind)
    assert np.abs(draw(stock) - draw(tuner.pipeline())).max() > 0.01
    stock.load_lora_weights(tmp_path, weight_name=LORA_FORMATS[lora_format])
    assert same_image(draw(stock), draw(tuner.pipeline()))

    perturb((p for name, p in tuner.denoiser.named_parameters() if ".attn1.to_out.0.bias" in name), 0.1)
    assert 0.01 < tuner.save_lora(tmp_path, lora_format, rank=32).info["lost"] < 0.3
    worst = tuner.save_lora(tmp_path, lora_format, rank=1).info
    assert 0.5 < worst["lost"] < worst["most_lost"] < 1 and worst["most_lost_layer"] in dict(
        tuner.denoiser.named_modules()
    )


@pytest.mark.parametrize(
    ("train", "rank", "message"),
    [
        ("full", 4, "`train` is full, and a LoRA of a whole U-Net would lose most of it"),
        ("lora", 4, "`rank` is of a LoRA that is extracted, and this one was trained"),
        ("self_attention", None, "`train` is self_attention, of which a LoRA is extracted: give its `rank`"),
    ],
)
def test_there_is_no_such_lora(bases, tmp_path, train, rank, message):
    with pytest.raises(ValueError, match=message):
        GuidanceTuner(bases("sd1"), train).save_lora(tmp_path, rank=rank)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("variant", "alpha"), [("plain", 10), ("dora", 10)])
def test_a_tuned_lora_is_loaded_with_its_base(tiny_models, tmp_path, variant, alpha):
    """From the tuner to files, stock diffusers and back; alpha / rank is 2.5."""
    base = str(tiny_models / "sd15")
    tuner = GuidanceTuner.from_pretrained(base, train="lora", rank=4, alpha=alpha, lora_variant=variant)
    perturb(tuner.trainable_parameters())
    tuner.save_pretrained(tmp_path)
    tuned = draw(tuner.pipeline())
    stock = StableDiffusionPipeline.from_pretrained(base)
    assert np.abs(draw(stock) - tuned).max() > 0.01
    stock.load_lora_weights(tmp_path)
    assert same_image(draw(stock), tuned)
    assert same_image(draw(load_tuned(tmp_path, base)), tuned)
    stock.unload_lora_weights()
    with tuner.untuned() as original:
        assert same_image(draw(stock), draw(original))


def test_a_lora_of_an_earlier_version_keeps_its_strength(tiny_models, tmp_path):
    """Its tensors are not folded and have other names, and its metadata say alpha and rank."""
    base = str(tiny_models / "sd15")
    tuner = GuidanceTuner.from_pretrained(base, train="lora", rank=8, alpha=2)
    perturb(tuner.trainable_parameters())
    tuner.pipeline().save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(tuner.denoiser)),
        unet_lora_adapter_metadata=tuner.denoiser.peft_config["default"].to_dict(),
    )
    assert same_image(draw(load_tuned(tmp_path, base)), draw(tuner.pipeline()))


@pytest.mark.parametrize(
    ("name", "lora_format"), [("my_faces.safetensors", "diffusers"), ("FACES.SAFETENSORS", "kohya")]
)
def test_a_lora_under_another_name_is_found(tiny_models, tmp_path, name, lora_format):
    """The only file that holds one; also by the file's own path."""
    base = str(tiny_models / "sd15")
    tuner = GuidanceTuner.from_pretrained(base, train="lora", rank=2)
    perturb(tuner.trainable_parameters())
    tuner.save_lora(tmp_path, lora_format)
    (tmp_path / LORA_FORMATS[lora_format]).rename(tmp_path / name)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for place in (tmp_path, tmp_path / name):
        assert same_image(draw(load_tuned(place, base)), draw(tuner.pipeline()))
    shutil.copy(tmp_path / name, tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match="has 2 LoRAs, .*: give the file itself"):
        load_tuned(tmp_path, base)


@pytest.mark.parametrize("lora_format", LORA_FORMATS)
def test_a_lora_that_would_be_dropped_is_refused(bases, tmp_path, lora_format):
    """DoRA's scales in another format than peft's, layers that the base does not have, another base's sizes."""
    tuned = with_lora(bases("sd1"), rank=2)
    file = save_lora(tuned, trained_lora(tuned.unet), tmp_path, lora_format)
    tensors = load_file(file)
    first = next(iter(name for name in tensors if not name.endswith("alpha")))
    layer, blocks = first.rsplit(".", 2)[0], "blocks.1" if lora_format == "diffusers" else "blocks_1"
    cases = {
        "is a DoRA": tensors | {f"{layer}.dora_scale": torch.ones(8)},
        "does not fit the base": tensors
        | {n.replace(blocks, blocks[:-1] + "9"): t.clone() for n, t in tensors.items()},
        "does not fit the base: give": {n: t if n.endswith("alpha") else torch.zeros(3, 5) for n, t in tensors.items()},
        "does not fit": {f"text_encoder.{name}.lora.down.weight": torch.zeros(2, 64) for name in ("a", "b")},
    }
    for reason, changed_tensors in cases.items():
        save_file(changed_tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=reason):
            load_lora(bases("sd1"), file)


# ---------------------------------------------------------------------------------------------- stage 4


@pytest.fixture
def stage_4(tiny_models, tmp_path, monkeypatch):
    """Stage 4 on one drawn pair, as a function of its settings."""
    drawing = draw_portrait(1, 64)
    pair = FacePair(
        id="a", photograph="a.png", good="good.png", bad="bad.png", mask="mask.png", box=list(drawing.box),
        landmarks=None, confidence=1.0, area_ratio=0.2, strength=0.4, prompt="a man", seed=0, base="tiny",
        difference=9.0,
    )  # fmt: skip
    good = Image.fromarray(drawing.image)
    for name, image in (("good", good), ("bad", good.rotate(180)), ("mask", box_mask((64, 64), drawing.box))):
        save_image(image, tmp_path / f"pairs/{name}.png")
    (tmp_path / "pairs/manifest.jsonl").write_text(json.dumps(pair.to_row()) + "\n")
    monkeypatch.chdir(tmp_path)
    stage = load_stage("04_guidance_tune")
    fixed = {"pairs": "pairs", "base": str(tiny_models / "sd15"), "output": "guided", "device": "cpu", "steps": 1}
    small = {"batch_size": 1, "resolution": 64, "num_samples": 0, "learning_rate": 1e-2}
    return lambda **settings: stage.main(stage.Config(**fixed, **small, **settings))


def written(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors") if "resume" not in str(path)}


def test_stage_4_writes_the_files_that_are_asked_for(stage_4, tiny_models, tmp_path, capsys):
    """The same command with other files again writes those of the finished run, without training."""
    folder, base = tmp_path / "guided", str(tiny_models / "sd15")
    whole = {f"{part}/{name}.safetensors" for part, name in (
        ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")
    )}  # fmt: skip
    stage_4(extract_lora=3, single_file="fp32")
    assert written(folder) == whole | {f"lora/{LORA_FILE}", "guided.safetensors"}
    assert "a LoRA of rank 3, without " in capsys.readouterr().out
    tuned = draw(load_tuned(folder, base))
    assert same_image(draw(load_pipeline(folder / "guided.safetensors")), tuned)  # with the configs beside it
    extracted = draw(load_tuned(folder / "lora", base))
    assert np.abs(extracted - tuned).max() < np.abs(draw(load_pipeline(base)) - tuned).max()

    log = (folder / "metrics.jsonl").read_text()
    stage_4(extract_lora=3, lora_format="kohya")
    assert written(folder) == whole | {f"lora/{KOHYA_FILE}"} and (folder / "metrics.jsonl").read_text() == log
    assert same_image(draw(load_tuned(folder / "lora", base)), extracted)


def test_stage_4_trains_a_lora_for_the_web_uis(stage_4, tiny_models, tmp_path):
    stage_4(train="lora", lora_targets="attn1.to_q, attn2.to_k", lora_variant="rslora", lora_format="kohya", alpha=4)
    assert written(tmp_path / "guided") == {KOHYA_FILE}
    tensors = load_file(tmp_path / "guided" / KOHYA_FILE)
    assert {name.split(".")[0].rsplit("_attn")[1] for name in tensors} == {"1_to_q", "2_to_k"}
    tuned = load_tuned(tmp_path / "guided", str(tiny_models / "sd15"))
    assert not same_image(draw(tuned), draw(load_pipeline(str(tiny_models / "sd15"))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "lora", "lora_variant": "dora", "lora_format": "kohya"}, "drops the magnitudes of a DoRA"),
        ({"train": "lora", "extract_lora": 4}, "`extract_lora` is of trained self-attention, but `train` is lora"),
        ({"train": "full", "extract_lora": 4}, "`extract_lora` is of trained self-attention, but `train` is full"),
        ({"train": "lora", "single_file": "fp16"}, "`single_file` is a whole checkpoint, but `train` is lora"),
        ({"keep_best": True, "scorer": "none"}, "`keep_best` goes by the Face Score of validations"),
        ({"patience": 2}, "`patience` goes by the Face Score of validations"),
    ],
)
def test_stage_4_refuses_settings_before_it_trains(stage_4, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        stage_4(**settings)
    assert not (tmp_path / "guided").exists()
