"""Rehearsals: the count by hand, against real steps on a CPU, and the rules of CUDA."""

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from test_guidance import samples
from tiny_bases import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from faceprior import tiny
from faceprior.guidance import GuidanceTuner
from faceprior.memory import FLOAT32_ON_CUDA, Rehearsal
from faceprior.models import quiet_libraries
from faceprior.training import make_optimizer


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


def test_a_linear_layer_by_hand():
    """Weights 512 x 256 and a bias of 512 floats; inputs 64 x 256, outputs 64 x 512; 4 bytes each.

    The backward pass of a sum needs the outputs' gradient, one number that is expanded (512 bytes with rounding), and
    ends with the weights' and the bias's gradients, beside the outputs and their sum, which the caller holds.
    """
    weights, inputs, outputs, block = 4 * 512 * 256 + 4 * 512, 4 * 64 * 256, 4 * 64 * 512, 512
    with Rehearsal("cpu") as rehearsal:
        layer = nn.Linear(256, 512)
        rehearsal.name("layer", layer)
        with rehearsal.phase("forward"):
            result = layer(torch.zeros(64, 256))
            assert isinstance(result, FakeTensor)
            loss = result.sum()
            del result
        with rehearsal.phase("backward"):
            loss.backward()
        rehearsal.name("gradients", layer.weight.grad, layer.bias.grad)
        with rehearsal.phase("after"):
            pass
    assert rehearsal.peaks["forward"] == {"layer": weights, "activations": inputs + outputs + block}
    assert sum(rehearsal.peaks["backward"].values()) == weights + inputs + weights + 2 * block
    assert rehearsal.peaks["after"] == {"layer": weights, "gradients": weights, "activations": block}
    assert rehearsal.peak == sum(rehearsal.peaks["backward"].values())


def test_what_is_away_is_not_counted():
    with Rehearsal("cpu") as rehearsal:
        here, there = nn.Linear(256, 256, bias=False), nn.Linear(512, 256, bias=False)
        rehearsal.name("here", here)
        rehearsal.name("there", there)
        with rehearsal.away(there), rehearsal.phase("one"):
            pass
        with rehearsal.phase("both"):
            pass
    assert rehearsal.peaks == {"one": {"here": 4 * 256 * 256}, "both": {"here": 4 * 256 * 256, "there": 4 * 512 * 256}}


@pytest.mark.parametrize(("device", "counted"), [("cuda", 0), ("cpu", 4 * 512 * 256)])
def test_what_lies_on_the_cpu_is_not_counted_for_a_gpu(device, counted):
    """Nor is it where an operation returns it again; what is made of it is."""
    with Rehearsal(device) as rehearsal:
        here = torch.zeros(256, 256)
        rehearsal.name("here", here)
        there = torch.zeros(512, 256)
        rehearsal.leave_rest()
        rehearsal.name_rest("there")
        there.mul_(2)
        with rehearsal.phase("step"):
            made = there[:256] * here
    expected = {"here": 4 * 256 * 256, "there": counted, "activations": made.nbytes}
    assert rehearsal.peaks["step"] == {part: size for part, size in expected.items() if size}


def test_who_asks_for_a_value_gets_one_or_a_place():
    with Rehearsal("cpu"):
        assert float(torch.rand((), generator=torch.Generator())) == 1
        assert bool((torch.zeros(3) > 0).all())
        assert (torch.zeros(3, 2) > 0).nonzero().tolist() == [[0, 0]]
        assert torch.zeros(3, 2, 5)[torch.zeros(3, 2) > 0].shape == (6, 5)
        assert torch.zeros(2, 3).numpy().tolist() == [[1, 1, 1], [1, 1, 1]]
        nn.init.trunc_normal_(torch.empty(100))  # with values it draws until all lie within the bounds


def test_the_world_outside_is_as_before():
    apply, make = nn.Module._apply, torch.Tensor._make_subclass
    with pytest.raises(RuntimeError, match="on purpose"), Rehearsal():
        raise RuntimeError("on purpose")
    assert nn.Module._apply is apply and torch.Tensor._make_subclass is make
    assert not isinstance(nn.Linear(2, 2).to(torch.bfloat16).weight, FakeTensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.GroupNorm(1, 2)(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_modules_change_dtype_and_device():
    with Rehearsal("cpu") as rehearsal:
        layer = nn.Linear(256, 256, bias=False)
        weight = layer.weight
        layer.to("cpu", torch.bfloat16)
        rehearsal.name("layer", layer)
        with rehearsal.phase("now"):
            pass
    assert layer.weight is weight and weight.dtype == torch.bfloat16
    assert rehearsal.peaks["now"] == {"layer": 2 * 256 * 256}


# ---- against real steps


def step_of(kind, train, dtype, checkpointing, fake, optimizer="adamw", rank=16):
    """The peak of two steps of `fit` for real, or of their rehearsal."""
    data = samples(64)
    with Rehearsal("cpu", fake=fake) as rehearsal:
        pipeline = tiny.tiny_sd15() if kind == "tiny" else build(kind)
        for name, part in pipeline.components.items():
            if isinstance(part, PreTrainedModel):
                part.tie_weights()  # T5's two embeddings are one, but for models that are built without values
            if isinstance(part, nn.Module) and name != "vae":
                part.to(dtype)
        tuner = GuidanceTuner(pipeline, train=train, rank=rank, prompt_drop=0)  # of equal prompts one is encoded
        if checkpointing:
            tuner.denoiser.enable_gradient_checkpointing()
        if not fake:
            mixed = "bf16" if dtype == torch.bfloat16 else "no"
            with rehearsal.phase("two steps"):
                tuner.fit(data, steps=2, mixed_precision=mixed, device="cpu", optimizer=optimizer)
            return rehearsal
        trained = tuner.trainable_parameters()
        rehearsal.name_pipeline(pipeline, trained)
        rehearsal.name_rest("other weights")
        batch = {"good": torch.zeros(2, 3, 64, 64), "bad": torch.zeros(2, 3, 64, 64), "mask": torch.zeros(2, 1, 64, 64)}
        batch["prompt"] = ["a man"] * 2
        generators = [torch.Generator() for _ in range(2)]
        tuner.denoiser.train()
        rehearsal.step(lambda: tuner.loss(batch, generators), trained, make_optimizer(trained, optimizer))
    return rehearsal


@pytest.mark.parametrize(
    ("kind", "train", "dtype", "checkpointing"),
    [
        ("sdxl", "self_attention", torch.bfloat16, True),
        pytest.param("sd1", "full", torch.bfloat16, False, marks=pytest.mark.slow),
        ("sd3.5", "lora", torch.float32, False),
        ("flux-dev", "lora", torch.bfloat16, True),
    ],
)
def test_a_rehearsed_step_takes_the_memory_of_a_real_one(kind, train, dtype, checkpointing):
    """Within 1%, by the count of all storages of two real steps of `fit`."""
    real = step_of(kind, train, dtype, checkpointing, fake=False)
    planned = step_of(kind, train, dtype, checkpointing, fake=True)
    assert planned.peak == pytest.approx(real.peak, rel=0.01)
    assert set(planned.peaks) == {"encoding", "training", "optimizer step"}


def test_the_state_of_8bit_adam():
    """A LoRA of rank 128 on layers of 80 and 96 features: more than 4,096 elements each, two bytes a parameter.

    Beside them a float32 for each block of 256 of each moment, and two tables of 256 floats.
    """
    planned = step_of("tiny", "lora", torch.float32, True, fake=True, optimizer="adamw8bit", rank=128)
    real = step_of("tiny", "lora", torch.float32, True, fake=False, optimizer="adamw8bit", rank=128)
    parts = planned.peaks["optimizer step"]
    count = parts["trained weights"] / 4
    assert parts["optimizer state"] == pytest.approx(2 * count + 2 * 4 * count / 256 + 2 * 1024, rel=0.05)
    assert planned.peak == pytest.approx(real.peak, rel=0.05)


def quantized(kind, linear):
    """A frozen layer of bitsandbytes with the weights of `linear`, quantized on its device."""
    if kind == "nf4":
        layer = Linear4bit(linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, device="meta")
        weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer.weight, layer.support_avx512bf16_for_cpu = weight.to("cpu"), False
    else:
        layer = Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, device="meta")
        layer.weight = Int8Params(linear.weight.data, requires_grad=False).to("cpu")
        layer.init_8bit_state()
    layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer


def quantized_step(kind, fake):
    with Rehearsal("cpu", fake=fake) as rehearsal:
        layers = [quantized(kind, nn.Linear(*sizes).to(torch.bfloat16)) for sizes in ((256, 512), (512, 256))]
        network = nn.Sequential(layers[0], nn.GELU(), layers[1])
        rehearsal.name("network", network)
        inputs = torch.zeros(1000, 256, dtype=torch.bfloat16, requires_grad=True)
        with rehearsal.phase("training"):
            network(inputs).float().square().mean().backward()
    return rehearsal


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4 + 8 / 64), ("8bit", 8)])
def test_quantized_layers(kind, bits):
    """Weights: 4 bits, and a byte for each 64 of them, or 8 bits; the rest are scales and tables, below 5%."""
    planned, real = quantized_step(kind, fake=True), quantized_step(kind, fake=False)
    assert planned.peak == pytest.approx(real.peak, rel=0.05)
    biases = 2 * (512 + 256)
    assert planned.peaks["training"]["network"] == pytest.approx(2 * 256 * 512 * bits / 8 + biases, rel=0.05)


# ---- CUDA


def test_autocast_has_the_rules_of_cuda():
    """Products in bfloat16, norms in float32, as "Autocast Op Reference" in torch's documentation lists them."""
    with Rehearsal("cuda"), torch.autocast("cpu", torch.bfloat16):
        half = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
        assert nn.Conv2d(4, 4, 3)(half).dtype == torch.bfloat16
        assert nn.Linear(8, 8)(half).dtype == torch.bfloat16
        assert nn.SiLU()(half).dtype == torch.bfloat16
        assert nn.GroupNorm(2, 4).to(torch.bfloat16)(half).dtype == torch.float32
        assert nn.LayerNorm(8).to(torch.bfloat16)(half).dtype == torch.float32
        assert half.softmax(-1).dtype == half.pow(2).dtype == half.sum().dtype == torch.float32
    with Rehearsal("cpu"), torch.autocast("cpu", torch.bfloat16):
        half = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
        assert nn.GroupNorm(2, 4).to(torch.bfloat16)(half).dtype == torch.bfloat16


def test_the_rules_of_cuda_are_those_that_a_cpu_lacks():
    cuda, cpu = (
        set(torch._C._dispatch_get_registrations_for_dispatch_key(key)) for key in ("AutocastCUDA", "AutocastCPU")
    )
    assert {f"aten::{name}" for name in FLOAT32_ON_CUDA} <= cuda - cpu


def test_on_cuda_adam_updates_all_weights_at_once():
    """With temporary copies of all of them: 8 of 64 KB there, and of one layer at a time on a CPU."""

    def update(device):
        with Rehearsal(device) as rehearsal:
            layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(8))
            trained = list(layers.parameters())
            rehearsal.name("weights", layers)
            inputs = torch.zeros(1, 128)
            optimizer = torch.optim.AdamW(trained)
            rehearsal.step(lambda: sum(layer(inputs).sum() for layer in layers), trained, optimizer)
        return rehearsal.peaks["optimizer step"]["activations"]

    assert update("cuda") == pytest.approx(8 * 4 * 128 * 128, rel=0.02)
    assert update("cpu") < 4 * 4 * 128 * 128


def test_the_weights_of_a_product_in_4_bits_are_unpacked_for_it():
    """On a GPU a product of many rows multiplies by 16-bit weights: 2 bytes x 512 x 256 for its time."""

    with Rehearsal("cuda") as rehearsal:
        layer = quantized("nf4", nn.Linear(256, 512).to(torch.bfloat16))
        rehearsal.name_rest("network")
        with rehearsal.phase("product"):
            layer(torch.zeros(100, 256, dtype=torch.bfloat16))
    inputs, outputs = 2 * 100 * 256, 2 * 100 * 512
    assert rehearsal.peaks["product"]["activations"] == pytest.approx(inputs + outputs + 2 * 512 * 256, rel=0.02)


def test_a_device_that_is_not_known():
    with pytest.raises(ValueError, match="`device` has to be cuda or cpu but is 'tpu'"):
        Rehearsal("tpu")
