"""Pictures read and searched ahead, in threads: their order, their errors, and who may run at once."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from faceprior.blip import normalise, preprocess
from faceprior.detect import Face, resolve_detector
from faceprior.scorer import iter_faces


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


def picture(number):
    """Noise of its own; `number` is its first pixel."""
    pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    pixels[0, 0, 0] = number
    return pixels


def test_the_order_and_the_errors_stay_in_their_places(four_threads, tmp_path):
    """Given boxes, 0 to 2 a picture; every fifth picture is missing."""
    images = [tmp_path / "gone.png" if n % 5 == 4 else picture(n) for n in range(23)]
    boxes = [[(5, 5, 30, 35), (0, 10, 20, 39)][: n % 3] for n in range(23)]
    found = list(iter_faces(images, 16, boxes))
    assert [isinstance(one, FileNotFoundError) for one in found] == [n % 5 == 4 for n in range(23)]
    for image, own, one in zip(images, boxes, found, strict=True):
        if isinstance(one, Exception):
            continue
        faces, pixels = one
        assert [face.box for face in faces] == own and pixels.shape == (len(own), 3, 16, 16)
        if own:
            torch.testing.assert_close(normalise(pixels), preprocess([image] * len(own), 16, own), rtol=0, atol=0)
    with pytest.raises(ValueError, match="one list per picture: 1 for 2"):
        next(iter_faces([picture(0), picture(1)], 16, [[]]))


def test_a_function_of_ones_own_is_called_by_one_thread_at_a_time(four_threads):
    """The slowest first; none of the calls finds another one running."""
    running, threads = threading.Semaphore(1), set()

    def find(rgb):
        assert running.acquire(blocking=False)
        time.sleep(0.02 if rgb[0, 0, 0] == 0 else 0)
        threads.add(threading.get_ident())
        running.release()
        return [Face((5, 5, 30, 35), None, (rgb[0, 0, 0] + 100) / 200)]

    found = list(iter_faces(map(picture, range(12)), 16, detector=find, min_confidence=0))
    assert [faces[0].confidence for faces, _ in found] == [(n + 100) / 200 for n in range(12)]
    assert threading.get_ident() not in threads


def test_no_more_is_read_than_is_asked_for(four_threads):
    """Of an endless row: three pictures, and two for each of the four threads ahead."""
    taken = []
    images = (taken.append(n) or picture(n % 200) for n in itertools.count())
    found = iter_faces(images, 16, detector=lambda rgb: [])
    for _ in range(3):
        assert next(found)[0] == []
    found.close()
    assert len(taken) == 3 + 2 * four_threads


def test_a_detector_serves_several_threads(four_threads, tmp_path):
    """MTCNN has a state; a PIL picture that is not read yet stands in the list many times."""
    Image.fromarray(data.astronaut()).save(tmp_path / "astronaut.png")
    with Image.open(tmp_path / "astronaut.png") as astronaut:
        found = list(iter_faces([astronaut] * 4 + [data.coffee()] * 2, 32, detector="mtcnn"))
    (expected,) = resolve_detector("mtcnn")(data.astronaut())
    assert [faces for faces, _ in found] == [[expected]] * 4 + [[]] * 2
    assert all(torch.equal(pixels, found[0][1]) for _, pixels in found[:4])
