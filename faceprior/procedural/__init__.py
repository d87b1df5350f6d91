"""
Portraits drawn from a seed, with everything known about them: landmarks, masks, tags.

    drawing = draw_portrait(seed)           # .image, .landmarks, .box, .face_mask, .region_masks, .tags, .caption()
    scene = draw_scene(seed)                # .image, .faces (drawings), .tags, .caption()
    draw_folder("photos", range(48))        # a PNG and its caption per seed; draw_scenes does the same with scenes

    python -m faceprior.procedural --sheet portraits.png --seeds 0:48

A person is sampled (`people`), built as a solid (`anatomy`, `hair`, `headwear`, `wardrobe`), traced (`tracing`),
coloured (`complexion`) and lit before a background (`rendering`, `backdrop`); `portraits` and `scenes` put that
together. No data, no network, no global state: a seed gives the same bytes on every call, and the same person at every
size.
"""

from faceprior.procedural.flaws import FLAWS, Spoil
from faceprior.procedural.folders import draw_folder, draw_scenes, save_captioned
from faceprior.procedural.portraits import Drawing, draw_portrait
from faceprior.procedural.scenes import Scene, draw_scene

__all__ = [
    "FLAWS",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "VALIDATION_SEEDS",
    "Drawing",
    "Scene",
    "Spoil",
    "draw_folder",
    "draw_portrait",
    "draw_scene",
    "draw_scenes",
    "save_captioned",
]

# The first seeds of the training, validation and test portraits, which must not be mixed.
TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS = 0, 10_000, 20_000
