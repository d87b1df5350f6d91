"""The DINO distance of guidance tuning: features of the decoded faces (Face Score, Eq. 7)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from faceprior.detect import face_square
from faceprior.diffusion import decode_checkpointed, decode_latents
from faceprior.features import FeatureNetwork


def dino_distance(vae: AutoencoderKL, network: FeatureNetwork) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the second distance of Face Score's Eq. 7, between a vision transformer's features of the decoded faces.

    The distance takes two latents (B, C, h, w) and the mask (B, 1, h, w), decodes with the frozen `vae` and returns
    1 - cos of the network's [CLS] features of the faces, averaged over the batch; gradients reach the prediction under
    the mask only.

    What the paper leaves open: Eq. 7 masks the latents, the text decodes "the latent codes" themselves. Zeros around a
    face are no image of the VAE's, and in the whole frame at the network's size a small face is a patch or two. So the
    mask is applied by giving both sides the target's surroundings, and the features are those of the square around the
    face, 1.5 times as large, as `face_square` cuts it. The paper names DINO but neither the model nor the features:
    DINO is trained on [CLS], and its features are compared by their cosine.
    """
    network.requires_grad_(False).eval()

    def features(pixel_values: Tensor, mask: Tensor) -> Tensor:
        size = (network.image_size, network.image_size)
        crops = [
            F.interpolate(image[None, :, y0:y1, x0:x1], size=size, mode="bilinear", antialias=True)
            for image, (x0, y0, x1, y1) in zip(pixel_values.float(), _squares(mask, pixel_values.shape), strict=True)
        ]
        return network.features(torch.cat(crops))  # (B, D)

    def distance(target: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        network.to(prediction.device)
        vae.to(prediction.device)
        with torch.no_grad():
            good = features(decode_latents(vae, target), mask)
        bad = features(decode_checkpointed(vae, mask * prediction + (1 - mask) * target), mask)
        return (1 - F.cosine_similarity(good, bad, dim=1)).mean()

    return distance


def _squares(mask: Tensor, shape: torch.Size) -> list[tuple[int, int, int, int]]:
    """Return the square (xyxy) around the face of each mask (B, 1, h, w), in pixels of images (B, 3, H, W).

    An empty mask gives the whole image, whose two sides are equal then.
    """
    height, width = shape[-2:]
    squares = []
    for cells in mask[:, 0] > 0:
        rows, columns = (cells.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
        if not rows:
            squares.append((0, 0, width, height))
            continue
        scale_y, scale_x = height / cells.shape[0], width / cells.shape[1]
        box = (columns[0] * scale_x, rows[0] * scale_y, (columns[-1] + 1) * scale_x, (rows[-1] + 1) * scale_y)
        squares.append(face_square((width, height), box, 0))
    return squares
