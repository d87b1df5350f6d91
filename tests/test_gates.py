"""The gates of portraits: what each number means, by hand and by the flaw that moves it, and what is kept."""

import io
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import skimage.data
from conftest import load_stage
from matplotlib import cbook
from PIL import Image

from faceprior.align import align_face
from faceprior.detect import Face
from faceprior.gates import GATES, LIMITS, NO_LANDMARKS, find_faults, measure_face, measure_photograph
from faceprior.procedural import FLAWS, VALIDATION_SEEDS, Spoil, draw_portrait

LIMITED = load_stage("03_curate_portraits").Config()


@pytest.fixture(scope="module")
def drawing():
    return draw_portrait(3, 256)


@pytest.fixture(scope="module")
def face(drawing):
    return Face(drawing.box, drawing.landmarks, 1.0)


def measure(image, face) -> dict[str, float]:
    photograph = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return measure_face(photograph, face, align_face(photograph, face.landmarks, 128).crop)


def compressed(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# ------------------------------------------------------------------------------------------------- the table


def test_every_gate_has_a_limit_of_the_stage_and_a_number_of_its_own():
    assert all(isinstance(getattr(LIMITED, gate.limit), int | float) for gate in GATES)
    assert len({gate.measure for gate in GATES}) == len({gate.fault for gate in GATES}) == len(LIMITS) == len(GATES)


def test_limits_by_hand():
    """At the limit a number passes; the sign of an angle does not count; a copy has to differ by more."""
    limits = SimpleNamespace(**{name: 10 for name in LIMITS})
    assert not find_faults({"face_size": 10, "yaw": -10, "duplicate": 11}, limits)
    faults = find_faults({"duplicate": 10, "face_size": 9.5, "yaw": -10.5}, limits)
    assert [str(fault) for fault in faults] == [
        "face_size 9.5 (small face: at least 10)",
        "yaw -10.5 (turned away: at most 10)",
        "duplicate 10 (near-duplicate: more than 10)",
    ]


# ------------------------------------------------------------------------------------------------- the numbers

MOVED = {  # flaw -> (number, direction)
    "blur": ("sharpness", -1), "motion": ("sharpness", -1), "noise": ("noise", 1), "pepper": ("pepper", 1),
    "blocks": ("blocks", 1), "smooth": ("smoothest", -1), "underexposed": ("highlights", -1),
    "overexposed": ("blown", 1),
}  # fmt: skip


@pytest.mark.parametrize("flaw", MOVED)
def test_every_flaw_moves_its_number(drawing, face, flaw):
    number, direction = MOVED[flaw]
    clean, spoiled = measure(drawing.image, face), FLAWS[flaw](drawing, 3, np.random.default_rng(0))
    measured = measure(spoiled, face)
    factor = measured[number] / clean[number] if clean[number] else math.inf
    assert factor > 1.3 if direction > 0 else factor < 1 / 1.3


@pytest.mark.parametrize("hides_eyes", [True, False])
def test_a_cover_hides_what_is_under_it_and_nothing_else(drawing, face, hides_eyes):
    """A flat patch over eyes or mouth: no contrast there, and the other as before."""
    covered, unit = drawing.image.copy(), round(float(np.hypot(*(face.landmarks[1] - face.landmarks[0]))))
    x, y = (face.landmarks[:2] if hides_eyes else face.landmarks[3:]).mean(axis=0).round().astype(int)
    covered[y - unit // 3 : y + unit // 3, x - unit : x + unit] = drawing.image[drawing.region_masks["skin"]].mean(0)
    before, after = measure(drawing.image, face), measure(covered, face)
    hidden, seen = ("eyes", "mouth") if hides_eyes else ("mouth", "eyes")
    assert after[hidden] < 0.01 < 0.1 < before[hidden]
    assert after[seen] == pytest.approx(before[seen], rel=0.2)  # the cheeks' brightness changes, too


def test_detail_is_that_of_the_size_at_which_the_crop_is_used(drawing, face):
    """Of a photograph that was enlarged to 4 times its size: enough for a crop of its own, not for a larger one."""
    enlarged = Image.fromarray(drawing.image).resize((1024, 1024), Image.BICUBIC)
    large = Face(tuple(4 * edge for edge in face.box), (face.landmarks + 0.5) * 4 - 0.5, 1.0)
    own, larger = (
        measure_face(enlarged, large, align_face(enlarged, large.landmarks, side).crop)["detail"] for side in (96, 512)
    )
    assert own > 2 * LIMITED.min_detail and larger < LIMITED.min_detail


def test_the_fraction_outside_by_hand(face):
    """A photograph that ends in the middle of the square's upright side shows half of it."""
    points = np.array([(100, 100), (150, 100), (125, 125), (105, 145), (145, 145)], float)
    left, width = 125 - 100, 200  # side 2 * max(2 * 50, 1.8 * 45), centre (125, 104.5)
    for cut, outside in ((left + width, 0.0), (left + width // 2, 0.5)):
        photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, cut, 3), np.uint8))
        found = measure(photograph, Face((90, 80, 160, 170), points, 1.0))["outside"]
        assert found == pytest.approx(outside, abs=0.02)


def test_the_roll_of_a_photograph_on_its_side_is_that_of_the_head(drawing):
    upright = measure_photograph(Image.fromarray(drawing.image), 128, "mtcnn").values
    turned = Image.fromarray(drawing.image).transpose(Image.Transpose.ROTATE_90)
    assert measure_photograph(turned, 128, "mtcnn").values["roll"] == pytest.approx(upright["roll"], abs=0.5)


def test_pepper_and_noise_are_measured_on_the_photographs_own_pixels(drawing, face):
    """5% of black pixels on a face that is brighter than 40 grey levels: nearly that fraction is found, at any size."""
    black = np.random.default_rng(0).random((256, 256, 1)) < 0.05
    assert measure(np.where(black, 0, drawing.image), face)["pepper"] == pytest.approx(0.05, abs=0.015)


def test_blocks_are_found_whatever_the_corner_of_the_box(drawing, face):
    """The grid of a JPEG begins at the corner of the image, not at the face's."""
    spoiled = compressed(drawing.image, 5)
    x0, y0, x1, y1 = face.box
    for shift in (0, 3, 5):
        assert measure(spoiled, Face((x0 + shift, y0 + shift, x1, y1), face.landmarks, 1.0))["blocks"] > 1.5


def test_of_a_large_face_the_middle_is_measured(drawing, face):
    """Blocks in the middle 1024 pixels are found, as if the face was no larger; those beside are not."""
    size, box = 2304, (100, 100, 2204, 2204)
    large = Image.fromarray(drawing.image).resize((size, size), Image.BICUBIC)
    points = (face.landmarks + 0.5) * size / 256 - 0.5
    blocky = Image.fromarray(compressed(np.asarray(large), 5))
    inside, outside = large.copy(), blocky.copy()
    middle = (640, 640, 1664, 1664)
    inside.paste(blocky.crop(middle), middle[:2])
    outside.paste(large.crop(middle), middle[:2])
    assert measure(inside, Face(box, points, 1.0))["blocks"] > 1.5
    assert measure(outside, Face(box, points, 1.0))["blocks"] < 1.2


def test_a_face_at_the_border_and_a_tiny_one(drawing, face):
    for box in ((0, 0, 256, 256), (200, 200, 256, 256), (0, 0, 5, 5), (248, 248, 256, 256)):
        assert all(math.isfinite(value) for value in measure(drawing.image, Face(box, face.landmarks, 1.0)).values())


def test_a_face_in_the_corner_is_not_measured_beyond_the_image(face):
    """The two blocks around a box of 8 x 8 pixels lie inside of an even image: no dark border, no step."""
    photograph = Image.new("RGB", (256, 256), (200, 180, 170))
    values = measure(photograph, Face((248, 248, 256, 256), face.landmarks, 1.0))
    assert (values["noise"], values["pepper"], values["blocks"]) == (0, 0, 1)


# ------------------------------------------------------------------------------------------------- photographs


def test_a_photograph_without_a_face_and_a_face_without_landmarks():
    grey = Image.new("RGB", (200, 120), "gray")
    nobody = measure_photograph(grey, 128, lambda rgb: [])
    assert nobody.values == {"side": 120, "confidence": 0.0} and nobody.face is None and nobody.crop is None
    unsure = measure_photograph(grey, 128, lambda rgb: [Face((20, 10, 100, 90), None, 0.89999)], min_confidence=0.9)
    assert [fault.gate.measure for fault in find_faults(unsure.values, LIMITED)] == ["confidence"]
    bare = measure_photograph(grey, 128, lambda rgb: [Face((20, 10, 100, 90), None, 0.99)])
    assert bare.values["misfit"] == NO_LANDMARKS and bare.crop is None
    assert [fault.gate.measure for fault in find_faults(bare.values, LIMITED)] == ["misfit"]


def test_the_main_face_and_the_second(drawing, face):
    """Boxes of 120, 90 and 60 pixels, the middle one too uncertain: the second is half as large as the main one."""
    x, y = face.landmarks.mean(axis=0)
    boxes = [Face((x - s, y - s, x + s, y + s), face.landmarks, c) for s, c in ((30, 0.95), (60, 0.99), (45, 0.5))]
    values = measure_photograph(Image.fromarray(drawing.image), 128, lambda rgb: boxes).values
    assert (values["confidence"], values["face_size"], values["second_face"]) == (0.99, 120, 0.5)
    assert json.loads(json.dumps(values)) == values


def real_portraits():
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return {"astronaut": Image.fromarray(skimage.data.astronaut()), "hopper": Image.open(file).convert("RGB")}


@pytest.mark.parametrize("name", ["astronaut", "hopper"])
def test_sharp_photographs_of_people_pass_and_spoiled_ones_do_not(name):
    photograph = real_portraits()[name]
    measured = measure_photograph(photograph, 128, "mtcnn")
    assert not find_faults(measured.values, LIMITED)
    x0, y0, x1, y1 = (round(edge) for edge in measured.face.box)
    around = (max(x0 - 60, 0), max(y0 - 80, 0), x1 + 60, y1 + 60)
    drawing = SimpleNamespace(
        image=np.asarray(photograph.crop(around)), landmarks=measured.face.landmarks - around[:2], region_masks={}
    )
    skin = np.zeros(drawing.image.shape[:2], bool)
    skin[y0 - around[1] : y1 - around[1], x0 - around[0] : x1 - around[0]] = True
    drawing.region_masks["skin"] = skin
    for flaw in ("blur", "motion", "noise", "pepper", "blocks", "underexposed", "overexposed", "covered", "cut"):
        spoiled = Image.fromarray(FLAWS[flaw](drawing, 0, np.random.default_rng(1)))
        assert find_faults(measure_photograph(spoiled, 128, "mtcnn").values, LIMITED), flaw


def test_smoothed_skin_is_told_from_real_skin_of_a_photograph():
    """The whole astronaut by the bilateral filter of FLAWS, at its weakest; and as a JPEG of quality 50, which loses
    detail of its own."""
    photograph = real_portraits()["astronaut"]
    face = measure_photograph(photograph, 128, "mtcnn").face
    region = tuple(round(edge) for edge in (face.box[0] - 40, face.box[1] - 40, face.box[2] + 40, face.box[3] + 40))
    smooth = photograph.copy()
    pixels = np.asarray(photograph.crop(region))
    for _ in range(3):
        pixels = cv2.bilateralFilter(pixels, 0, 25, 0.012 * len(pixels))
    smooth.paste(Image.fromarray(pixels), region[:2])
    values = {
        name: measure(image, face)["smoothest"]
        for name, image in {
            "real": photograph,
            "jpeg": Image.fromarray(compressed(np.asarray(photograph), 50)),
            "smooth": smooth,
        }.items()
    }
    assert values["smooth"] < LIMITED.min_texture < min(values["real"], values["jpeg"])


def test_hair_and_glasses_over_smooth_skin_do_not_make_it_real(drawing, face):
    """Lines over half of the cheeks' area: the smoothest fifth is that of the skin between them."""
    flat = cv2.GaussianBlur(drawing.image, (0, 0), 4)
    lined = flat.copy()
    lined[:, ::12] = lined[:, 1::12] = 30
    assert measure(lined, face)["smoothest"] < LIMITED.min_texture < measure(drawing.image, face)["smoothest"]


def test_each_flaw_of_a_drawn_portrait_is_found():
    """Of one person; `checkpoints.tiny_models.curation` counts many. A copy is the stage's business."""
    seed = VALIDATION_SEEDS + 4003
    drawing = draw_portrait(seed, 384)
    good = measure_photograph(Image.fromarray(drawing.image), 128, "mtcnn")
    assert not find_faults(good.values, LIMITED)
    for name, flaw in FLAWS.items():
        if name != "duplicate":
            spoiled = flaw(drawing, seed, np.random.default_rng(0))
            assert spoiled.dtype == np.uint8 and spoiled.ndim == 3
            values = measure_photograph(Image.fromarray(spoiled), 128, "mtcnn").values
            assert find_faults(values, LIMITED), name


def test_every_fourth_drawing_is_spoiled_in_turn_and_a_seed_gives_the_same_pixels(drawing):
    change, names = Spoil(7), list(FLAWS)
    assert [change(drawing, seed)[1] for seed in (0, 1, 4, 8, 61)] == [names[0], "", names[1], names[2], ""]
    first, second = change(drawing, 4)[0], change(drawing, 4)[0]
    np.testing.assert_array_equal(first, second)
    assert change(drawing, 3)[0] is drawing.image


PEAK = """
import resource, sys
import numpy as np
from PIL import Image
from faceprior.detect import Face
from faceprior.gates import measure_photograph
from faceprior.images import load_image
photograph = load_image(sys.argv[1])
measured = measure_photograph(photograph, 512, "mtcnn")
assert measured.crop is not None
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_photograph_of_60_megapixels_takes_what_its_pixels_take(tmp_path, drawing):
    """From 24 to 60 megapixels the peak grows by Pillow's 4 bytes a pixel and at most 3 more; the rest is constant."""
    peaks = {}
    for side in (4900, 7746):
        path = tmp_path / f"{side}.jpg"
        cv2.imwrite(str(path), cv2.resize(drawing.image[..., ::-1], (side, side), interpolation=cv2.INTER_CUBIC))
        run = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
        peaks[side] = int(run.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    assert (peaks[7746] - peaks[4900]) / (7746**2 - 4900**2) < 4 + 3
