"""Frozen weights in 8 and 4 bits: how far off, how many bytes, which gradients; the tuner, the restorer, the stages."""

import copy
import json
import logging
import math
import os
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb
from conftest import load_stage
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from tiny_bases import build, widened
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5EncoderModel

from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.detect import box_mask
from faceprior.diffusion import PromptEmbeddings, predict
from faceprior.guidance import GuidanceTuner
from faceprior.images import save_image
from faceprior.jsonl import append_row
from faceprior.lora import save_lora, trained_lora
from faceprior.models import (
    QUANTIZATIONS,
    precision_of,
    quantizable,
    quantization_of,
    quantize,
    quiet_libraries,
    weight_dtype,
)
from faceprior.pairs import FacePair
from faceprior.procedural import draw_portrait
from faceprior.quantization import OUTLIER, quantized, quantized_bytes
from faceprior.restorer import AuthFaceRestorer, RestorerSettings
from faceprior.training import seeded

MODES = [mode for mode in QUANTIZATIONS if mode != "none"]
both = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


def linear(inputs, outputs, dtype=torch.float32, seed=0):
    with seeded(seed):
        return nn.Linear(inputs, outputs).to(dtype)


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(layer):
    """Return the weights that a quantized layer stands for, float32: (out, in)."""
    if hasattr(layer, "state"):
        return layer.state.CB.float() * layer.state.SCB[:, None] / 127
    return bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


# ------------------------------------------------------------------------------------------------ one layer

SIZES = [(64, 48), (256, 512)]


@pytest.mark.parametrize("sizes", SIZES)
def test_8bit_weights_are_within_half_a_step(sizes):
    """A row's weights are whole multiples of its largest, M, over 127: off by M / 254 at most.

    They are in float16 first, which adds M / 2048 at most. So an output is off by (M / 254 + M / 2048) sum |x|.
    """
    layer = linear(*sizes)
    frozen = quantized(copy.deepcopy(layer), "8bit").train()
    limit = layer.weight.abs().amax(dim=1) * (1 / 254 + 1 / 2048)  # (out,)
    off = (weights_of(frozen) - layer.weight).abs()
    assert (off <= limit[:, None]).all() and off.max() > limit.max() / 2
    x = random(5, sizes[0])
    assert ((frozen(x) - layer(x)).abs() <= limit * x.abs().sum(dim=1, keepdim=True) + 1e-5).all()


def test_8bit_inputs_are_rounded_but_for_outliers():
    """In eval(), as on a GPU: |y - W' x| <= m / 254 sum |w'|, m the largest input that is no outlier.

    An outlier would make m, and so the error, ten times as large; its column is multiplied in 16 bits instead. The
    float16 of inputs and weights adds a thousandth of the terms.
    """
    layer = quantized(linear(256, 512), "8bit").eval()
    x = random(5, 256).clamp(-3, 3)
    x[:, 7] = 30.0
    assert x.abs().max() > OUTLIER
    weights = weights_of(layer)
    exact = F.linear(x, weights, layer.bias)
    others = x.index_fill(1, torch.tensor([7]), 0)
    limit = others.abs().amax(dim=1, keepdim=True) / 254 * weights.abs().sum(dim=1)
    rounding = (x.abs() @ weights.abs().T) / 1000
    off = (layer(x) - exact).abs()
    assert (off <= limit + rounding).all() and off.max() > 1e-3


@pytest.mark.parametrize("sizes", SIZES)
def test_nf4_weights_are_within_half_the_widest_gap(sizes):
    """A block of 64 has the largest weight M: it holds multiples of M by 16 levels, off by half the widest gap at most.

    M itself is off by d: of its difference to the mean of all scales, the 256 levels of the second table are off by
    half their widest gap, times the largest such difference. A level is at most 1, so |w' - w| <= M gap / 2 + d.
    """
    layer = linear(*sizes)
    frozen = quantized(copy.deepcopy(layer), "nf4")
    state = frozen.weight.quant_state
    scales = layer.weight.detach().flatten().view(-1, 64).abs().amax(dim=1)
    second = (scales - scales.mean()).abs().max() * state.state2.code.sort().values.diff().max() / 2
    gap = state.code.sort().values.diff().max()
    assert gap == pytest.approx(1 - 0.6961928, abs=1e-6)  # between the two lowest levels (QLoRA, appendix E)
    limit = (scales * gap / 2 + second).repeat_interleave(64).view_as(layer.weight)
    off = (weights_of(frozen) - layer.weight).abs()
    assert (off <= limit + 1e-6).all() and off.max() > limit.max() / 2
    x = random(5, sizes[0])
    assert ((frozen(x) - layer(x)).abs() <= x.abs() @ limit.T + 1e-5).all()


def test_nf4_is_coarser_than_8bit():
    layer, x = linear(256, 512), random(5, 256)
    eight, four = (quantized(copy.deepcopy(layer), mode).train()(x) for mode in MODES)
    assert (four - layer(x)).std() > 5 * (eight - layer(x)).std() > 0


@pytest.mark.parametrize(
    ("sizes", "eight", "four"),
    [
        ((64, 64), 4096 + 4 * 64, 2048 + 64 + 4 + 1092),
        ((192, 3), 576 + 4 * 3, 288 + 9 + 4 + 1092),
        ((256, 512), 131072 + 4 * 512, 65536 + 2048 + 4 * 8 + 1092),
    ],
)
def test_bytes_of_a_layer(sizes, eight, four):
    """By hand, by `quantized_bytes`, and by all tensors that the layer holds beside its bias."""
    layer = linear(*sizes, torch.bfloat16)
    assert [quantized_bytes(layer, mode) for mode in MODES] == [eight, four]
    state = quantized(copy.deepcopy(layer), "8bit").state
    assert state.CB.nbytes + state.SCB.nbytes == eight
    weight = quantized(copy.deepcopy(layer), "nf4").weight
    outer, inner = weight.quant_state, weight.quant_state.state2
    tensors = [weight.data, outer.absmax, outer.code, outer.offset, inner.absmax, inner.code]
    assert sum(tensor.nbytes for tensor in tensors) == four
    held = [value for part in (outer, inner) for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert {id(tensor) for tensor in held} == {id(tensor) for tensor in tensors[1:]}


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_through_to_the_input_alone(mode, dtype):
    """dL/dx = dL/dy W', also after a call in eval(), from which on bitsandbytes' own 4-bit layer may have none."""
    layer = quantized(linear(128, 64, dtype), mode)
    layer.eval()(random(3, 128).to(dtype))
    for training in (True, False):
        x = random(2, 3, 128).to(dtype).requires_grad_()
        out = layer.train(training)(x)
        assert out.dtype == dtype
        slope = random(2, 3, 64, seed=2).to(dtype)
        out.backward(slope)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(x.grad.float(), slope.float() @ weights_of(layer), **tolerance)
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


@both
def test_autocast_decides_the_dtype_as_for_any_linear_layer(mode):
    layer, x = linear(64, 64, torch.bfloat16), random(2, 3, 64).requires_grad_()
    frozen = quantized(copy.deepcopy(layer), mode)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == layer(x).dtype == torch.bfloat16
        frozen(x).sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().max() > 0


@both
def test_no_input_is_kept_for_the_backward_pass(mode):
    """So a checkpointed block frees its inner activations, of which bitsandbytes' own 8-bit layer holds each."""
    first, second = (quantized(linear(64, 64, seed=seed), mode) for seed in (0, 1))
    inner = []

    def block(x):
        hidden = first(x).tanh()
        inner.append(weakref.ref(hidden))
        return second(hidden)

    x, other = random(2, 64).requires_grad_(), random(2, 64).requires_grad_()
    out = checkpoint(block, x, use_reentrant=False)
    assert inner[0]() is None
    out.sum().backward()
    block(other).sum().backward()
    assert torch.equal(x.grad, other.grad) and x.grad.abs().max() > 0


@both
def test_a_layer_moves_and_is_copied_with_its_scales(mode):
    """After a first call, which is when bitsandbytes takes the 8-bit scales off the weights; scales stay float32."""
    network, x = quantize(nn.Sequential(linear(64, 64)), mode), random(3, 64)
    out = network(x)
    copied = copy.deepcopy(network)
    assert torch.equal(network.to("cpu")(x), out)
    network.to(torch.bfloat16)
    assert weights_of(network[0]).equal(weights_of(copied[0]))
    if mode == "8bit":
        assert network[0].state.SCB.dtype == torch.float32
        assert network[0].state.CB.data_ptr() == network[0].weight.data_ptr()
    torch.testing.assert_close(network(x.bfloat16()).float(), out, rtol=0.02, atol=0.02)
    assert torch.equal(copied(x), out)


@both
def test_nothing_is_logged_call_by_call(mode, caplog, capfd):
    layer = quantized(linear(64, 64), mode)
    with caplog.at_level(logging.WARNING):
        layer.eval()(random(3, 64))
        layer.train()(random(3, 64).requires_grad_()).sum().backward()
    assert not caplog.records and capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ which layers


def kinds(module):
    return {name: type(layer).__name__ for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


@both
def test_all_linear_layers_of_a_unet_and_no_others(mode):
    """But for the one with 112 inputs, which are no multiple of 64; nothing random is drawn."""
    unet = widened(tiny.tiny_sdxl()).unet
    before, random_state = copy.deepcopy(unet), torch.get_rng_state()
    names = kinds(unet)
    assert quantize(unet, mode) is unet
    assert torch.equal(torch.get_rng_state(), random_state)
    assert kinds(unet).keys() == names.keys() and set(names.values()) == {"Linear"}
    assert [name for name, kind in kinds(unet).items() if kind == "Linear"] == ["add_embedding.linear_1"]
    assert set(kinds(unet).values()) == {"Linear", "Linear8bit" if mode == "8bit" else "Linear4bit"}
    assert unet.dtype == torch.float32 and quantization_of(unet) == mode and quantization_of(before) == "none"
    taken = quantizable(before)
    for name, parameter in before.named_parameters():
        if name.removesuffix(".weight") not in taken:
            assert torch.equal(unet.get_parameter(name), parameter), name


@both
def test_what_a_class_keeps_in_float32_stays(mode):
    """T5's `wo`, whose outputs overflow in float16; and layers whose weights others read, such as attention's."""
    with seeded(0):
        encoder = T5EncoderModel(T5Config(vocab_size=16, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2))
        attention = nn.MultiheadAttention(64, 2)
    found = kinds(quantize(encoder, mode))
    assert {name.split(".")[-1] for name, kind in found.items() if kind == "Linear"} == {"wo"}
    assert len([kind for kind in found.values() if kind != "Linear"]) == 2 * 5  # q, k, v, o and wi of each layer
    assert encoder(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()
    assert kinds(quantize(attention, mode)) == {"out_proj": "NonDynamicallyQuantizableLinear"}


def test_none_changes_nothing_and_other_names_are_refused(tmp_path):
    """Before anything is read: the folder does not exist."""
    network = nn.Sequential(linear(8, 8))
    assert kinds(quantize(network, "none")) == {"0": "Linear"} and quantization_of(network) == "none"
    missing = str(tmp_path / "none")
    for call in (
        lambda: quantize(network, "int4"),
        lambda: load_pipeline(missing, quantization="int4"),
        lambda: AuthFaceRestorer.from_pretrained(missing, quantization="int4"),
    ):
        with pytest.raises(ValueError, match="`quantization` has to be one of none, 8bit, nf4 but is 'int4'"):
            call()


def test_a_precision_and_its_dtype():
    assert all(precision_of(weight_dtype(name)) == name for name in ("no", "fp16", "bf16"))


# ------------------------------------------------------------------------------------------------ the tuner


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with pipelines of wider layers, by kind."""
    root = tmp_path_factory.mktemp("wide")
    made = {"sd15": tiny.tiny_sd15, "sdxl": tiny.tiny_sdxl, "restorer": tiny.tiny_restorer}
    widened(made["sd15"]()).save_pretrained(root / "sd15")
    prior = widened(made["sdxl"]())
    prior.save_pretrained(root / "sdxl")
    settings = RestorerSettings(resolution=64, guidance_scale=1.0, prompt="", negative_prompt="", num_inference_steps=2)
    AuthFaceRestorer.from_prior(prior, tiny.tiny_controlnet(prior.unet), settings).save_pretrained(root / "restorer")
    return {kind: str(root / kind) for kind in made}


@pytest.fixture
def base(folders):
    return folders["sd15"]


def make_batch(size=32, count=2):
    good, bad = (random(count, 3, size, size, seed=seed).clamp(-1, 1) for seed in (1, 2))
    mask = torch.zeros(count, 1, size, size)
    mask[:, :, 8:24, 8:24] = 1
    return {"good": good, "bad": bad, "mask": mask, "prompt": ["a man", "portrait photo, a woman"][:count]}


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def perturb(tuner):
    stream = generator(5)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))


def draw(pipeline):
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": generator(3)}
    return np.asarray(pipeline("a man", output_type="np", **options).images)


@both
@pytest.mark.parametrize(("kind", "dtype"), [("sd15", torch.float32), ("sdxl", torch.bfloat16)])
def test_a_lora_beside_quantized_weights(folders, mode, kind, dtype):
    """Gradients reach the LoRA and nothing else; with it off the network is the quantized base, to the last bit."""
    name = folders[kind]
    tuner = GuidanceTuner.from_pretrained(name, dtype, quantization=mode, train="lora", rank=2, prompt_drop=0)
    tuner.to("cpu").denoiser.train()
    parts = tuner.pipeline().components
    assert quantization_of(parts["text_encoder"]) == quantization_of(tuner.denoiser) == mode
    assert not [name for name, kind in kinds(parts["text_encoder"]).items() if kind == "Linear"]
    assert quantization_of(parts["vae"]) == "none" and parts["vae"].dtype == torch.float32
    assert tuner.denoiser.dtype == dtype
    before = {name: p.detach().clone() for name, p in tuner.denoiser.named_parameters()}
    batch = make_batch()
    assert tuner.loss({**batch, "bad": batch["good"]}, generator()).item() == 0

    # ---- one step
    perturb(tuner)
    loss = tuner.loss(batch, generator())
    loss.backward()
    trained = {id(p) for p in tuner.trainable_parameters()}
    reached = {name for name, p in tuner.denoiser.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in tuner.denoiser.named_parameters() if id(p) in trained}
    assert all(p.grad.abs().max() > 0 and p.dtype == torch.float32 for p in tuner.trainable_parameters())
    torch.optim.SGD(tuner.trainable_parameters(), 0.1).step()
    for key, parameter in tuner.denoiser.named_parameters():
        if "lora_" not in key:
            assert torch.equal(parameter, before[key]), key

    # ---- the base, and the distance to the one that is not quantized
    tuner.denoiser.eval()
    with tuner.untuned() as original:
        image = draw(original)
    pipeline = load_pipeline(name, dtype, quantization=mode)
    if dtype == torch.float32:
        assert (draw(pipeline) == image).all()
    full = GuidanceTuner.from_pretrained(name, dtype, train="lora", rank=2, prompt_drop=0)
    perturb(full)
    assert loss.item() == pytest.approx(full.loss(batch, generator()).item(), rel=0.3)


@both
def test_the_saved_lora_is_that_of_the_full_base(base, tmp_path, mode):
    """In stock diffusers: the tuner's image on the same quantized base, and a near one on the full base."""
    tuner = GuidanceTuner.from_pretrained(base, quantization=mode, train="lora", rank=2)
    perturb(tuner)
    tuner.save_pretrained(tmp_path)
    image = draw(tuner.pipeline())
    on_quantized = load_pipeline(base, quantization=mode)
    on_full = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    off = []
    for pipeline in (on_quantized, on_full):
        pipeline.set_progress_bar_config(disable=True)
        untuned = draw(pipeline)
        pipeline.load_lora_weights(tmp_path)
        off.append(np.abs(draw(pipeline) - image).mean())
        assert np.abs(untuned - image).mean() > 2 * off[-1]
    assert off[0] < 1e-5 < off[1]


@pytest.mark.parametrize("kind", ["sd3", "sd3.5", "flux-dev"])
def test_a_lora_in_a_transformer_in_nf4(kind, tmp_path):
    """The gradients of the LoRA alone, the base with it off to the last bit, and its file in a quantized pipeline."""
    pipelines = [widened(build(kind)), widened(build(kind))]
    for pipeline in pipelines:
        quantize(pipeline.transformer, "nf4").requires_grad_(False)
    tuned, other = pipelines
    width, pooled = (tuned.transformer.config[key] for key in ("joint_attention_dim", "pooled_projection_dim"))
    latents, timesteps = random(2, 16, 16, 16), tuned.scheduler.timesteps[[200, 700]]
    prompts = PromptEmbeddings(random(2, 7, width), random(2, pooled))

    def call(pipeline):
        return predict(pipeline, latents, timesteps, prompts)

    before = call(tuned)
    layers = [f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    with seeded(0):
        tuned.transformer.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights="gaussian"))
    assert torch.equal(call(tuned), before)
    for name, parameter in tuned.transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=generator())
    after = call(tuned)
    after.square().mean().backward()
    trained = {name for name, p in tuned.transformer.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in tuned.transformer.named_parameters() if "lora_" in name}
    tuned.transformer.disable_adapters()
    assert torch.equal(call(tuned), before) and (after - before).abs().max() > 1e-3
    tuned.transformer.enable_adapters()
    save_lora(tuned, trained_lora(tuned.transformer), tmp_path)
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(call(other), after, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("train", ["self_attention", "full"])
def test_quantized_weights_cannot_be_trained(base, tmp_path, mode, train):
    """Said by the constructor; by `from_pretrained` and the stage before the base is looked for."""
    message = f"`train` is {train} and `quantization` {mode}, but quantized weights cannot be trained: use lora"
    with pytest.raises(ValueError, match=message):
        GuidanceTuner(load_pipeline(base, quantization=mode), train)
    with pytest.raises(ValueError, match=message):
        GuidanceTuner.from_pretrained(str(tmp_path / "none"), quantization=mode, train=train)
    stage = load_stage("04_guidance_tune")
    with pytest.raises(ValueError, match=message):
        stage.main(stage.Config(pairs=str(tmp_path / "none"), train=train, quantization=mode))


def samples(count=4):
    batch = make_batch(count=count)
    return [{**{k: batch[k][i] for k in ("good", "bad", "mask")}, "prompt": "a man"} for i in range(count)]


def test_fit_with_all_that_needs_little_memory(base, tmp_path):
    """Two steps at once, and one and one: the same LoRA. Its precision is the base's, and its state is 8-bit."""
    options = {"optimizer": "adamw8bit", "gradient_checkpointing": True, "device": "cpu", "learning_rate": 1e-3}
    tuners = []
    for name, counts in (("whole", [2]), ("parts", [1, 2])):
        for steps in counts:
            tuner = GuidanceTuner.from_pretrained(base, torch.bfloat16, quantization="nf4", train="lora", rank=64)
            tuner.fit(samples(), steps=steps, output=tmp_path / name, **options)
            assert tuner.denoiser.is_gradient_checkpointing
        tuners.append(tuner)
    for one, other in zip(*(tuner.trainable_parameters() for tuner in tuners), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32
    state = load_file(tmp_path / "whole/resume/unet.optimizer.safetensors")
    assert {str(tensor.dtype) for key, tensor in state.items() if key.endswith("/state1")} == {"torch.uint8"}
    assert any(p.abs().max() > 0 for n, p in tuner.denoiser.named_parameters() if "lora_B" in n)


def test_fit_takes_float16_from_the_base(base):
    """Whose gradients need their loss scaled, which a CPU cannot do."""
    tuner = GuidanceTuner.from_pretrained(base, torch.float16, train="lora")
    with pytest.raises(ValueError, match="`mixed_precision` is fp16, which a CPU cannot train in"):
        tuner.fit(samples(), steps=1, device="cpu")


@pytest.mark.parametrize(
    ("train", "options", "advice"),
    [
        (
            "full",
            {},
            "cache='data/cache', batch_size=1 with accumulation=2, gradient_checkpointing=True, "
            "mixed_precision='bf16', optimizer='adamw8bit', train='lora', train='lora' with quantization='nf4'",
        ),
        (
            "lora",
            {"batch_size": 1, "gradient_checkpointing": True, "optimizer": "adamw8bit"},
            "cache='data/cache', mixed_precision='bf16', quantization='nf4'",
        ),
    ],
)
def test_fit_names_what_needs_less_memory(base, train, options, advice):
    def distance(target, prediction, mask):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8 GiB. More")

    tuner = GuidanceTuner.from_pretrained(base, train=train, distance=distance)
    with pytest.raises(MemoryError) as error:
        tuner.fit(samples(), steps=1, device="cpu", **options)
    said = "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; less is needed with "
    assert str(error.value) == said + advice
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_fit_says_with_what_a_run_resumes(base, tmp_path):
    def distance(target, prediction, mask):
        raise MemoryError("Unable to allocate 3 TiB")

    tuner = GuidanceTuner.from_pretrained(base, torch.bfloat16, quantization="nf4", train="lora", distance=distance)
    with pytest.raises(
        MemoryError, match=r"gradient_checkpointing=True \(the same run resumes\), else, in a new run, "
    ):
        tuner.fit(samples(), steps=1, device="cpu", output=tmp_path)


# ------------------------------------------------------------------------------------------------ the restorer


@both
def test_a_quantized_restorer(folders, mode, tmp_path):
    """All networks but the VAE are quantized; the face is near the one of full weights; saving is refused."""
    crop = Image.fromarray(draw_portrait(3, 64).image)
    full = AuthFaceRestorer.from_pretrained(folders["restorer"])
    restorer = AuthFaceRestorer.from_pretrained(folders["restorer"], quantization=mode).to("cpu")
    parts = {name: part for name, part in restorer.pipeline.components.items() if isinstance(part, nn.Module)}
    assert {name for name, part in parts.items() if quantization_of(part) == "none"} == {"vae"}
    images = [np.asarray(one.restore_crops([crop])[0], dtype=float) for one in (full, restorer)]
    assert 0 < np.abs(images[0] - images[1]).mean() < 10
    with pytest.raises(ValueError, match="a quantized restorer cannot be saved"):
        restorer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ------------------------------------------------------------------------------------------------ the stages


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of stage 1 with two drawn pairs."""
    folder, rows = tmp_path_factory.mktemp("pairs"), []
    for number in (1, 2):
        drawing = draw_portrait(number, 64)
        good = Image.fromarray(drawing.image)
        for side, image in (("good", good), ("bad", good.rotate(180)), ("mask", box_mask((64, 64), drawing.box))):
            save_image(image, folder / f"{side}{number}.png")
        pair = FacePair(
            id=str(number), photograph="a.png", good=f"good{number}.png", bad=f"bad{number}.png",
            mask=f"mask{number}.png", box=list(drawing.box), landmarks=None, confidence=1.0, area_ratio=0.2,
            strength=0.4, prompt="a man", seed=0, base="tiny", difference=9.0,
        )  # fmt: skip
        rows.append(json.dumps(pair.to_row()) + "\n")
    (folder / "manifest.jsonl").write_text("".join(rows))
    return str(folder)


def append_and_stop(path, row):
    """Log a step, and send SIGTERM to this process, as a scheduler does."""
    append_row(path, row)
    os.kill(os.getpid(), signal.SIGTERM)


MEMORY = {"gradient_checkpointing": True, "mixed_precision": "bf16", "train": "lora", "device": "cpu"}
TUNING = {"steps": 3, "batch_size": 1, "num_samples": 1, "sample_steps": 2, "resolution": 64}


@both
def test_stage_4_is_stopped_and_resumed_to_the_same_lora(base, pairs, tmp_path, mode, monkeypatch):
    """With all that needs little memory at once."""
    stage = load_stage("04_guidance_tune")
    options = {**MEMORY, **TUNING, "base": base, "pairs": pairs, "rank": 64, "quantization": mode}
    options |= {"optimizer": "adamw8bit", "save_every": 1}
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    configs = [stage.Config(**options, output=str(path)) for path in folders]
    stage.main(configs[0])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("faceprior.training.run.append_row", append_and_stop)
        stage.main(configs[1])
    assert stopped.value.code == 143 and not (folders[1] / "done.json").exists()
    stage.main(configs[1])
    for name in ("metrics.jsonl", "samples/000_after.png"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    whole, weights = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders)
    assert whole.keys() == weights.keys() and all(torch.equal(whole[key], weights[key]) for key in whole)
    state = load_file(folders[1] / "resume/unet.optimizer.safetensors")
    assert {str(tensor.dtype) for key, tensor in state.items() if key.endswith("/state1")} == {"torch.uint8"}
    assert all(tensor.abs().max() > 0 for tensor in weights.values())


@pytest.fixture(scope="module")
def portraits(tmp_path_factory):
    """A folder of stage 3 with two drawn portraits."""
    folder = tmp_path_factory.mktemp("work") / "portraits"
    stage = load_stage("03_curate_portraits")
    stage.main(stage.Config(num_drawn=2, output=str(folder)))
    return folder


def test_stage_5_fuses_a_lora_into_the_full_weights(folders, portraits, tmp_path):
    """The prior that is saved is the full base but for the attention, and no tensor of it is quantized."""
    stage, base = load_stage("05_prior_tune"), folders["sdxl"]
    output = tmp_path / "prior"
    given = {**MEMORY, **TUNING, "steps": 1, "mixed_precision": "no", "quantization": "nf4", "learning_rate": 1e-2}
    stage.main(stage.Config(**given, base=base, portraits=str(portraits), rank=2, output=str(output)))
    tuned, full = (load_file(Path(path) / "unet/diffusion_pytorch_model.safetensors") for path in (output, base))
    assert tuned.keys() == full.keys()
    changed = {key for key in full if not torch.equal(tuned[key], full[key])}
    assert changed and all(".attn" in key and key.endswith(".weight") for key in changed)
    moves = [(tuned[key] - full[key]).abs().max().item() for key in changed]
    assert 0 < max(moves) < 0.05  # a step of rank 2: quantized weights would be off by that nearly everywhere
    with pytest.raises(ValueError, match="`train` is full and `quantization` nf4"):
        stage.main(stage.Config(quantization="nf4"))


def test_stage_6_trains_the_controlnet_through_a_quantized_unet(folders, portraits, tmp_path):
    """Gradients pass through the U-Net; the prior is saved with the weights that it came with."""
    stage, prior = load_stage("06_train_restorer"), folders["sdxl"]
    given = {key: value for key, value in {**MEMORY, **TUNING}.items() if key != "train"}
    given |= {"steps": 1, "mixed_precision": "no", "facial_loss": "none", "init": "", "learning_rate": 1e-3}
    made = {}
    for mode in ("none", "nf4"):
        output = tmp_path / mode
        images = str(portraits / "images")
        stage.main(stage.Config(**given, images=images, prior=prior, quantization=mode, output=str(output)))
        made[mode] = load_file(output / "controlnet/diffusion_pytorch_model.safetensors")
        saved, full = (load_file(Path(p) / "unet/diffusion_pytorch_model.safetensors") for p in (output, prior))
        assert all(torch.equal(saved[key], full[key]) for key in full) and saved.keys() == full.keys()
        losses = [json.loads(row)["loss"] for row in (output / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(loss) for loss in losses)
    zero = [
        key for key in made["none"] if key.startswith("controlnet_") and key.endswith(".weight") and "cond_" not in key
    ]
    for key in zero:  # the zero-initialised outputs, which gradients reach only through the U-Net, move alike
        assert made["nf4"][key].abs().max() > 0
        assert (made["nf4"][key].sign() == made["none"][key].sign()).float().mean() > 0.75, key
