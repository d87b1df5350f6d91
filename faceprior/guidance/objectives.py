"""`Objectives`: the losses that a base is tuned with, Face Score's guidance loss (arXiv 2406.17100, 5) and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from faceprior.cache import CachedDataset, cache_dataset, cached_prompts
from faceprior.diffusion import (
    PromptEmbeddings,
    add_noise,
    downsample_mask,
    encode_latents,
    encode_prompts,
    make_noise_scheduler,
    noise_like,
    pred_original_sample,
    predict,
    timesteps_below,
    training_target,
)
from faceprior.guidance.tuned import TunedPipeline
from faceprior.losses import dpo_loss, guidance_loss, masked_l2, noise_loss, reward_loss, squared_error
from faceprior.models import device_of, to_device
from faceprior.reward_tuning import FaceReward
from faceprior.training import drop_prompts, sample_timesteps

# Objective -> the losses that are added.
OBJECTIVES = {
    "guidance": ("guidance",),
    "denoising": ("denoising",),
    "dpo": ("dpo",),
    "reward": ("reward",),
    "guidance_reward": ("guidance", "reward"),
}


class Objectives(TunedPipeline):
    """A tuned pipeline with its losses.

    t_end: timesteps are drawn from the first fraction t_end of the schedule, (0, 1], the paper's is 0.5; see
    `sample_timesteps`; prompt_drop: fraction of the samples whose prompt is dropped, [0, 1], the paper's is 0.2;
    distance: of the predictions under the mask, `masked_l2` by default; dpo_beta: of `dpo_loss`; reward: of
    `reward_loss`. The other arguments: see `TunedPipeline`.

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
        if not 0 < t_end <= 1:
            raise ValueError(f"`t_end` has to be in (0, 1] but is {t_end}")
        if not 0 <= prompt_drop <= 1:
            raise ValueError(f"`prompt_drop` has to be in [0, 1] but is {prompt_drop}")
        if not dpo_beta > 0:
            raise ValueError(f"`dpo_beta` has to be above 0 but is {dpo_beta}")
        super().__init__(pipeline, train, rank, alpha, lora_targets, lora_variant, seed)
        self.t_end, self.prompt_drop, self.distance = t_end, prompt_drop, distance
        self.dpo_beta, self.reward, self.measures = dpo_beta, reward, {}
        self.noise_scheduler = make_noise_scheduler(pipeline)
        pipeline.vae.enable_slicing()  # image by image: one of 1024 pixels takes 2.5 GB in the encoder

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
        values = {name: losses[name](batch, generator, denoiser) for name in losses_of(objective)}
        if len(values) > 1:
            self.measures |= {f"{name}_loss": value for name, value in values.items()}
        return sum(values.values())

    def _reward(self) -> FaceReward:
        if self.reward is None:
            raise ValueError("the tuner has no `reward`: give `reward=FaceReward(FaceScorer.from_pretrained(...))`")
        return self.reward


def losses_of(objective: str) -> tuple[str, ...]:
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
