"""Photographs: faces out of them, in batches through the network, and back into them."""

import io
import itertools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image, ImageEnhance, ImageOps
from skimage import data
from small_restorer import small_restorer

from faceprior import tiny
from faceprior.align import align_face, alignment_quad
from faceprior.detect import Face, detect_faces
from faceprior.errors import is_out_of_memory
from faceprior.images import read_source
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.restorer import RestoredImage
from faceprior.restorer.photographs import PhotographOptions, restore_photographs

NAN = float("nan")
FAST = {"num_inference_steps": 2, "keep_sharp": False}  # the drawn faces are sharper than a model of 64 pixels


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def restorer():
    return small_restorer()


@pytest.fixture(scope="module")
def group():
    """A photograph of 200 x 128 pixels with two drawn people, and their faces, largest first."""
    image, faces = Image.new("RGB", (200, 128), "gray"), []
    for seed, size, x in ((4, 128, 0), (5, 64, 132)):
        drawing = draw_portrait(seed, size)
        image.paste(Image.fromarray(drawing.image), (x, 0))
        x0, y0, x1, y1 = drawing.box
        faces.append(Face((x0 + x, y0, x1 + x, y1), drawing.landmarks + [x, 0], 1.0))
    return image, faces


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int))


def inside_of(face, size):
    """(H, W) bool: the pixels whose centres lie in the square that is cut out around a face, or next to it."""
    corner, below, _, right = alignment_quad(face.landmarks)
    y, x = np.mgrid[: size[1], : size[0]]
    offset = np.stack([x, y], axis=2) - corner
    across, down = right - corner, below - corner
    fractions = [(offset @ side) / (side @ side) for side in (across, down)]
    margin = 1.5 / np.hypot(*across)
    return np.all([(f >= -margin) & (f <= 1 + margin) for f in fractions], axis=0)


# --------------------------------------------------------------------------------------- the faces of a photograph


def test_only_the_faces_of_a_photograph_change(restorer, group):
    photograph, faces = group
    result = restorer.restore(photograph, faces=faces, **FAST)
    assert result.image.size == photograph.size and result.image.mode == "RGB"
    inside = [inside_of(face, photograph.size) for face in faces]
    changed = difference(result.image, photograph).max(axis=2) > 0
    assert not (changed & ~inside[0] & ~inside[1]).any()
    for region in inside:
        assert changed[region].mean() > 0.5
    assert [found.face for found in result.faces] == faces
    for found, face in zip(result.faces, faces, strict=True):
        assert found.before.tobytes() == align_face(photograph, face.landmarks, 64).crop.tobytes()
        assert found.after.size == (64, 64) and difference(found.before, found.after).max() > 1


def in_mode(image, mode):
    """The photograph as a grey or toned one: file's mode, or the way that it came to its colours."""
    grey = image.convert("L")
    if mode == "sepia":
        return Image.fromarray((np.asarray(grey)[..., None] / 255 * [255, 232, 195]).astype(np.uint8))
    if mode == "JPEG":
        buffer = io.BytesIO()
        grey.convert("RGB").save(buffer, "JPEG", quality=60)
        return Image.open(buffer)
    if mode == "LA":
        grey.putalpha(200)
    return grey.convert(mode)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "I", "JPEG", "sepia"])
@pytest.mark.parametrize("color_fix", ["wavelet", "none"])
def test_a_grey_or_toned_photograph_stays_so(restorer, group, mode, color_fix):
    """Whatever the network draws, which here is coloured noise."""
    photograph = in_mode(group[0], mode)
    if mode == "I":
        photograph = Image.fromarray(np.asarray(photograph, np.int32) * 257)
    result = restorer.restore(photograph, faces=group[1], color_fix=color_fix, keep_sharp=False, num_inference_steps=1)
    pixels = np.asarray(result.image.convert("RGB")).astype(int)
    assert result.image.mode == ("RGBA" if mode == "LA" else "RGB") and len(result.faces) == 2
    assert difference(pixels, np.asarray(result.source.rgb)).max() > 5
    if mode == "sepia":
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        off = np.maximum(np.abs(green - red * 232 / 255), np.abs(blue - red * 195 / 255))
        assert (off < 2.5).mean() > 0.98  # but where the resampling of the noise overshoots white
        assert (red >= green).all() and (green >= blue).all()
    else:
        assert not np.ptp(pixels, axis=2).any()


def test_a_photograph_in_colours_is_not_toned(restorer, group, monkeypatch):
    """A pale one, too: as if the tone was never looked at."""
    pale = ImageEnhance.Color(group[0]).enhance(0.3)
    found = restorer.restore(pale, faces=group[1], keep_sharp=False, num_inference_steps=1).image
    monkeypatch.setattr("faceprior.restorer.restorer.keep_tone", lambda content, style: content)
    assert (
        restorer.restore(pale, faces=group[1], keep_sharp=False, num_inference_steps=1).image.tobytes()
        == found.tobytes()
    )


def test_transparency_stays(restorer, group):
    photograph, faces = group
    alpha = Image.new("L", photograph.size, 255)
    alpha.paste(0, (0, 0, 20, 128))
    alpha.paste(100, (20, 0, 50, 128))
    cut = photograph.copy()
    cut.putalpha(alpha)
    result = restorer.restore(cut, faces=faces[:1], keep_sharp=False, num_inference_steps=1)
    before, after = np.asarray(cut).astype(int), np.asarray(result.image).astype(int)
    assert result.image.mode == "RGBA" and (after[..., 3] == before[..., 3]).all()
    outside = ~inside_of(faces[0], photograph.size) | (before[..., 3] == 0)
    assert (after[outside] == before[outside]).all() and (after != before).any()


def test_several_faces_do_not_depend_on_the_batch(restorer, group):
    photograph, faces = group
    results = [restorer.restore(photograph, faces=faces, batch_size=size, **FAST) for size in (1, 2)]
    assert difference(results[0].image, results[1].image).max() <= 1


def test_the_larger_face_goes_on_top(restorer, group):
    """A second face of the same place, listed after the first, does not show in the middle of the first."""
    photograph, (face, _) = group
    moved = Face(face.box, face.landmarks + [6, 0], 1.0)
    alone = restorer.restore(photograph, faces=[face], **FAST).image
    both = restorer.restore(photograph, faces=[face, moved], **FAST).image
    middle = align_face(photograph, face.landmarks, 64)
    x, y = (np.linalg.inv(np.vstack([middle.matrix, [0, 0, 1]])) @ [32, 32, 1])[:2].astype(int)
    area = (x - 10, y - 10, x + 10, y + 10)
    assert difference(alone.crop(area), both.crop(area)).max() <= 1
    assert difference(alone, both).max() > 1


def test_a_detected_face(restorer):
    photograph = data.astronaut()
    result = restorer.restore(photograph, detector="mtcnn", keep_sharp=False, num_inference_steps=1)
    (found,) = result.faces
    inside = inside_of(found.face, (512, 512))
    assert (np.asarray(result.image)[~inside] == photograph[~inside]).all()
    assert difference(result.image, photograph)[inside].mean() > 1


def test_a_photograph_without_a_face_comes_back(restorer):
    photograph = Image.fromarray(data.coffee()).resize((120, 80))
    result = restorer.restore(photograph, detector="mtcnn")
    assert result.faces == [] and result.image.tobytes() == photograph.tobytes()
    assert restorer.restore(photograph, detector=lambda rgb: []).faces == []


def test_a_face_that_cannot_be_aligned_is_left_with_a_warning(restorer, group, caplog):
    photograph, (face, other) = group
    swapped = Face(other.box, other.landmarks[[1, 0, 2, 3, 4]], 1.0)
    with caplog.at_level(logging.WARNING):
        result = restorer.restore(photograph, faces=[Face(other.box, None, 1.0), swapped, face], **FAST)
    assert [found.face for found in result.restored] == [face] and len(result.faces) == 3
    assert [left.face.landmarks is None for left in result.left] == [True, False]
    assert result.left[0].reason == "it has no landmarks" and "contradict each other" in result.left[1].reason
    assert "has no landmarks" in caplog.text and "contradict each other" in caplog.text
    assert f"the face at ({other.box[0]:.0f}, " in caplog.text


def test_another_resolution_for_one_call(restorer, group):
    """The crop is aligned at the size that it is restored at, so that it fits back into its place."""
    photograph, faces = group
    result = restorer.restore(photograph, faces=faces[:1], resolution=32, **FAST)
    assert result.faces[0].before.size == result.faces[0].after.size == (32, 32)
    expected = restorer.restore(photograph, faces=faces[:1], resolution=32, **FAST, color_fix="none")
    changed = difference(expected.image, photograph).max(axis=2) > 0
    inside = inside_of(faces[0], photograph.size)
    assert not changed[~inside].any() and changed[inside].mean() > 0.5


# ------------------------------------------------------------------------------------------- many photographs


def tinted(crops):
    """Stands for the network where only the way of the crops counts: each becomes 40 grey levels darker."""
    return [Image.fromarray(np.maximum(np.asarray(crop), 40) - np.uint8(40)) for crop in crops]


def through(images, faces=None, restore_crops=tinted, resolution=64, **options):
    options = PhotographOptions(**{"keep_sharp": False, **options})
    return restore_photographs(images, faces, restore_crops, resolution, options)


def test_photographs_that_share_batches_are_restored_as_alone(restorer, group):
    """Three photographs of 2, 0 and 1 faces in one batch: up to rounding what each gives alone, in their order."""
    photograph, faces = group
    images = [photograph, Image.new("RGB", (50, 40), "gray"), ImageOps.mirror(photograph)]
    known = [faces, [], [mirrored(faces[1], 200)]]
    alone = [restorer.restore(image, own, **FAST).image for image, own in zip(images, known, strict=True)]
    sizes = []
    crops = restorer.restore_crops
    restorer.restore_crops = lambda batch, *rest, **options: sizes.append(len(batch)) or crops(batch, *rest, **options)
    together = list(restorer.restore_all(images, known, batch_size=3, **FAST))
    del restorer.restore_crops
    assert sizes == [0, 3]  # 0: the check of the options
    assert [len(result.faces) for result in together] == [2, 0, 1]
    for result, expected in zip(together, alone, strict=True):
        assert difference(result.image, expected).max() <= 1
    assert difference(together[0].image, photograph).max() > 1


def mirrored(face, width):
    x0, y0, x1, y1 = face.box
    return Face((width - x1, y0, width - x0, y1), ([width - 1, 0] + face.landmarks * [-1, 1])[[1, 0, 2, 4, 3]], 1.0)


def test_a_bad_image_yields_its_error_and_the_others_go_on(group, tmp_path):
    photograph, faces = group
    (tmp_path / "torn.png").write_bytes(b"no image")
    images = [photograph, tmp_path / "torn.png", tmp_path / "missing.png", 3, photograph]
    results = list(through(images, [faces] * 5))
    assert [type(result).__name__ for result in results] == [
        "RestoredImage",
        "ImageError",
        "FileNotFoundError",
        "TypeError",
        "RestoredImage",
    ]
    assert "torn.png" in str(results[1])
    assert results[0].image.tobytes() == results[4].image.tobytes()


def test_photographs_are_read_when_their_turn_comes(group):
    """With batches of 4 faces, 2 photographs of 2 faces fill one: the third is not read before its result is asked."""
    photograph, faces = group
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield photograph

    results = through(endless(), ([faces] * 100).__iter__(), batch_size=4)
    assert read == []
    next(results)
    assert read == [0, 1]
    next(results)
    assert read == [0, 1]
    next(results)
    assert read == [0, 1, 2, 3]


def test_few_pixels_wait(group, monkeypatch):
    """With a limit of 60,000 pixels two photographs of 200 x 128 wait for a full batch, not three."""
    monkeypatch.setattr("faceprior.restorer.photographs.MAX_WAITING", 60_000)
    photograph, faces = group
    sizes = []
    results = through([photograph] * 5, [faces[:1]] * 5, lambda crops: sizes.append(len(crops)) or crops, batch_size=8)
    assert len(list(results)) == 5 and sizes == [2, 2, 1]


def test_wrong_options_are_no_photographs_error(restorer):
    """They are raised by the call, before an image is read."""
    for options, error, match in (
        ({"upscale": 5}, ValueError, "`upscale` has to be a whole number from 1 to 4 but is 5"),
        ({"upscale": 1.5}, ValueError, "`upscale`"),
        ({"background": "esrgan"}, TypeError, "`background` has to be a function"),
        ({"keep_better": True}, ValueError, "pass a `scorer`"),
        ({"max_drift": 0.5}, ValueError, "pass an `identity`"),
        ({"upscale": True}, ValueError, "`upscale`"),
        ({"batch_size": 0}, ValueError, "`batch_size` has to be at least 1"),
        ({"batch_size": 1.5}, ValueError, "`batch_size` has to be a whole number"),
        ({"detector": "haar"}, ValueError, "`detector` has to be one of auto, mtcnn, retinaface"),
        ({"min_confidence": NAN}, ValueError, "`min_confidence` has to be in"),
        ({"min_face_size": NAN}, ValueError, "`min_face_size` has to be above 0"),
        ({"min_gain": NAN}, ValueError, "`min_gain` has to be a finite number but is nan"),
        ({"identity": Distance(), "max_drift": NAN}, ValueError, "`max_drift` has to be a finite number"),
        ({"identity": Distance(), "max_drift": -1}, ValueError, "`max_drift` .* at least 0 but is -1"),
        ({"identity": "dlib"}, TypeError, "`identity` has to be an object with `distance` but is a str"),
        ({"scorer": "tiny"}, TypeError, "`scorer` has to be an object with `score_crops` but is a str"),
        ({"num_inference_steps": 10**6}, ValueError, "`num_inference_steps` has to be a whole number from 1 to 1000"),
        ({"resolution": 66}, ValueError, "`resolution` has to be a multiple of 4"),
        ({"guidance_scale": NAN}, ValueError, "`guidance_scale` has to be a finite number"),
        ({"seed": 1.5}, ValueError, "`seed` has to be a whole number"),
        ({"color_fix": "lab"}, ValueError, "`color_fix`"),
        ({"stepps": 3}, TypeError, "stepps"),
    ):
        with pytest.raises(error, match=match):
            restorer.restore_all(["missing.png"], **options)


def test_one_photograph_is_no_list_of_them(restorer):
    with pytest.raises(TypeError, match="`images` has to be a list .* but is 'photo.jpg': `restore` takes"):
        restorer.restore_all("photo.jpg")


def test_what_an_iterable_raises_comes_after_what_it_gave(group):
    """Two photographs of one face each wait for a batch of 8 when the third cannot be got, or is missing."""
    photograph, faces = group

    def torn():
        yield photograph
        yield photograph
        raise OSError("the card was removed")

    for images, known, error, match in (
        (torn(), None, OSError, "the card was removed"),
        ([photograph] * 3, [faces[:1]] * 2, ValueError, "`images` has more entries than `faces`, which has 2"),
        ([photograph] * 2, [faces[:1]] * 3, ValueError, "`faces` has more entries than `images`, which has 2"),
    ):
        results = through(images, known, batch_size=8, detector=lambda image: faces[:1])
        assert all(len(next(results).restored) == 1 for _ in range(2))
        with pytest.raises(error, match=match):
            next(results)


def test_few_photographs_wait_behind_a_face(group, monkeypatch):
    """One face waits for a batch of 4; without end come photographs without any, and files that cannot be read."""
    monkeypatch.setattr("faceprior.restorer.photographs.MAX_PHOTOGRAPHS", 5)
    photograph, faces = group
    for follower in (Image.new("RGB", (8, 8)), "missing.png"):
        read = []
        images = (read.append(number) or (follower if number else photograph) for number in itertools.count())
        results = through(images, ([] if number else faces[:1] for number in itertools.count()), batch_size=4)
        assert len(next(results).restored) == 1 and len(read) == 6


def test_a_photograph_depends_on_itself_by_the_official_recipe_too(restorer, group):
    photograph, faces = group
    options = {**FAST, "recipe": "official", "resolution": 64, "guidance_scale": 1.0}
    alone, both = (restorer.restore(photograph, faces, batch_size=size, **options).image for size in (1, 2))
    assert difference(alone, both).max() <= 1
    assert difference(alone, photograph).max() > 10


def test_what_fails_in_a_batch_ends_only_its_own_photograph(group):
    """The network fails for the large face of the second photograph: the batch is tried face by face."""
    photograph, faces = group
    dark = Image.fromarray(np.asarray(photograph) // 4)

    def fails_for_dark(crops):
        if any(np.asarray(crop).mean() < 40 for crop in crops):
            raise ValueError("too dark")
        return tinted(crops)

    results = list(through([photograph, dark, photograph], [faces] * 3, fails_for_dark, batch_size=4))
    assert [isinstance(result, Exception) for result in results] == [False, True, False]
    assert str(results[1]) == "too dark"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_memory_that_does_not_suffice_names_the_way_out(group, error):
    """Batches of 3 faces fit, one of 5 does not: its photographs have the error, the others their results."""
    photograph, faces = group

    def limited(crops):
        if len(crops) > 3:
            raise error
        return tinted(crops)

    known = [faces[:1], faces, faces, faces[:1]]  # 1 + 2 + 2, then 1
    results = list(through([photograph] * 4, known, limited, batch_size=5))
    assert all(isinstance(result, torch.OutOfMemoryError) for result in results[:3])
    assert "batch of 5 faces" in str(results[0]) and "`batch_size`" in str(results[0])
    assert "`quantization='8bit'`" in str(results[0]) and is_out_of_memory(results[0])
    assert isinstance(results[3], RestoredImage)


def test_timings_name_every_phase(restorer, group):
    photograph, faces = group
    scorer = tiny.tiny_scorer()
    result = restorer.restore(photograph, faces, scorer=scorer, keep_better=False, **FAST)
    assert result.timings.keys() == {"read", "detect", "align", "restore", "score", "paste"}
    assert all(seconds >= 0 for seconds in result.timings.values()) and result.timings["restore"] > 0
    was_read = restorer.restore(read_source(photograph), faces, **FAST)
    assert was_read.timings.keys() == {"detect", "align", "restore", "paste"}


# ------------------------------------------------------------------------------------------- what is pasted


class Brightness:
    """Scores a crop by its mean grey level, in hundreds."""

    def score_crops(self, crops):
        return [float(np.asarray(crop).mean()) / 100 for crop in crops]


def lighter(crops):
    return [crop.point(lambda value: min(value + 50, 255)) for crop in crops]


def test_only_what_gains_is_pasted(group):
    """Face Score as the mean grey level in hundreds: darker faces fall by 0.4, lighter ones rise by 0.5 at most."""
    photograph, faces = group
    (fallen,) = through([photograph], [faces], scorer=Brightness())
    assert fallen.restored == [] and fallen.image.tobytes() == photograph.tobytes()
    for face in fallen.left:
        assert face.reason == f"Face Score would fall from {face.score_before:.3f} to {face.score_after:.3f}"
        assert face.score_after < face.score_before and face.after.size == face.before.size == (64, 64)
    (risen,) = through([photograph], [faces], lighter, scorer=Brightness(), min_gain=0.1)
    assert len(risen.restored) == 2 and all(face.reason == "" for face in risen.faces)
    (little,) = through([photograph], [faces], lighter, scorer=Brightness(), min_gain=0.6)
    assert little.restored == [] and "rise from" in little.left[0].reason and "0.6" in little.left[0].reason
    (same,) = through([photograph], [faces], lambda crops: crops, scorer=Brightness(), min_gain=0.1)
    assert same.restored == [] and "rise from" in same.left[0].reason
    (anyway,) = through([photograph], [faces], scorer=Brightness(), keep_better=False)
    assert len(anyway.restored) == 2 and anyway.faces[0].score_before > anyway.faces[0].score_after


class Constant:
    """Says the same of every face. numbers: of faces that are scored, if not all."""

    def __init__(self, value, numbers=None):
        self.value, self.numbers = value, numbers

    def score_crops(self, crops):
        return [self.value] * (len(crops) if self.numbers is None else self.numbers)

    def distance(self, before, after):
        return self.value


def test_what_cannot_be_measured_is_not_pasted(group):
    photograph, faces = group
    for judge in ({"scorer": Constant(NAN)}, {"identity": Constant(NAN), "max_drift": 0.5}):
        (result,) = through([photograph], [faces], **judge)
        assert result.restored == [] and "could not be measured" in result.left[0].reason
        assert result.image.tobytes() == photograph.tobytes()
    (error,) = through([photograph], [faces[:1]], scorer=Constant(1.0, numbers=1))
    assert str(error) == "`scorer` has to return a score for each of 2 crops but returned 1"


class Distance:
    """The identity distance is how much darker a crop became, of 100."""

    def distance(self, before, after):
        return None if after.width == 32 else float(np.asarray(before).mean() - np.asarray(after).mean()) / 100


def test_a_face_that_would_become_another_person_is_left(group):
    photograph, faces = group
    (result,) = through([photograph], [faces], identity=Distance(), max_drift=0.1)
    assert result.restored == [] and result.image.tobytes() == photograph.tobytes()
    for face in result.faces:
        assert face.identity_distance > 0.1 and f"would be {face.identity_distance:.2f}, above 0.1" in face.reason
    (result,) = through([photograph], [faces], identity=Distance(), max_drift=0.5)
    assert len(result.restored) == 2
    (result,) = through([photograph], [faces], identity=Distance())
    assert len(result.restored) == 2 and result.faces[0].identity_distance > 0.1
    (result,) = through([photograph], [faces], resolution=32, identity=Distance(), max_drift=0.5)
    assert result.restored == [] and "could not be measured" in result.left[0].reason


def portrait(name):
    """A real portrait and the landmarks of its face."""
    if name == "astronaut":
        image = Image.fromarray(data.astronaut())
    else:
        with cbook.get_sample_data("grace_hopper.jpg") as file:
            image = Image.open(file).convert("RGB")
    return image, detect_faces(image, "mtcnn")[:1]


def enlarged_from(image, factor):
    size = image.width // factor, image.height // factor
    return image.resize(size, Image.LANCZOS).resize(image.size, Image.BICUBIC)


@pytest.mark.parametrize("name", ["astronaut", "hopper"])
def test_a_face_sharper_than_the_model_is_left_and_a_soft_one_is_not(name):
    """Squares of 172 and 349 pixels against 128 and 256: sharp as they are, soft after enlarging from a quarter."""
    image, faces = portrait(name)
    resolution = 128 if name == "astronaut" else 256
    (sharp,) = through([image], [faces], resolution=resolution, keep_sharp=True)
    assert sharp.restored == [] and sharp.image.tobytes() == image.tobytes()
    assert "it is sharper" in sharp.left[0].reason and f"pixels against {resolution}" in sharp.left[0].reason
    assert sharp.left[0].before.size == (resolution, resolution) and sharp.left[0].after is None
    (scored,) = through([image], [faces], lighter, resolution, keep_sharp=True, scorer=Brightness())
    assert (
        scored.restored == [] and "it is sharper" in scored.left[0].reason
    )  # the crop has lost what the scorer misses
    (soft,) = through([enlarged_from(image, 4)], [faces], resolution=resolution, keep_sharp=True)
    (small,) = through([image], [faces], resolution=512, keep_sharp=True)  # the model is finer than the face
    (off,) = through([image], [faces], resolution=resolution)
    (off_scored,) = through([image], [faces], lighter, resolution, scorer=Brightness())
    for result in (soft, small, off, off_scored):
        assert len(result.restored) == 1


def test_a_large_face_keeps_what_is_finer_than_the_model():
    """The network makes a square of 349 pixels at 64 pixels 10 levels darker: so becomes every pixel of the photograph
    in the middle of the face, with all its grain, which the crop alone would have lost."""
    image, faces = portrait("hopper")
    (result,) = through(
        [image], [faces], lambda crops: [crop.point(lambda value: max(value - 10, 0)) for crop in crops]
    )
    x, y = faces[0].landmarks[2].astype(int)
    window = np.s_[y - 30 : y + 30, x - 30 : x + 30]
    before, after = np.asarray(image, int)[window], np.asarray(result.image, int)[window]
    darker = (before - after)[before > 40]
    assert np.median(darker) == 10 and np.abs(darker - 10).max() <= 2
    assert np.abs(np.diff(after, axis=1)).mean() > 0.95 * np.abs(np.diff(before, axis=1)).mean()


# ------------------------------------------------------------------------------------------- size and background


def test_an_untouched_face_leaves_no_trace_at_any_size():
    """The network changes nothing: the result is the photograph enlarged, whatever lies below the faces."""
    image, faces = portrait("astronaut")
    for upscale in (1, 2, 3):
        (result,) = through([image], [faces], lambda crops: crops, upscale=upscale)
        expected = image.resize((512 * upscale, 512 * upscale), Image.LANCZOS)
        assert result.image.size == expected.size and len(result.restored) == 1
        assert difference(result.image, expected).max() <= 1
        assert result.source.rgb.size == (512, 512)


def test_the_enlarged_face_stands_where_the_face_was(group):
    """Restored at twice the size and shrunk again, it is the face restored at once, but for the resampling."""
    photograph, faces = group
    (large,) = through([photograph], [faces], upscale=2)
    (plain,) = through([photograph], [faces])
    assert large.image.size == (400, 256)
    assert difference(large.image.reduce(2), plain.image).mean() < 1


@pytest.mark.parametrize("upscale", [1, 2])
def test_the_background_is_what_the_function_makes(group, upscale):
    photograph, faces = group
    seen = []

    def plain(image):
        seen.append(image.tobytes())
        image.paste("black", (0, 0, 200, 128))  # its own copy
        return Image.new("L", (800, 512), 200)

    (result,) = through([photograph], [faces], background=plain, upscale=upscale)
    pixels = np.asarray(result.image)
    assert result.image.size == (200 * upscale, 128 * upscale) and result.image.mode == "RGB"
    assert seen == [photograph.tobytes()]
    x, y = (faces[0].landmarks[2] * upscale).astype(int)
    assert (pixels[:4] == 200).all() and (pixels[y - 3 : y + 3, x - 3 : x + 3] != 200).any()
    (bare,) = through([photograph], [[]], background=plain, upscale=upscale)
    assert (np.asarray(bare.image) == 200).all()


def test_a_background_of_another_kind_or_shape(group):
    photograph, faces = group
    (result,) = through([photograph], [faces], background=np.asarray)
    assert isinstance(result, TypeError) and "`background` has to return a PIL image but returned ndarray" in str(
        result
    )
    (result,) = through([photograph], [faces], background=lambda image: image.resize((200, 200)))
    assert isinstance(result, ValueError) and "made 200x200 of 200x128" in str(result)


def test_transparency_is_enlarged_too(group):
    photograph, faces = group
    alpha = Image.new("L", photograph.size, 255)
    alpha.paste(0, (0, 0, 20, 128))
    cut = photograph.copy()
    cut.putalpha(alpha)
    (result,) = through([cut], [faces], upscale=2)
    assert result.image.mode == "RGBA" and result.image.size == (400, 256)
    found = np.asarray(result.image)[..., 3]
    assert (found[:, :34] == 0).all() and (found[:, 46:] == 255).all()


# ------------------------------------------------------------------------------------------- memory

MEASURED = """
import gc
import sys
import numpy as np
from PIL import Image
from skimage import data
from faceprior.detect import Face
from faceprior.restorer.photographs import PhotographOptions, restore_photographs

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

def restored(images, faces, **options):
    options = PhotographOptions(keep_sharp=False, **options)
    return restore_photographs(images, faces, lambda crops: [crop.rotate(1) for crop in crops], 128, options)

def face(scale):
    landmarks = np.array([[206, 102], [249, 105], [227, 130], [204, 142], [247, 144]]) * scale
    return Face((180 * scale, 60 * scale, 275 * scale, 180 * scale), landmarks, 1.0)

def photographs(count, side):
    for number in range(count):
        yield Image.fromarray(data.astronaut()).resize((side, side)).rotate(number / 100)

# 400 photographs of 256 x 256 pixels
for number, result in enumerate(restored(photographs(400, 256), ([face(0.5)] for _ in range(400)))):
    assert len(result.restored) == 1
    if number == 9:
        after_10 = memory("VmRSS")
print(memory("VmRSS") - after_10)

# one of 4096 x 4096 pixels, whose face takes a square of 1376
del result
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
before = memory("VmRSS")
for result in restored(photographs(1, 4096), [[face(8)]]):
    assert len(result.restored) == 1
print((memory("VmHWM") - before) / 4096**2)

# a turned one of 60 megapixels, beside a small one, whose faces are searched
def peak(path):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for result in restored([path], None):
        assert len(result.restored) == 1
    return memory("VmHWM")
del result
gc.collect()
small = peak(sys.argv[1])
print((peak(sys.argv[2]) - small) / 7746**2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is Linux's")
def test_memory_is_bounded(tmp_path):
    """Photograph 400 needs at most 30 MB more than photograph 10, and a large one 12 bytes per pixel at its peak, also
    where its faces are searched: Pillow's RGB takes 4, and there are the photograph and its result."""
    files = [str(tmp_path / "small.jpg"), str(tmp_path / "large.jpg")]
    for file, side in zip(files, (512, 7746), strict=True):
        upside_down = Image.fromarray(data.astronaut()).transpose(Image.Transpose.ROTATE_180)
        upside_down.resize((side, side)).save(file)
    run = subprocess.run([sys.executable, "-c", MEASURED, *files], capture_output=True, text=True, check=True)
    growth, *per_pixel = map(float, run.stdout.split())
    assert growth < 30e6 and min(per_pixel) > 7 and max(per_pixel) <= 12
