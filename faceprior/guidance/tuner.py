"""`GuidanceTuner`: training for notebooks, in one call."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from faceprior.config import advise_on_memory
from faceprior.diffusion import report_long_prompts, require_side
from faceprior.guidance.objectives import Objectives, losses_of
from faceprior.lora import describe_lora
from faceprior.models import precision_of, quantization_of
from faceprior.pairs import PairDataset, gather_pairs, prompts_by_size
from faceprior.training import TrainingRun, describe_samples, make_accelerator, make_optimizer
from faceprior.validation import Validation, Verdict

logger = logging.getLogger(__name__)


class GuidanceTuner(Objectives):
    """A base model, the part of its network that is trained, and the losses on (good, bad) pairs of faces.

    `from_pretrained` loads a base, `fit` trains, `save_pretrained` writes what was trained. The constructor's arguments
    say what is trained (see `TunedPipeline`) and how the losses are computed (see `Objectives`). verdict: of the last
    `fit` with a scorer.
    """

    verdict: Verdict | None = None

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
        training stops and resumes like stage 4; a run that began with other pairs, another base, objective, learning
        rate or seed is not resumed: FileExistsError. With `cache`, a folder, latents and prompt embeddings are computed
        once (see `cached`); the VAE and the text encoders are on the CPU afterwards, until `pipeline` or `to` move
        them.

        save_every, ema_decay, ema_device, keep_best, patience: as in `TrainingRun`; the tuner ends with the weights
        that they choose. validation: options of `Validation`, such as `validate_every` and `scorer`, a FaceScorer;
        `prompts` are by default those of a folder's pairs, the largest face's first. With a scorer, `verdict` says
        afterwards whether the faces of num_samples new images are better than without the tuning.
        """
        rewarded = "reward" in losses_of(objective)
        if rewarded:
            self._reward()
        if isinstance(pairs, str | Path):
            resolution = resolution or self.resolution
            pairs, prompts = self._read_pairs(pairs, resolution)
            if validation or keep_best or patience:
                validation = {"prompts": prompts, **validation}
        inputs = {"pairs": describe_samples(pairs), "base": self.describe_base(), "objective": objective}
        inputs |= {"learning_rate": learning_rate, "seed": seed, "resolution": resolution, "train": self.train}
        inputs |= {name: getattr(self, name) for name in ("t_end", "prompt_drop", "dpo_beta")}
        inputs["lora"] = describe_lora(self.denoiser)
        cache = cache or None  # as in stage 4, whose empty text is no cache
        mixed_precision = mixed_precision or precision_of(self.denoiser.dtype)
        accelerator = make_accelerator(device, mixed_precision, accumulation)
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        averaging = {"ema_decay": ema_decay, "ema_device": ema_device}
        settings = {"train": self.train, "quantization": quantization_of(self.denoiser), "output": output}
        settings |= {"batch_size": batch_size, "accumulation": accumulation, "mixed_precision": mixed_precision}
        settings |= {"gradient_checkpointing": gradient_checkpointing, "optimizer": optimizer, **averaging}
        settings |= {"cache": str(cache or ""), **({"resolution": resolution} if resolution else {})}
        with advise_on_memory(settings):
            # ---- The pairs, the optimizer, the run
            if cache is not None:
                pairs = self.cached(pairs, cache, accelerator, batch_size)
            self.to(accelerator.device, encoders=cache is None)
            trained = self.trainable_parameters()
            denoiser, adam = accelerator.prepare(self.denoiser, make_optimizer(trained, optimizer, learning_rate))
            keeping = {**averaging, "keep_best": keep_best, "patience": patience, "inputs": inputs}
            run = TrainingRun(output, steps, accelerator, {"unet": denoiser}, {"unet": adam}, save_every, **keeping)
            images = None
            if validation or keep_best or patience:
                images = Validation(run, self, **{"resolution": resolution or self.resolution, **validation})
                images.start()

            # ---- The steps
            denoiser.train()
            for batch in run.batches(pairs, batch_size, seed):
                with accelerator.accumulate(denoiser):
                    loss = self.objective_loss(objective, batch, run.generators(batch), denoiser)
                    run.check(loss, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained, 1.0)
                    adam.step()
                    adam.zero_grad()
                run.log(loss=loss, **self.measures)
                if rewarded and run.every(reward_watch):
                    history = run.state.setdefault("reward_watch", [])
                    run.log(**self.watch_reward(batch, run.generators(batch, "watch"), history))
                if images:
                    images.step()

            # ---- The weights to keep, and whether they are better
            run.use_final_weights()
            if images and images.scorer:
                self.verdict = images.judge(num_samples)
                logger.info("Face Score of %d new images: %s", num_samples, self.verdict)
        return self

    def _read_pairs(self, folders: str | Path, resolution: int | None) -> tuple[PairDataset, list[str]]:
        """Read what stage 1 made, and the prompts, the largest face's first; what cannot be read is logged."""
        if resolution is None:
            raise ValueError("the config of the base's U-Net has no `sample_size`: give `resolution`, in pixels")
        require_side(self._pipeline, resolution)
        usable, problems = gather_pairs(folders)
        for place, reason in problems:
            logger.warning("%s is skipped: %s", place, reason)
        report_long_prompts(self._pipeline, (pair.prompt for pair in usable))
        return PairDataset(usable, resolution), prompts_by_size(usable)
