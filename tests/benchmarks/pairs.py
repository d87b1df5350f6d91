"""
Faces per second: stage 1's inpainting beside the naive way, one call of diffusers' inpainting pipeline per face.

    python tests/benchmarks/pairs.py                                    # the tiny base on a CPU
    python tests/benchmarks/pairs.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 --resolution 512 --dtype float16

Both get the same faces, strengths, prompts, steps and guidance, and are run in turns; the stage's way is batches of
one strength with each prompt encoded once. Aims: no slower on a CPU, 3 times as fast on a GPU.
"""

import argparse
import time

import numpy as np
import torch
from diffusers import AutoPipelineForInpainting, DDIMScheduler
from PIL import Image

from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.detect import box_mask
from faceprior.inpaint import STRENGTHS, FaceInpainter
from faceprior.models import quiet_libraries, resolve_device
from faceprior.procedural import draw_portrait
from faceprior.streams import in_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="diffusers folder, .safetensors file, hub id, or tiny")
    parser.add_argument("--resolution", type=int, default=128, help="pixels, sides of the images")
    parser.add_argument("--num_faces", type=int, default=16, help="faces of a round, equally many for each strength")
    parser.add_argument("--batch_size", type=int, default=8, help="faces that the stage inpaints at once")
    parser.add_argument("--rounds", type=int, default=3, help="times that both are run; the medians count")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    quiet_libraries()
    device = resolve_device(options.device)
    base = tiny.resolve(options.base, "sd15")
    faces = make_faces(options.num_faces, options.resolution)
    # the VAE in the networks' dtype for the naive way, as diffusers loads it; the stage keeps it in float32
    naive = AutoPipelineForInpainting.from_pipe(load_pipeline(base).to(device, getattr(torch, options.dtype)))
    naive.scheduler = DDIMScheduler.from_config(naive.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    naive.set_progress_bar_config(disable=True)
    pipeline = load_pipeline(base, getattr(torch, options.dtype)).to(device)

    ways = {"one call per face": [], "stage 1": []}
    one_by_one(naive, faces[:1], options)  # warm up
    in_batches(pipeline, faces[: options.batch_size], options)
    for _ in range(options.rounds):
        for name, way, model in zip(ways, (one_by_one, in_batches), (naive, pipeline), strict=True):
            ways[name].append(len(faces) / seconds(way, model, faces, options))
    medians = {name: float(np.median(rates)) for name, rates in ways.items()}
    for name, rates in ways.items():
        print(f"{name}: {medians[name]:.2f} faces/s ({min(rates):.2f} to {max(rates):.2f} in {options.rounds} rounds)")
    print(f"ratio: {medians['stage 1'] / medians['one call per face']:.2f} on {device}, {options.dtype}")


def make_faces(count: int, resolution: int) -> list[tuple[Image.Image, Image.Image, float, str, int]]:
    """Return (image, mask, strength, prompt, seed); the strengths take turns, as faces in photographs do."""
    drawings = [draw_portrait(seed, resolution) for seed in range(count)]
    return [
        (
            Image.fromarray(drawing.image),
            box_mask((resolution, resolution), drawing.box),
            STRENGTHS[seed % len(STRENGTHS)],
            "A face.",
            seed,
        )
        for seed, drawing in enumerate(drawings)
    ]


def seconds(way, model, faces: list, options: argparse.Namespace) -> float:
    start = time.perf_counter()
    way(model, faces, options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_by_one(pipeline, faces: list, options: argparse.Namespace) -> list[Image.Image]:
    return [
        pipeline(
            prompt=prompt,
            image=image,
            mask_image=mask,
            height=image.height,
            width=image.width,
            strength=strength,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for image, mask, strength, prompt, seed in faces
    ]


def in_batches(pipeline, faces: list, options: argparse.Namespace) -> list[Image.Image]:
    inpainter = FaceInpainter(pipeline, options.steps, options.guidance_scale)  # its prompts are not encoded yet
    results = []
    for batch in in_groups(faces, lambda face: face[2], lambda _: options.batch_size):
        images, masks, strengths, prompts, seeds = (list(column) for column in zip(*batch, strict=True))
        results += inpainter(images, masks, strengths[0], prompts, seeds)
    return results


if __name__ == "__main__":
    main()
