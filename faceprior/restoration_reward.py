"""Face Score as a reward of restored faces, beside stage 6's loss (after DiffusionReward, arXiv 2505.17910).

    reward = RestorationReward(FaceReward(scorer), vae, weight=0.01)
    loss = loss + reward(prediction, latents, t)                # z0_hat with gradients, z_0, t in (0, 1)
    reward.measures                                             # of the batch, for the log

As in that paper the score's gradient reaches the restorer through the predicted clean image, beside a term that holds
its structure to the clean one, as a scorer alone is pleased by what is no face of this person. Ours are the scorer,
which stays as it is (there it is trained on), the form of that term, and which samples are rewarded: those at small t,
where z0_hat is a face and not the mean of many. `watch` compares with the clean faces what the scorer does not see.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from faceprior.detect import Face
from faceprior.diffusion import decode_checkpointed, decode_latents
from faceprior.losses import reward_loss
from faceprior.reward_tuning import FaceReward

STRUCTURE_SIDE = 32  # cells on a side that the structure is compared on: 16 pixels each at 512


class RestorationReward:
    """The weighted, negative Face Score of predicted faces, and how far their structure is from the clean ones'.

    reward: scores the faces, of which `weight` counts here; vae: decodes them, on the training's device; t_end: samples
    below it are rewarded, (0, 1]; structure: weight of the structural term beside a score of 1, [0, inf).
    """

    def __init__(self, reward: FaceReward, vae: AutoencoderKL, t_end: float = 0.3, structure: float = 10.0):
        self.reward, self.vae, self.t_end, self.structure = reward, vae, t_end, structure
        self.measures: dict[str, Tensor] = {}

    def __call__(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return weight x (-score + structure x distance), averaged over the rewarded samples; 0 if there are none.

        prediction: z0_hat (B, C, h, w), with gradients, of aligned faces: the whole crop is the face, as stage 7 scores
        it; latents: z_0, the clean ones; t: (B,) in (0, 1), 0 = clean.

        `measures`: rewarded, the fraction of the batch; face_score and structure, their means over the rewarded.
        """
        rewarded = t < self.t_end  # (B,)
        zero = 0 * prediction.float().sum()
        self.measures = {"rewarded": rewarded.float().mean()}
        self.measures |= {"face_score": zero.detach(), "structure": zero.detach()}
        if not rewarded.any():
            return zero
        images = decode_checkpointed(self.vae, prediction[rewarded])  # (R, 3, H, W)
        with torch.no_grad():
            clean = decode_latents(self.vae, latents[rewarded])
        face = Face((0, 0, images.shape[-1], images.shape[-2]), None, 1.0)
        with torch.autocast(images.device.type, enabled=False):
            score = reward_loss(self.reward(images, [face] * len(images)))
            structure = structure_distance(images, clean).mean()
        self.measures |= {"face_score": -score.detach(), "structure": structure.detach()}
        return self.reward.weight * (score + self.structure * structure)

    @torch.no_grad()
    def watch(self, prediction: Tensor, latents: Tensor, history: list[dict[str, Any]]) -> dict[str, float]:
        """Compare predicted faces with the clean ones by measures that the scorer does not see -> numbers for the log.

        prediction, latents: as above, at small t; history: of `FaceReward.compare`, which see: the clean faces are its
        `before`. A restorer that scores above the clean faces, while sharpness, saturation or contrast have left them,
        has found what pleases the scorer.
        """
        clean, restored = (decode_latents(self.vae, z) for z in (latents, prediction))
        return self.reward.compare(clean.float(), restored.float(), history)


def structure_distance(images: Tensor, clean: Tensor) -> Tensor:
    """Mean absolute difference of two images on a coarse grid: where things are, and their colours -> (B,), [0, 2].

    images, clean: (B, 3, H, W) in [-1, 1]. Detail finer than a cell is free, as the score is about it.
    """
    coarse = (F.adaptive_avg_pool2d(side.float(), STRUCTURE_SIDE) for side in (images, clean))
    return torch.sub(*coarse).abs().mean(dim=(1, 2, 3))
