"""Climb the Face Score of a blurred face by its gradient: on the pixels, and on a VAE's latents.

    python examples/gradient_ascent.py

It stops at the clean face's score. Pixels, free to change anywhere, get there by a pattern that only the network sees;
latents decode to images, so what changes looks like a sharper face. On the small embedded models.
"""

import torch
from PIL import Image, ImageFilter

from faceprior import FaceScorer, tiny
from faceprior.bases import load_pipeline
from faceprior.diffusion import decode_latents, encode_latents
from faceprior.images import save_image, to_pil, to_pixel_values
from faceprior.procedural import draw_portrait

drawing = draw_portrait(3, size=128)
blurred = to_pixel_values(Image.fromarray(drawing.image).filter(ImageFilter.GaussianBlur(1.5)))
scorer = FaceScorer.from_pretrained(tiny.resolve("tiny", "scorer")).requires_grad_(False)
vae = load_pipeline(tiny.resolve("tiny", "sd15")).vae.requires_grad_(False)
goal = scorer.score(drawing.image, faces=[drawing.box])[0].score


def ascend(name, variable, decode, learning_rate, steps=30):
    optimizer, seen = torch.optim.Adam([variable.requires_grad_()], learning_rate), []
    while len(seen) < 2 or (len(seen) <= steps and seen[-1][0] < goal):
        image = decode(variable)
        score = scorer(scorer.preprocess(image, boxes=[drawing.box]))[0]  # with its graph, down to `variable`
        seen.append((score.item(), to_pil(image)[0]))
        (variable.grad,) = torch.autograd.grad(-score, variable)
        optimizer.step()
    for when, (value, image) in {"before": seen[0], "after": seen[-1]}.items():
        print(f"{name}, {when}: Face Score {value:.4f} (the clean face: {goal:.4f})")
        save_image(image, f"results/ascent_{name}_{when}.png")


ascend("pixels", blurred.clone(), lambda pixels: pixels.clamp(-1, 1), learning_rate=0.005)
ascend("latents", encode_latents(vae, blurred), lambda latents: decode_latents(vae, latents), learning_rate=0.02)
