"""`GuidanceTuner`: teach a Stable Diffusion checkpoint to generate better faces from (good, bad) pairs (Face Score, 5).

tuner = GuidanceTuner.from_pretrained("my_model.safetensors", train="lora")
tuner.fit("data/pairs", steps=500)
tuner.save_pretrained("checkpoints/guided")     # a LoRA that any diffusers pipeline loads
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from faceprior.bases import describe_base, load_pipeline, require_base, save_single_file
from faceprior.cache import CachedDataset, cache_dataset, cached_prompts
from faceprior.config import advise_on_memory
from faceprior.diffusion import (
    PromptEmbeddings,
    add_noise,
    denoiser_of,
    downsample_mask,
    encode_latents,
    encode_prompts,
    make_noise_scheduler,
    noise_like,
    pred_original_sample,
    predict,
    report_long_prompts,
    require_side,
    timesteps_below,
    training_target,
)
from faceprior.lora import (
    LORA_FILE,
    Lora,
    adapters_of,
    add_lora,
    extract_lora,
    find_lora,
    load_lora,
    save_lora,
    trained_lora,
)
from faceprior.losses import dpo_loss, guidance_loss, masked_l2, noise_loss, reward_loss, squared_error
from faceprior.models import (
    device_of,
    load_part,
    looks_like_path,
    precision_of,
    quantization_of,
    require_trainable,
    to_device,
)
from faceprior.pairs import PairDataset, gather_pairs, prompts_by_size
from faceprior.reward_tuning import FaceReward
from faceprior.training import TrainingRun, drop_prompts, make_accelerator, make_optimizer, sample_timesteps, seeded
from faceprior.validation import Validation, Verdict

logger = logging.getLogger(__name__)
TRAIN = ("self_attention", "lora", "full")
# Objective -> the losses that are added.
OBJECTIVES = {
    "guidance": ("guidance",),
    "denoising": ("denoising",),
    "dpo": ("dpo",),
    "reward": ("reward",),
    "guidance_reward": ("guidance", "reward"),
}


class GuidanceTuner:
    """A base model, the part of its network that is trained, and the guidance loss.

    pipeline: a Stable Diffusion 1, 2, 3, SDXL or FLUX.1 pipeline; train: the U-Net's `self_attention` layers (the
    paper's choice), a `lora`, or the `full` U-Net (the paper's ablation), of the transformers of Stable Diffusion 3 and
    FLUX.1 a `lora` only; rank, alpha (rank by default), lora_targets, lora_variant: of the LoRA (see `lora.add_lora`),
    ignored without one; t_end: timesteps are drawn from the first fraction t_end of the schedule, (0, 1], the paper's
    is 0.5; see `sample_timesteps`; prompt_drop: fraction of the samples whose prompt is dropped, [0, 1], the paper's is
    0.2; distance: of the predictions under the mask, `masked_l2` by default; dpo_beta: of `dpo_loss`; reward: of
    `reward_loss`; seed: of the LoRA's first weights.

    The original model, which predicts the targets, is the same network with its LoRA off, or with its original weights
    in place of the trained ones. So a second U-Net takes the memory of the trained part only, and none with a LoRA.

    The trained weights are float32. With a base in half precision every call of the U-Net, also by the pipeline, runs
    under autocast and returns float32.

    `loss` is Algorithm 1 on the parts `encode`, `sample_timesteps`, `encode_prompts`, `original` and `predict_x0`;
    stage 4 calls the same parts in its loop. Other objectives are methods like it: `denoising_loss`, `dpo_loss` and
    `reward_loss`; `objective_loss` takes any of OBJECTIVES by name. `measures`: what the last loss says beside its
    value, for the log.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        train: Literal["self_attention", "lora", "full"] = "self_attention",
        rank: int = 16,
        alpha: int | None = None,
        lora_targets: str | Sequence[str] = "self_attention",
        lora_variant: Literal["plain", "rslora", "dora"] = "plain",
        t_end: float = 0.5,
        prompt_drop: float = 0.2,
        distance: Callable[[Tensor, Tensor, Tensor], Tensor] = masked_l2,
        dpo_beta: float = 2000.0,
        reward: FaceReward | None = None,
        seed: int = 0,
    ):
        if train not in TRAIN:
            raise ValueError(f"`train` has to be one of {', '.join(TRAIN)} but is {train!r}")
        if not 0 < t_end <= 1:
            raise ValueError(f"`t_end` has to be in (0, 1] but is {t_end}")
        if not 0 <= prompt_drop <= 1:
            raise ValueError(f"`prompt_drop` has to be in [0, 1] but is {prompt_drop}")
        if not dpo_beta > 0:
            raise ValueError(f"`dpo_beta` has to be above 0 but is {dpo_beta}")
        require_base(pipeline, "tune", train=train)
        require_trainable(train, quantization_of(denoiser_of(pipeline)))
        self._pipeline, self.train = pipeline, train
        self.t_end, self.prompt_drop, self.distance = t_end, prompt_drop, distance
        self.dpo_beta, self.reward, self.measures = dpo_beta, reward, {}
        self.noise_scheduler = make_noise_scheduler(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()  # built by hand it may train: T5 has dropout
        pipeline.vae.enable_slicing()  # image by image: one of 1024 pixels takes 2.5 GB in the encoder
        if self.denoiser.dtype != torch.float32:
            _run_under_autocast(self.denoiser, self.denoiser.dtype)
        self.verdict: Verdict | None = None
        self._original: dict[str, Tensor] = {}
        self._adapters: list = []  # found once: to search the network for them would take a tenth of a small step
        with seeded(seed, "lora"):
            self._select_trained(rank, rank if alpha is None else alpha, lora_targets, lora_variant)

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        dtype: torch.dtype = torch.float32,
        vae: str | None = None,
        prediction_type: str = "auto",
        quantization: str = "none",
        weights: bool = True,
        **options,
    ):
        """Load `base` (diffusers folder, single `.safetensors` file or hub id); `options` are the constructor's.

        quantization: `none`, `8bit` or `nf4`: how the frozen network and text encoders are held (`models.quantize`);
        only a LoRA can be trained beside them. weights: False builds the networks from their configs alone, to plan
        with.
        """
        train = options.get("train", TRAIN[0])
        require_trainable(train, quantization)
        if weights:
            describe_base(base, vae, prediction_type).require("tune", train)
        return cls(load_pipeline(base, dtype, vae, prediction_type, quantization, weights), **options)

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained: the pipeline's U-Net or transformer."""
        return denoiser_of(self._pipeline)

    @property
    def resolution(self) -> int | None:
        """The base's native image size in pixels; None if its U-Net's config does not say."""
        size = self.denoiser.config.get("sample_size", getattr(self._pipeline, "default_sample_size", None))
        return size * self._pipeline.vae_scale_factor if isinstance(size, int) else None

    def to(self, device: torch.device | str, encoders: bool = True) -> GuidanceTuner:
        """Move the networks; `encoders`: also the VAE and the text encoders, else to the CPU.

        Batches of `cached` need none of them. `pipeline`, and what decodes latents, bring back what they use.
        """
        for part in self._pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to(device if encoders or part is self.denoiser else "cpu")
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

    def encode_good(self, batch: dict[str, Any]) -> Tensor:
        """Return the good side's latents E(x_g), (B, C, h, w), of pixels or `cached`."""
        return batch["good_latents"] if "good_latents" in batch else self.encode(batch["good"])

    def encode_pairs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return both sides' latents E(x_g) and E(x_b), (B, C, h, w) each, and the mask on their grid, (B, 1, h, w).

        batch: good, bad (B, 3, H, W) and mask (B, 1, H, W), or what stands for them in the batches of `cached`.
        """
        if "good_latents" in batch:
            return batch["good_latents"], batch["bad_latents"], batch["latent_mask"]
        good, bad = self.encode(batch["good"]), self.encode(batch["bad"])  # one by one, for half of the memory
        return good, bad, downsample_mask(batch["mask"].to(good.device), good.shape[-2:])

    def sample_timesteps(self, generators: list[torch.Generator], t_end: float = 1.0) -> Tensor:
        """Draw one timestep per generator from the first fraction t_end of the schedule -> (B,), int64 or float.

        Algorithm 1 draws from [0, 0.5 T), section 5 writes [1, 0.5 T]: the same for steps that are counted from 0. For
        a flow matching base t_end means the same level of noise (see `timesteps_below`).
        """
        timesteps = timesteps_below(self.noise_scheduler, t_end)
        drawn = timesteps[sample_timesteps(generators, 0, len(timesteps))]
        return to_device(drawn, device_of(self.denoiser))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents z_t, by the base's own schedule: (B, C, h, w)."""
        return add_noise(self.noise_scheduler, latents, noise, timesteps)

    def encode_prompts(
        self, batch: dict[str, Any], generators: list[torch.Generator], prompt_drop: float | None = None
    ) -> PromptEmbeddings:
        """Encode the batch's B prompts, of which a fraction is replaced by the empty one, the tuner's by default."""
        fraction = self.prompt_drop if prompt_drop is None else prompt_drop
        prompts = drop_prompts(batch["prompt"], fraction, generators)
        return cached_prompts(batch, prompts) if "prompt_embeds" in batch else encode_prompts(self._pipeline, prompts)

    def cached(
        self, dataset, folder: str | Path, accelerator: Accelerator, batch_size: int = 1, num_workers: int = 0
    ) -> CachedDataset:
        """Return `dataset` with latents and prompt embeddings from the cache in `folder`, computed where missing.

        Each sample: good_latents, bad_latents (C, h, w); latent_mask (1, h, w); prompt, and its embeddings (see
        `cache.cache_dataset`). Training with it equals that with `dataset`; `to(device, encoders=False)` then leaves
        the device to the trained network. batch_size: pairs encoded at once; num_workers: processes that load them.
        """
        pipeline, encode = self._pipeline, self.encode_entries
        return cache_dataset(
            dataset, folder, "pairs", pipeline, encode, accelerator, batch_size, num_workers=num_workers
        )

    def encode_entries(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what `cached` keeps of a batch's images."""
        return dict(zip(("good_latents", "bad_latents", "latent_mask"), self.encode_pairs(batch), strict=True))

    def predict_x0(
        self, denoiser: Callable | None, noisy_latents: Tensor, timesteps: Tensor, prompts: PromptEmbeddings
    ) -> Tensor:
        """Predict x_0 from x_t by one pass of `denoiser` (Face Score, Eqs. 4 and 6) -> (B, C, h, w), float32.

        denoiser: the prepared network, or what `original` gives; None: the tuner's own.
        """
        model_pred = predict(self._pipeline, noisy_latents, timesteps, prompts, denoiser)
        return pred_original_sample(self.noise_scheduler, model_pred, timesteps, noisy_latents)

    @contextmanager
    def original(self) -> Iterator[Callable]:
        """Give the network with the original weights, to call without gradients."""
        if self.train == "lora":
            with self._adapters_off():
                yield self.denoiser
        else:
            yield lambda *a, **k: torch.func.functional_call(self.denoiser, self._original, a, k, tie_weights=False)

    # ---- objectives

    def loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the guidance loss of a batch (Face Score, Eqs. 6 and 7, Algorithm 1), with gradients.

        batch: good, bad (B, 3, H, W) in [-1, 1]; mask (B, 1, H, W) in {0, 1}; prompt, B texts; or a batch of
        `cached`. generator: draws timesteps, noise and dropped prompts; a list has one per sample. denoiser: the
        prepared network (DDP), by default the tuner's own.
        """
        generators = _one_per_sample(generator, len(batch["prompt"]))
        good, bad, mask = self.encode_pairs(batch)
        timesteps = self.sample_timesteps(generators, self.t_end)
        noise = noise_like(good, generators)  # shared by both sides, as the timesteps are
        noisy_good, noisy_bad = (self.add_noise(z, noise, timesteps) for z in (good, bad))
        prompts = self.encode_prompts(batch, generators)
        with torch.no_grad(), self.original() as original:
            target = self.predict_x0(original, noisy_good, timesteps, prompts)
        prediction = self.predict_x0(denoiser, noisy_bad, timesteps, prompts)
        return guidance_loss(target, prediction, mask, self.distance)

    def denoising_loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the usual noise prediction loss on the good images, whole and at all timesteps; arguments as `loss`.

        Plain fine-tuning, a baseline to compare the guidance loss with; not in the paper.
        """
        generators = _one_per_sample(generator, len(batch["prompt"]))
        latents = self.encode_good(batch)
        timesteps = self.sample_timesteps(generators)
        noise = noise_like(latents, generators)
        noisy_latents = self.add_noise(latents, noise, timesteps)
        prompts = self.encode_prompts(batch, generators)
        model_pred = predict(self._pipeline, noisy_latents, timesteps, prompts, denoiser)
        return noise_loss(model_pred, training_target(self.noise_scheduler, latents, noise, timesteps))

    def dpo_loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return Diffusion-DPO's loss with the good image as the preferred one (arXiv 2311.12908); arguments as `loss`.

        At all timesteps and on whole images: outside of the mask both sides are the same photograph, so that their
        errors cancel. Both sides share timestep and noise, as in the authors' code.
        """
        generators = _one_per_sample(generator, len(batch["prompt"]))
        good, bad, _ = self.encode_pairs(batch)
        timesteps = self.sample_timesteps(generators)
        noise = noise_like(good, generators)
        prompts = self.encode_prompts(batch, generators)

        def errors(network: Callable | None) -> list[Tensor]:
            """Return the squared errors (B,) of a network on both sides."""
            return [
                squared_error(
                    predict(self._pipeline, self.add_noise(side, noise, timesteps), timesteps, prompts, network),
                    training_target(self.noise_scheduler, side, noise, timesteps),
                )
                for side in (good, bad)
            ]

        with torch.no_grad(), self.original() as original:
            reference = errors(original)
        return dpo_loss(*errors(denoiser), *reference, self.dpo_beta)

    def reward_loss(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the weighted, negative Face Score of images drawn from the batch's prompts; arguments as `loss`.

        The gradient flows through the last sampling steps (DRaFT-K, arXiv 2309.17400), see `FaceReward`. An image
        without a face has no reward; `measures` says how many have one.
        """
        generators = _one_per_sample(generator, len(batch["prompt"]))
        rewards = self._reward()(self.draw(batch, generators, denoiser))  # (B,), NaN without a face
        self.measures |= {
            "found": 1 - rewards.isnan().float().mean(),
            "face_score": -reward_loss(rewards.detach()),
        }
        return self.reward.weight * reward_loss(rewards)

    def draw(
        self, batch: dict[str, Any], generators: list[torch.Generator], denoiser: Callable | None = None
    ) -> Tensor:
        """Draw an image from each of the batch's prompts, as large as the pairs, for `reward_loss` -> (B, 3, H, W)."""
        prompts, dropped = (self.encode_prompts(batch, generators, fraction) for fraction in (0.0, 1.0))
        noise = noise_like(self.encode_good(batch), generators)
        return self._reward().sample(self._pipeline, prompts, dropped, noise, generators, denoiser)

    @torch.no_grad()
    def watch_reward(
        self, batch: dict[str, Any], generators: list[torch.Generator], history: list[dict[str, Any]]
    ) -> dict[str, float]:
        """Draw the batch's prompts with the original and the tuned weights, from the same noise, and compare them.

        generators: one per sample, of noise that was not trained on; history: of `FaceReward.compare`, which see.
        """
        twins = [torch.Generator(g.device).set_state(g.get_state()) for g in generators]
        with self.original() as original:
            before = self.draw(batch, generators, original)
        return self._reward().compare(before, self.draw(batch, twins), history)

    def objective_loss(
        self,
        objective: str,
        batch: dict[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Return the loss of an objective, one of OBJECTIVES; other arguments as `loss`."""
        losses = {
            "guidance": self.loss,
            "denoising": self.denoising_loss,
            "dpo": self.dpo_loss,
            "reward": self.reward_loss,
        }
        self.measures = {}
        values = {name: losses[name](batch, generator, denoiser) for name in _parts(objective)}
        if len(values) > 1:
            self.measures |= {f"{name}_loss": value for name, value in values.items()}
        return sum(values.values())

    def _reward(self) -> FaceReward:
        if self.reward is None:
            raise ValueError("the tuner has no `reward`: give `reward=FaceReward(FaceScorer.from_pretrained(...))`")
        return self.reward

    # ---- training, sampling and files

    def fit(
        self,
        pairs,
        steps: int = 500,
        objective: Literal["guidance", "denoising", "dpo", "reward", "guidance_reward"] = "guidance",
        learning_rate: float = 1e-5,
        batch_size: int = 2,
        accumulation: int = 1,
        optimizer: str = "adamw",
        mixed_precision: str | None = None,
        device: str = "auto",
        seed: int = 0,
        output: str | Path | None = None,
        resolution: int | None = None,
        gradient_checkpointing: bool = False,
        cache: str | Path | None = None,
        reward_watch: int = 10,
        save_every: int = 100,
        ema_decay: float = 0.0,
        ema_device: str = "auto",
        keep_best: bool = False,
        patience: int = 0,
        num_samples: int = 16,
        **validation,
    ) -> GuidanceTuner:
        """Train on `pairs`: a folder that stage 1 made, several separated by commas, or a dataset.

        objective: one of OBJECTIVES; those with `reward` need the constructor's `reward`, and every `reward_watch`
        steps the log has what `watch_reward` measures.
        resolution: side in pixels of the images of a folder, the base's own by default. mixed_precision: `no`, `fp16`
        or `bf16`, by default what the base's dtype says. optimizer: `adamw`, `adamw8bit` or `paged_adamw8bit`.
        gradient_checkpointing: activations are computed again in the backward pass, for less memory. Where the memory
        does not suffice, MemoryError names the options that need less.
        A dataset has the samples that `loss` takes in batches. With `output`, a folder for the log and checkpoints, the
        training stops and resumes like stage 4. With `cache`, a folder, latents and prompt embeddings are computed once
        (see `cached`); the VAE and the text encoders are on the CPU afterwards, until `pipeline` or `to` move them.

        save_every, ema_decay, ema_device, keep_best, patience: as in `TrainingRun`; the tuner ends with the weights
        that they choose. validation: options of `Validation`, such as `validate_every` and `scorer`, a FaceScorer;
        `prompts` are by default those of a folder's pairs, the largest face's first. With a scorer, `verdict` says
        afterwards whether the faces of num_samples new images are better than without the tuning.
        """
        rewarded = "reward" in _parts(objective)
        if rewarded:
            self._reward()
        if isinstance(pairs, str | Path):
            resolution = resolution or self.resolution
            if resolution is None:
                raise ValueError("the config of the base's U-Net has no `sample_size`: give `resolution`, in pixels")
            require_side(self._pipeline, resolution)
            usable, problems = gather_pairs(pairs)
            for place, reason in problems:
                logger.warning("%s is skipped: %s", place, reason)
            report_long_prompts(self._pipeline, (pair.prompt for pair in usable))
            pairs = PairDataset(usable, resolution)
            if validation:
                validation = {"prompts": prompts_by_size(usable), **validation}
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
        mixed_precision = mixed_precision or precision_of(self.denoiser.dtype)
        settings = {"batch_size": batch_size, "accumulation": accumulation, "mixed_precision": mixed_precision}
        settings |= {"gradient_checkpointing": gradient_checkpointing, "optimizer": optimizer, "output": output}
        settings |= {"train": self.train, "quantization": quantization_of(self.denoiser)}
        accelerator = make_accelerator(device, mixed_precision, accumulation)
        settings |= {"cache": str(cache or "")}
        keeping = {"ema_decay": ema_decay, "ema_device": ema_device, "keep_best": keep_best, "patience": patience}
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        with advise_on_memory({**settings, **({"resolution": resolution} if resolution else {})}):
            if cache is not None:
                pairs = self.cached(pairs, cache, accelerator, batch_size)
            self.to(accelerator.device, encoders=cache is None)
            adam = make_optimizer(self.trainable_parameters(), optimizer, learning_rate)
            unet, adam = accelerator.prepare(self.denoiser, adam)
            run = TrainingRun(output, steps, accelerator, {"unet": unet}, {"unet": adam}, save_every, **keeping)
            images = None
            if validation or keep_best or patience:
                images = Validation(run, self, **{"resolution": resolution or self.resolution, **validation})
                images.start()
            unet.train()
            for batch in run.batches(pairs, batch_size, seed):
                with accelerator.accumulate(unet):
                    loss = self.objective_loss(objective, batch, run.generators(batch), unet)
                    run.check(loss, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.trainable_parameters(), 1.0)
                    adam.step()
                    adam.zero_grad()
                run.log(loss=loss, **self.measures)
                if rewarded and run.every(reward_watch):
                    history = run.state.setdefault("reward_watch", [])
                    run.log(**self.watch_reward(batch, run.generators(batch, "watch"), history))
                if images:
                    images.step()
            run.use_final_weights()
            if images and images.scorer:
                self.verdict = images.judge(num_samples)
                logger.info("Face Score of %d new images: %s", num_samples, self.verdict)
        return self

    def pipeline(self) -> DiffusionPipeline:
        """Return the pipeline with the tuned weights, for sampling."""
        self.denoiser.eval()
        self.to(self.denoiser.device)
        return self._pipeline

    @contextmanager
    def sampling(self) -> Iterator[DiffusionPipeline]:
        """Give the pipeline with the tuned weights; its parts are afterwards as before: their devices, the mode."""
        with self._parts_in_place():
            yield self.pipeline()

    @contextmanager
    def untuned(self) -> Iterator[DiffusionPipeline]:
        """Give the pipeline with the original weights, to sample images as before the tuning; else as `sampling`."""
        if self.train == "lora":
            with self._adapters_off(), self._parts_in_place():
                yield self.pipeline()
            return
        tuned = {name: parameter.detach().clone() for name, parameter in self._trained()}
        try:
            self._copy(self._original)
            with self._parts_in_place():
                yield self.pipeline()
        finally:
            self._copy(tuned)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a LoRA file for `load_lora_weights` (see `save_lora`); else a whole pipeline folder."""
        if self.train == "lora":
            self.save_lora(folder)
        else:
            self._pipeline.save_pretrained(folder)

    def save_lora(
        self, folder: str | Path, lora_format: Literal["diffusers", "kohya"] = "diffusers", rank: int | None = None
    ) -> Lora:
        """Write a LoRA file, also of a tuner that trained the self-attention itself; return what was written.

        lora_format: see `lora.save_lora`. rank: of the LoRA that is extracted from trained self-attention, whose loss
        is in `.info` and in the file's metadata (see `lora.extract_lora`); a trained LoRA has its own.

        Raises ValueError for a full U-Net, and for what the format loses.
        """
        if self.train == "full":
            raise ValueError("`train` is full, and a LoRA of a whole U-Net would lose most of it: save the pipeline")
        if self.train == "lora" and rank is not None:
            raise ValueError("`rank` is of a LoRA that is extracted, and this one was trained: leave `rank` out")
        if self.train == "self_attention" and rank is None:
            raise ValueError("`train` is self_attention, of which a LoRA is extracted: give its `rank`")
        if rank is None:
            lora = trained_lora(self.denoiser)
        else:
            lora = extract_lora(self._original, dict(self._trained()), rank)
        save_lora(self._pipeline, lora, folder, lora_format)
        return lora

    def save_single_file(self, file: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write a whole checkpoint for the web UIs (see `bases.save_single_file`); ValueError with a LoRA."""
        save_single_file(self._pipeline, file, dtype)

    def _select_trained(self, rank: int, alpha: int, lora_targets: str | Sequence[str], lora_variant: str) -> None:
        if self.train == "lora":
            add_lora(self._pipeline, rank, alpha, lora_targets, lora_variant)
            self._adapters = adapters_of(self.denoiser)
        else:
            self._original = {name: parameter.detach().clone() for name, parameter in self._trained()}
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)
        if not self.trainable_parameters():
            raise ValueError("the base's U-Net has no self-attention layers (attn1) to train")
        cast_training_params(self.denoiser, torch.float32)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        # by name, not by requires_grad: peft turns the flag off while an adapter is disabled
        part = {"self_attention": ".attn1.", "lora": "lora_", "full": ""}[self.train]
        return [(name, parameter) for name, parameter in self.denoiser.named_parameters() if part in name]

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        for adapter in self._adapters:
            adapter.enable_adapters(False)
        try:
            yield
        finally:
            for adapter in self._adapters:
                adapter.enable_adapters(True)

    @contextmanager
    def _parts_in_place(self) -> Iterator[None]:
        parts = [part for part in self._pipeline.components.values() if isinstance(part, nn.Module)]
        places, training = [part.device for part in parts], self.denoiser.training
        try:
            yield
        finally:
            self.denoiser.train(training)
            for part, place in zip(parts, places, strict=True):
                if part.device != place:
                    part.to(place)

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._trained():
            parameter.copy_(tensors[name])


def load_tuned(
    folder: str | Path,
    base: str,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    prediction_type: str = "auto",
) -> DiffusionPipeline:
    """Load what `save_pretrained` wrote: a pipeline folder, or `base` with the LoRA in `folder`, by whatever file name.

    folder: or `base` with another U-Net, from a folder or a hub id with that U-Net alone, in unet/ or at its top, such
    as `mhdang/dpo-sd1.5-text2image-v1` (Diffusion-DPO's, the row of Face Score's Table 5); vae, prediction_type: of
    `base`, as in `load_pipeline`.
    """
    path = Path(folder).expanduser()
    if path.exists() or looks_like_path(folder):
        if not (path / LORA_FILE).is_file() and (path / "model_index.json").is_file():
            return load_pipeline(str(path), dtype)
        file = find_lora(path)
        unets = [place for place in UNET_PLACES if (path / (place or "") / "config.json").is_file()]
        if file is None and not unets:
            raise FileNotFoundError(f"no tuned model in {path}: `python stages/04_guidance_tune.py` makes one")
    else:
        file, unets = None, UNET_PLACES
    pipeline = load_pipeline(base, dtype, vae, prediction_type)
    if file is not None:
        load_lora(pipeline, file)
    else:
        _replace_unet(pipeline, folder, unets, dtype)
    return pipeline


UNET_PLACES = ("unet", None)  # sub-folders where a published U-Net lies


def _replace_unet(pipeline: DiffusionPipeline, name: str | Path, places: Sequence[str | None], dtype) -> None:
    """Replace a pipeline's U-Net by that of a folder or hub id; ValueError unless it has the same tensors."""
    for place in places:
        try:
            unet = load_part(UNet2DConditionModel, name, "U-Net", dtype, subfolder=place)
            break
        except FileNotFoundError:
            if place == places[-1]:
                raise
    own, new = ({key: tuple(p.shape) for key, p in m.named_parameters()} for m in (denoiser_of(pipeline), unet))
    if differing := sorted(key for key in own.keys() | new.keys() if own.get(key) != new.get(key)):
        raise ValueError(
            f"the U-Net {name} does not fit the base: {len(differing)} tensors differ in name or shape, such as "
            f"{differing[0]}. Give the base that it was trained from"
        )
    pipeline.register_modules(unet=unet)


def _run_under_autocast(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Let a network of mixed dtypes run in `dtype` and return float32, as accelerate's `prepare` does."""
    forward = denoiser.forward

    def forward_under_autocast(*args, **kwargs):
        with torch.autocast(device_of(denoiser).type, dtype):
            return forward(*args, **kwargs)

    denoiser.forward = convert_outputs_to_fp32(forward_under_autocast)


def _parts(objective: str) -> tuple[str, ...]:
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` has to be one of {', '.join(OBJECTIVES)} but is {objective!r}")
    return OBJECTIVES[objective]


def _one_per_sample(generator, count: int) -> list[torch.Generator]:
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"`generator` has {len(generator)} generators for {count} samples: give one for each")
        return generator
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return [generator] * count
