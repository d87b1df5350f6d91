"""`GuidanceTuner`: teach a Stable Diffusion checkpoint to generate better faces from (good, bad) pairs (Face Score, 5).

tuner = GuidanceTuner.from_pretrained("my_model.safetensors", train="lora")
tuner.fit("data/pairs", steps=500)
tuner.save_pretrained("checkpoints/guided")     # a LoRA that any diffusers pipeline loads
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from faceprior.bases import load_pipeline, require_base
from faceprior.diffusion import (
    added_conditions,
    decode_latents,
    downsample_mask,
    encode_latents,
    encode_prompts,
    make_noise_scheduler,
    noise_like,
    pred_original_sample,
    report_long_prompts,
    training_target,
)
from faceprior.features import FeatureNetwork
from faceprior.losses import guidance_loss, noise_loss
from faceprior.models import as_safetensors, first_line
from faceprior.pairs import PairDataset, gather_pairs
from faceprior.training import TrainingRun, drop_prompts, make_accelerator, make_optimizer, sample_timesteps, seeded

logger = logging.getLogger(__name__)
TRAIN = ("self_attention", "lora", "full")
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_INFO = "faceprior_lora"  # key in the file's metadata: rank and alpha as they were trained
SELF_ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


class GuidanceTuner:
    """A base model, the part of its U-Net that is trained, and the guidance loss.

    pipeline: a Stable Diffusion or SDXL pipeline; train: the U-Net's `self_attention` layers (the paper's choice), a
    `lora` on the same layers, or the `full` U-Net (the paper's ablation); rank, alpha: of the LoRA (alpha: rank by
    default); t_end: timesteps are drawn from the first fraction t_end of the schedule, (0, 1], the paper's is 0.5;
    prompt_drop: fraction of the samples whose prompt is dropped, [0, 1], the paper's is 0.2; distance: between the
    masked predictions, l2 by default; seed: of the LoRA's first weights.

    The original model, which predicts the targets, is the same network with its LoRA off, or with its original weights
    in place of the trained ones. So a second U-Net takes the memory of the trained part only, and none with a LoRA.

    The trained weights are float32. With a base in half precision every call of the U-Net, also by the pipeline, runs
    under autocast and returns float32.

    `loss` is Algorithm 1 on the parts `encode`, `sample_timesteps`, `encode_prompts`, `original_unet` and `predict_x0`;
    stage 4 calls the same parts in its loop. Another objective is a method like it, such as `denoising_loss`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        train: Literal["self_attention", "lora", "full"] = "self_attention",
        rank: int = 16,
        alpha: int | None = None,
        t_end: float = 0.5,
        prompt_drop: float = 0.2,
        distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        seed: int = 0,
    ):
        if train not in TRAIN:
            raise ValueError(f"`train` has to be one of {', '.join(TRAIN)} but is {train!r}")
        if not 0 < t_end <= 1:
            raise ValueError(f"`t_end` has to be in (0, 1] but is {t_end}")
        if not 0 <= prompt_drop <= 1:
            raise ValueError(f"`prompt_drop` has to be in [0, 1] but is {prompt_drop}")
        require_base(pipeline, "tune")
        self._pipeline, self.train = pipeline, train
        self.t_end, self.prompt_drop, self.distance = t_end, prompt_drop, distance
        self.noise_scheduler = make_noise_scheduler(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        if self.unet.dtype != torch.float32:
            _run_under_autocast(self.unet, self.unet.dtype)
        self._original: dict[str, Tensor] = {}
        with seeded(seed, "lora"):
            self._select_trained(rank, rank if alpha is None else alpha)

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        dtype: torch.dtype = torch.float32,
        vae: str | None = None,
        prediction_type: str = "auto",
        **options,
    ):
        """Load `base` (diffusers folder, single `.safetensors` file or hub id); `options` are the constructor's."""
        return cls(load_pipeline(base, dtype, vae, prediction_type), **options)

    @property
    def unet(self) -> nn.Module:
        return self._pipeline.unet

    @property
    def resolution(self) -> int | None:
        """The base's native image size in pixels; None if its U-Net's config does not say."""
        size = self.unet.config.sample_size
        return size * self._pipeline.vae_scale_factor if isinstance(size, int) else None

    def to(self, device: torch.device | str) -> GuidanceTuner:
        self._pipeline.to(device)
        self._original = {name: tensor.to(device) for name, tensor in self._original.items()}
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the float32 parameters that are trained; every other weight keeps the dtype it was loaded in."""
        return [parameter for _, parameter in self._trained()]

    # ---- parts of Algorithm 1

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the scaled latents z_0 = E(x): (B, 3, H, W) in [-1, 1] -> (B, C, h, w), the posterior's mean."""
        return encode_latents(self._pipeline.vae, pixel_values)

    def sample_timesteps(self, generators: list[torch.Generator], t_end: float = 1.0) -> Tensor:
        """Draw one timestep per generator from the first fraction t_end of the schedule -> (B,) int64.

        Algorithm 1 draws from [0, 0.5 T), section 5 writes [1, 0.5 T]: the same for steps that are counted from 0.
        """
        last = max(1, int(t_end * self.noise_scheduler.config.num_train_timesteps))
        return sample_timesteps(generators, 0, last, self.unet.device)

    def encode_prompts(
        self, prompts: list[str], size: tuple[int, int], generators: list[torch.Generator]
    ) -> dict[str, Any]:
        """Return the U-Net's arguments for B prompts, of which the fraction `prompt_drop` is replaced by the empty one.

        size: (H, W) of the training images in pixels, which an SDXL base is conditioned on.
        """
        embeddings = encode_prompts(self._pipeline, drop_prompts(prompts, self.prompt_drop, generators))
        conditions = added_conditions(embeddings, *size)
        return {"encoder_hidden_states": embeddings.prompt_embeds, "added_cond_kwargs": conditions}

    def predict_x0(self, unet: Callable, noisy_latents: Tensor, timesteps: Tensor, prompts: dict[str, Any]) -> Tensor:
        """Predict x_0 from x_t by one pass of `unet` (Face Score, Eqs. 4 and 6) -> (B, C, h, w), float32.

        prompts: what `encode_prompts` returned.
        """
        model_pred = unet(noisy_latents, timesteps, **prompts).sample
        return pred_original_sample(self.noise_scheduler, model_pred, timesteps, noisy_latents)

    @contextmanager
    def original_unet(self) -> Iterator[Callable]:
        """Give the U-Net with the original weights, to call without gradients."""
        if self.train == "lora":
            with self._adapters_off():
                yield self.unet
        else:
            yield lambda *a, **k: torch.func.functional_call(self.unet, self._original, a, k)

    # ---- objectives

    def loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        unet: nn.Module | None = None,
    ) -> Tensor:
        """Return the guidance loss of a batch (Face Score, Eqs. 6 and 7, Algorithm 1), with gradients.

        batch: good, bad (B, 3, H, W) in [-1, 1]; mask (B, 1, H, W) in {0, 1}; prompt, B texts. generator: draws
        timesteps, noise and dropped prompts; a list has one per sample. unet: the prepared network (DDP), by default
        the tuner's own.
        """
        generators = _one_per_sample(generator, len(batch["good"]))
        good, bad = self.encode(torch.cat([batch["good"], batch["bad"]])).chunk(2)
        timesteps = self.sample_timesteps(generators, self.t_end)
        noise = noise_like(good, generators)  # shared by both sides, as the timesteps are
        noisy_good, noisy_bad = (self.noise_scheduler.add_noise(z, noise, timesteps) for z in (good, bad))
        prompts = self.encode_prompts(batch["prompt"], batch["good"].shape[-2:], generators)
        with torch.no_grad(), self.original_unet() as original:
            target = self.predict_x0(original, noisy_good, timesteps, prompts)
        prediction = self.predict_x0(unet or self.unet, noisy_bad, timesteps, prompts)
        mask = downsample_mask(batch["mask"].to(good.device), good.shape[-2:])
        return guidance_loss(target, prediction, mask, self.distance)

    def denoising_loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        unet: nn.Module | None = None,
    ) -> Tensor:
        """Return the usual noise prediction loss on the good images, whole and at all timesteps; arguments as `loss`.

        Plain fine-tuning, a baseline to compare the guidance loss with; not in the paper.
        """
        generators = _one_per_sample(generator, len(batch["good"]))
        latents = self.encode(batch["good"])
        timesteps = self.sample_timesteps(generators)
        noise = noise_like(latents, generators)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        prompts = self.encode_prompts(batch["prompt"], batch["good"].shape[-2:], generators)
        model_pred = (unet or self.unet)(noisy_latents, timesteps, **prompts).sample
        return noise_loss(model_pred, training_target(self.noise_scheduler, latents, noise, timesteps))

    # ---- training, sampling and files

    def fit(
        self,
        pairs,
        steps: int = 500,
        learning_rate: float = 1e-5,
        batch_size: int = 2,
        accumulation: int = 1,
        optimizer: str = "adamw",
        mixed_precision: str = "no",
        device: str = "auto",
        seed: int = 0,
        output: str | Path | None = None,
        resolution: int | None = None,
    ) -> GuidanceTuner:
        """Train on `pairs`: a folder that stage 1 made, several separated by commas, or a dataset.

        resolution: side in pixels of the images of a folder, the base's own by default.
        A dataset has the samples that `loss` takes in batches. With `output`, a folder for the log and checkpoints, the
        training stops and resumes like stage 4.
        """
        if isinstance(pairs, str | Path):
            resolution = resolution or self.resolution
            if resolution is None:
                raise ValueError("the config of the base's U-Net has no `sample_size`: give `resolution`, in pixels")
            usable, problems = gather_pairs(pairs)
            for place, reason in problems:
                logger.warning("%s is skipped: %s", place, reason)
            report_long_prompts(self._pipeline, (pair.prompt for pair in usable))
            pairs = PairDataset(usable, resolution)
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
        accelerator = make_accelerator(device, mixed_precision, accumulation)
        self.to(accelerator.device)
        adam = make_optimizer(self.trainable_parameters(), optimizer, learning_rate)
        unet, adam = accelerator.prepare(self.unet, adam)
        run = TrainingRun(output, steps, accelerator, {"unet": unet}, {"unet": adam})
        for batch in run.batches(pairs, batch_size, seed):
            unet.train()
            with accelerator.accumulate(unet):
                loss = self.loss(batch, run.generators(batch), unet)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.trainable_parameters(), 1.0)
                adam.step()
                adam.zero_grad()
            run.log(loss=loss)
        return self

    def pipeline(self) -> DiffusionPipeline:
        """Return the pipeline with the tuned weights, for sampling."""
        self.unet.eval()
        return self._pipeline

    @contextmanager
    def untuned(self) -> Iterator[DiffusionPipeline]:
        """Give the pipeline with the original weights, to sample images as before the tuning."""
        if self.train == "lora":
            with self._adapters_off():
                yield self.pipeline()
            return
        tuned = {name: parameter.detach().clone() for name, parameter in self._trained()}
        try:
            self._copy(self._original)
            yield self.pipeline()
        finally:
            self._copy(tuned)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a LoRA file for `load_lora_weights`; else a whole pipeline folder.

        The scale alpha / rank is folded into the LoRA's weights, and its metadata say alpha = rank, so that a loader
        that reads tensors only draws the same images. The trained alpha is in the file's metadata under LORA_INFO.
        """
        if self.train != "lora":
            self._pipeline.save_pretrained(folder)
            return
        layers, config = fold_lora(self.unet)
        trained = self.unet.peft_config["default"]
        info = {"rank": trained.r, "alpha": trained.lora_alpha, "rank_stabilized": trained.use_rslora}
        metadata = {
            "format": "pt",
            LORA_ADAPTER_METADATA_KEY: json.dumps({f"unet.{key}": value for key, value in config.items()}),
            LORA_INFO: json.dumps(info),
        }
        self._pipeline.save_lora_weights(
            save_directory=folder,
            unet_lora_layers=convert_state_dict_to_diffusers(layers),
            save_function=partial(save_file, metadata=metadata),
        )

    def _select_trained(self, rank: int, alpha: int) -> None:
        if self.train == "lora":
            targets = [f"attn1.{layer}" for layer in SELF_ATTENTION_LAYERS]
            self.unet.add_adapter(
                LoraConfig(r=rank, target_modules=targets, lora_alpha=alpha, init_lora_weights="gaussian")
            )
        else:
            self._original = {name: parameter.detach().clone() for name, parameter in self._trained()}
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)
        if not self.trainable_parameters():
            raise ValueError("the base's U-Net has no self-attention layers (attn1) to train")
        cast_training_params(self.unet, torch.float32)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        # by name, not by requires_grad: peft turns the flag off while an adapter is disabled
        part = {"self_attention": ".attn1.", "lora": "lora_", "full": ""}[self.train]
        return [(name, parameter) for name, parameter in self.unet.named_parameters() if part in name]

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._trained():
            parameter.copy_(tensors[name])


def dino_distance(vae: AutoencoderKL, network: FeatureNetwork) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the second distance of Face Score's Eq. 7, between a vision transformer's features of the decoded faces.

    The distance takes masked latents (B, C, h, w), decodes both with the frozen `vae` and returns 1 - cos of the
    network's [CLS] features, averaged over the batch; gradients reach the second of them. The paper names DINO but
    neither the model nor the features: DINO is trained on [CLS], and its features are compared by their cosine.
    """
    network.requires_grad_(False).eval()

    def distance(target: Tensor, prediction: Tensor) -> Tensor:
        network.to(prediction.device)
        with torch.no_grad():
            good = network.features(decode_latents(vae, target).float())
        bad = network.features(decode_latents(vae, prediction).float())
        return (1 - F.cosine_similarity(good, bad, dim=1)).mean()

    return distance


# ---- LoRA files


def fold_lora(unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the LoRA of a U-Net with its scale folded into lora_B, and its config with alpha = rank.

    The scale is alpha / rank, or alpha / sqrt(rank) of a rank-stabilized LoRA. The U-Net is not changed.
    """
    layers, config = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            layers[f"{name}.lora_B.weight"] = layers[f"{name}.lora_B.weight"] * module.scaling["default"]
    config |= {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"], "use_rslora": False}
    return layers, {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def load_tuned(
    folder: str | Path,
    base: str,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    prediction_type: str = "auto",
) -> DiffusionPipeline:
    """Load what `save_pretrained` wrote: a pipeline folder, or `base` with the LoRA in `folder`, by whatever file name.

    vae, prediction_type: of `base`, as in `load_pipeline`.
    """
    folder = Path(folder)
    if not (folder / LORA_FILE).is_file() and (folder / "model_index.json").is_file():
        return load_pipeline(str(folder), dtype)
    file = find_lora(folder)
    if file is None:
        raise FileNotFoundError(f"no tuned model in {folder}: `python stages/04_guidance_tune.py` makes one")
    pipeline = load_pipeline(base, dtype, vae, prediction_type)
    load_lora(pipeline, file)
    return pipeline


def find_lora(path: Path) -> Path | None:
    """Return the LoRA file at `path` or in this folder, LORA_FILE or the only one that holds a LoRA; None without one.

    Raises ValueError if there are several.
    """
    if path.is_file() or (path / LORA_FILE).is_file():
        return path if path.is_file() else path / LORA_FILE
    found = [p for p in sorted(path.glob("*")) if p.suffix.lower() == ".safetensors" and _is_lora(p)]
    if len(found) > 1:
        raise ValueError(f"{path} has {len(found)} LoRAs, {', '.join(p.name for p in found)}: give the file itself")
    return found[0] if found else None


def load_lora(pipeline: DiffusionPipeline, file: Path) -> None:
    """Load a LoRA into a pipeline; ValueError if it does not fit, or if a part of it would be dropped."""
    if any("dora_scale" in name for name in _tensor_names(file)):
        raise ValueError(
            f"{file} is a DoRA, whose `dora_scale` diffusers would drop: merge it into its base where it was trained"
        )
    try:
        with as_safetensors(file) as path:
            given = {"weight_name": path.name, "unet_config": pipeline.unet.config}
            tensors = pipeline.lora_state_dict(path.parent, **given)[0]
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the LoRA {file} does not fit the base: give one of the kind that it was trained on ({first_line(error)})"
        ) from error
    given = sum(name.startswith("unet.") for name in tensors)
    config = getattr(pipeline.unet, "peft_config", {})
    loaded = sum(len(get_peft_model_state_dict(pipeline.unet, adapter_name=name)) for name in config)
    if loaded != given or not given:
        raise ValueError(f"the LoRA {file} does not fit the base: of its {given} tensors for the U-Net {loaded} do")


def _is_lora(file: Path) -> bool:
    return any("lora_" in name or ".lora." in name for name in _tensor_names(file))


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {first_line(error)}") from error


def _run_under_autocast(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Let a U-Net of mixed dtypes run in `dtype` and return float32, as accelerate's `prepare` does."""
    forward = unet.forward

    def forward_under_autocast(sample: Tensor, *args, **kwargs):
        with torch.autocast(sample.device.type, dtype):
            return forward(sample.to(dtype), *args, **kwargs)

    unet.forward = convert_outputs_to_fp32(forward_under_autocast)


def _one_per_sample(generator, count: int) -> list[torch.Generator]:
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"`generator` has {len(generator)} generators for {count} samples: give one for each")
        return generator
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return [generator] * count
