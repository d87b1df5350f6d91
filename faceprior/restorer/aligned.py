"""An image that is one aligned face as a whole, as datasets of faces hold them: nothing is detected or pasted back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from faceprior.color import COLOR_FIXES
from faceprior.restorer.sampling import make_generator, to_condition
from faceprior.restorer.settings import require_whole

if TYPE_CHECKING:
    from faceprior.restorer.restorer import AuthFaceRestorer

OFFICIAL_SIZE = 512  # pixels


def restore_aligned(
    restorer: AuthFaceRestorer,
    image: Image.Image,
    upscale: int = 1,
    process_size: int | None = None,
    color_fix: str = "wavelet",
    recipe: str | None = None,
    fidelity: float | None = None,
    **sampling: Any,
) -> Image.Image:
    """Restore an image that is one aligned face.

    upscale: whole factor by which the image is enlarged first. process_size: side of the result in pixels; None: 512
    for the official recipe, else the restorer's resolution, at which those faces, which have to be square, are
    restored. The other arguments as in `AuthFaceRestorer.restore_crops`.

    The official recipe is the official code's way from file to file. The image, of any shape, is enlarged, its sides
    are cut to multiples of 8, both with Pillow's default filter, and it is sampled at that size. The result, in 8 bits,
    gets the colours of that image, and is brought by LANCZOS to a square of `process_size`: the official code resizes
    to (process_size, process_size) whatever the shape, as its faces are FFHQ's, which are square; an image that is not
    square is stretched.
    """
    require_whole("upscale", upscale)
    if process_size is not None:
        require_whole("process_size", process_size)
    if recipe != "official" and image.width != image.height:
        raise ValueError(
            f"an aligned face has to be square but is {image.width} x {image.height}: crop it, let it be found in the"
            " image (without `aligned`), or take the official recipe, which samples any shape"
        )
    if upscale > 1:
        image = image.resize((image.width * upscale, image.height * upscale))
    if recipe == "official":
        result = _official(restorer, image, color_fix, fidelity, **sampling)
        process_size = process_size or OFFICIAL_SIZE
    else:
        result = restorer.restore_crops([image], color_fix, 1, recipe, fidelity, **sampling)[0]
    if process_size and result.size != (process_size, process_size):
        result = result.resize((process_size, process_size), Image.LANCZOS)
    return result


def _official(
    restorer: AuthFaceRestorer, image: Image.Image, color_fix: str, fidelity: float | None, **sampling: Any
) -> Image.Image:
    """Return the official code's result at the size of its sampling."""
    if color_fix not in COLOR_FIXES:
        raise ValueError(f"`color_fix` has to be one of {', '.join(COLOR_FIXES)} but is {color_fix!r}")
    settings = restorer.settings.override("official", fidelity, **sampling)
    width, height = (side // 8 * 8 for side in image.size)
    if not width or not height:
        raise ValueError(f"the image has to have 8 pixels on each side but is {image.width} x {image.height}")
    image = image.resize((width, height))

    # ---- sample, and cut to 8 bits
    pixels = restorer.sampler(to_condition([image]), settings, make_generator(settings, 1))
    sampled = restorer.pipeline.image_processor.postprocess(pixels, output_type="pil")[0]

    if color_fix == "none":
        return sampled

    # ---- the colours of the input; the official code cuts to 8 bits where it could round
    fixed = COLOR_FIXES[color_fix](to_condition([sampled]), to_condition([image]))  # (1, 3, H, W)
    return Image.fromarray((fixed.clamp(0, 1) * 255).byte()[0].permute(1, 2, 0).contiguous().numpy())
