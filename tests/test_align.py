import numpy as np
import pytest
import skimage.data
from PIL import Image

from faceprior.align import _blurred, align_face, alignment_quad, crop_mask, enlarged, face_mask, paste_face, paste_onto
from faceprior.images import cv2

# left and right as seen in the image: left eye, right eye, nose, left and right mouth corner
ASTRONAUT = np.array([[206, 102], [249, 105], [227, 130], [204, 142], [247, 144]], dtype=float)


def face_at(x, y, scale=1.0, angle=0.0):
    """Landmarks of an upright face with eyes 40 px apart and the mouth 40 px below, turned about (x, y)."""
    upright = np.array([[-20, 0], [20, 0], [0, 20], [-15, 40], [15, 40]]) * scale
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return upright @ turn + (x, y)


def transform(matrix, points):
    return points @ matrix[:, :2].T + matrix[:, 2]


def gradient(width, height, dither=0.0):
    """An image whose red is 20 + 207 x / width and whose green is 20 + 207 y / height."""
    y, x = np.mgrid[:height, :width]
    red, green = 20 + 207 * x / width, 20 + 207 * y / height
    values = np.stack([red, green, np.full_like(red, 90)], axis=2)
    values += np.random.default_rng(0).uniform(-dither, dither, values.shape)
    return np.rint(values).astype(np.uint8)


def weight_in_photograph(photograph, aligned):
    """Where paste_face changes the photograph: a white crop on black, without its mask's corners."""
    size = aligned.crop.width
    white = np.full((size, size, 3), 255, np.uint8)
    return np.asarray(paste_face(np.zeros_like(photograph), white, aligned.matrix))[..., 0] > 0


# --- geometry ---


def test_quad_of_an_upright_face_by_hand():
    """Eyes 40 apart, mouth 40 below: e = (40, 0), m = (0, 40).

    x = e - (40, 0) * (-1, 1) = (80, 0), normalised times max(2 * 40, 1.8 * 40) = 80: a square of side 160 around
    the eyes' middle + (0, 4).
    """
    quad = alignment_quad(face_at(100, 100))
    np.testing.assert_allclose(quad, [[20, 24], [20, 184], [180, 184], [180, 24]])


def test_a_long_face_is_measured_by_its_mouth():
    """Eyes 40 apart, mouth 60 below: 1.8 * 60 = 108 > 80, centre 6 below the eyes."""
    landmarks = face_at(0, 0)
    landmarks[3:, 1] = 60
    np.testing.assert_allclose(alignment_quad(landmarks)[2], [108, 114])


@pytest.mark.parametrize("angle", [0.3, 1.6, 3.0, -2.5])
def test_the_quad_turns_with_the_face(angle):
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    expected = alignment_quad(face_at(0, 0)) @ turn
    np.testing.assert_allclose(alignment_quad(face_at(0, 0, angle=angle)), expected, atol=1e-9)


def test_the_matrix_takes_the_quad_to_the_corners_of_the_crop():
    """Corners are edges of pixels, half a pixel outside of the centres 0 and 63."""
    landmarks = face_at(150, 120, angle=0.4)
    aligned = align_face(np.zeros((256, 256, 3), np.uint8), landmarks, size=64)
    corners = transform(aligned.matrix, alignment_quad(landmarks))
    np.testing.assert_allclose(corners, [[-0.5, -0.5], [-0.5, 63.5], [63.5, 63.5], [63.5, -0.5]], atol=1e-9)


def test_every_face_lands_in_the_same_place():
    """Whatever size and angle: eyes at .5 -+ 20/160 and .5 - 4/160 of the crop, minus half a pixel."""
    image = np.zeros((400, 400, 3), np.uint8)
    for scale, angle in ((0.5, 0.0), (1.0, 0.7), (2.0, -2.0)):
        landmarks = face_at(200, 200, scale, angle)
        eyes = transform(align_face(image, landmarks, size=160).matrix, landmarks[:2])
        np.testing.assert_allclose(eyes, [[59.5, 75.5], [99.5, 75.5]], atol=1e-9)


@pytest.mark.parametrize("size", [32, 50, 64, 128, 512])
def test_pixels_lie_where_the_matrix_says(size):
    """On a linear image every resampling returns the linear function at the mapped point.

    The square of side 320 is taken at sizes that shrink it first (32, 50, 64), sample it finely (128) or enlarge it
    (512). The dither keeps roundings from adding up (whole blocks of a plain gradient round the same way), so the
    mean is right to 0.1 of 255; a shift by half a pixel of the photograph would move it by 0.2.
    """
    width, height = 500, 480
    aligned = align_face(gradient(width, height, dither=1.0), face_at(250, 230, scale=2, angle=0.3), size)
    v, u = np.mgrid[:size, :size]
    inverse = np.linalg.inv(np.vstack([aligned.matrix, [0, 0, 1]]))
    points = np.stack([u, v, np.ones_like(u)], axis=-1) @ inverse.T
    expected = 20 + 207 * points[..., :2] / (width, height)
    difference = np.asarray(aligned.crop, float)[..., :2] - expected
    assert np.abs(difference).max() < 3
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.1


def test_a_large_square_is_antialiased():
    """A chessboard of single pixels, 8 times smaller, is the grey between its colours."""
    board = (np.indices((800, 800)).sum(0) % 2 * 255).astype(np.uint8)
    crop = np.asarray(align_face(board, face_at(400, 400, scale=3.2, angle=0.2), size=64).crop, float)
    assert np.abs(crop - 127.5).max() < 8


@pytest.mark.parametrize(("size", "bound"), [(200, 1), (512, 1), (100, 3)])
def test_alignment_agrees_with_an_affine_transform_by_pillow(size, bound):
    """A square of 172 pixels enlarged to its crop, with another cubic kernel (a = -.5, ours -.75).

    At 100 pixels Pillow's transform aliases, ours does not.
    """
    photograph = skimage.data.astronaut()
    aligned = align_face(photograph, ASTRONAUT, size)
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # Pillow maps the edges of pixels
    inverse = half @ np.linalg.inv(np.vstack([aligned.matrix, [0, 0, 1]])) @ np.linalg.inv(half)
    options = (size, size), Image.Transform.AFFINE, inverse[:2].ravel().tolist(), Image.Resampling.BICUBIC
    expected = [Image.fromarray(photograph[..., i].astype(np.float32)).transform(*options) for i in range(3)]
    assert np.abs(np.asarray(aligned.crop, float) - np.stack(expected, axis=2)).mean() < bound


# --- outside of the photograph ---


def test_what_lies_outside_is_reflected_blurred_and_not_black():
    """Left of the photograph: a uniform image stays uniform, a real one has no black corner."""
    grey = align_face(np.full((200, 200, 3), 77, np.uint8), face_at(10, 100), size=64).crop
    assert (np.asarray(grey) == 77).all()
    crop = np.asarray(align_face(skimage.data.astronaut()[80:, 200:], ASTRONAUT - (200, 80), size=128).crop)
    assert crop[:40, :40].mean() > 60


def test_blurring_a_part_equals_blurring_the_whole():
    image = skimage.data.astronaut()
    whole = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 5.2, borderType=cv2.BORDER_REFLECT)
    for rows, columns in ((slice(0, 40), slice(0, 512)), (slice(100, 300), slice(450, 512))):
        np.testing.assert_allclose(_blurred(image, rows, columns, 5.2), whole[rows, columns], atol=1e-3)


def test_the_photographs_own_pixels_are_not_blurred():
    """The crop of a face at the border equals the crop from the whole photograph where that is inside.

    Positions are rounded in either region, so that a few values differ by 1.
    """
    whole = skimage.data.astronaut()
    cut = align_face(whole[:, 200:], ASTRONAUT - (200, 0), size=172)
    full = align_face(whole, ASTRONAUT, size=172)
    inside = transform(np.linalg.inv(np.vstack([cut.matrix, [0, 0, 1]])), np.zeros((1, 2)))[0]
    first = int(np.ceil(-inside[0])) + 20  # the rotation is 3 degrees: at most 9 px over the height
    difference = np.abs(np.asarray(cut.crop, int)[:, first:] - np.asarray(full.crop, int)[:, first:])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 2)])
def test_photographs_much_smaller_than_the_square(shape):
    image = np.full((*shape, 3), 50, np.uint8)
    aligned = align_face(image, face_at(shape[1] / 2, shape[0] / 2), size=32)
    assert (np.asarray(aligned.crop) == 50).all()
    assert paste_face(image, aligned.crop, aligned.matrix).size == (shape[1], shape[0])


# --- errors ---


@pytest.mark.parametrize(
    ("landmarks", "match"),
    [
        (np.zeros((4, 2)), r"\(5, 2\)"),
        (np.zeros((5, 3)), r"\(5, 2\)"),
        (face_at(50, 50) * np.nan, "finite"),
        (np.full((5, 2), 30.0), "both eyes"),
        (face_at(50, 50)[[1, 0, 2, 4, 3]], "as seen in the image"),
        (face_at(5000, 50), "outside"),
        (face_at(50, -5000), "outside"),
        (np.full((5, 2), 50.0) + (face_at(0, 0) - face_at(0, 0).mean(0)) * 1e-3, "nothing of a face can be seen"),
        (np.full((5, 2), 50.0) + (face_at(0, 0) - face_at(0, 0).mean(0)) * 1e5, "nothing of a face can be seen"),
    ],
)
def test_landmarks_that_make_no_face(landmarks, match):
    with pytest.raises(ValueError, match=match):
        align_face(np.zeros((100, 100, 3), np.uint8), landmarks)


def test_paste_refuses_what_does_not_fit():
    image, crop, matrix = np.zeros((9, 9), np.uint8), np.zeros((4, 4), np.uint8), np.eye(2, 3)
    with pytest.raises(ValueError, match="square"):
        paste_face(image, crop[:3], matrix)
    for bad in (np.eye(3), np.zeros((2, 3)), np.eye(2, 3) * np.nan):
        with pytest.raises(ValueError, match="matrix"):
            paste_face(image, crop, bad)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        paste_face(image, crop, matrix, mask=np.ones((5, 5)))
    for bad in (np.full((4, 4), 1.5), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            paste_face(image, crop, matrix, mask=bad)
    with pytest.raises(ValueError, match="feather"):
        paste_face(image, crop, matrix, feather=0.6)


# --- pasting back ---


@pytest.mark.parametrize(("size", "enlarge"), [(256, 1), (512, 1), (512, 2)])
def test_an_untouched_crop_comes_back(size, enlarge):
    """The documented bound: a mean absolute error below 1.5 of 255 where the weight is above 0, else nothing."""
    photograph = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((512 * enlarge,) * 2))
    aligned = align_face(photograph, (ASTRONAUT + 0.5) * enlarge - 0.5, size)
    back = np.asarray(paste_face(photograph, aligned.crop, aligned.matrix))
    changed = weight_in_photograph(photograph, aligned)
    assert np.abs(back[changed].astype(float) - photograph[changed]).mean() < 1.5
    np.testing.assert_array_equal(back[~changed], photograph[~changed])


def test_pixels_outside_of_the_mask_are_the_photographs_own():
    """A white crop changes nothing outside of the quad, and does change the face."""
    photograph = skimage.data.astronaut()
    aligned = align_face(photograph, ASTRONAUT, 128)
    back = np.asarray(paste_face(photograph, np.full((128, 128, 3), 255, np.uint8), aligned.matrix))
    y, x = np.mgrid[:512, :512]
    u, v = np.moveaxis(transform(aligned.matrix, np.stack([x, y], -1)), -1, 0)
    outside = (u < 0) | (v < 0) | (u > 127) | (v > 127)
    np.testing.assert_array_equal(back[outside], photograph[outside])
    assert (back[100:150, 210:245] == 255).all()


def test_a_linear_image_is_pasted_exactly():
    """Crop and photograph are the same linear function, so pasting changes no pixel by more than rounding."""
    photograph = gradient(300, 280)
    aligned = align_face(photograph, face_at(150, 130, angle=-0.5), size=512)
    back = np.asarray(paste_face(photograph, aligned.crop, aligned.matrix), float)
    assert np.abs(back - photograph).max() <= 1


def test_a_fine_crop_is_antialiased():
    """A chessboard of single crop pixels, 6.4 times finer than the photograph, becomes grey."""
    photograph = np.zeros((300, 300, 3), np.uint8)
    aligned = align_face(photograph, face_at(150, 150, scale=0.5, angle=0.2), size=512)
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    back = np.asarray(paste_face(photograph, board, aligned.matrix), float)
    assert np.abs(back[140:165, 140:160] - 127.5).max() < 16


def test_a_crop_that_lies_partly_outside():
    photograph = skimage.data.astronaut()[90:, 215:]
    aligned = align_face(photograph, ASTRONAUT - (215, 90), 256)
    back = np.asarray(paste_face(photograph, aligned.crop, aligned.matrix))
    assert np.abs(back.astype(float) - photograph).mean() < 1


def test_a_crop_that_lies_wholly_outside_changes_nothing():
    photograph = gradient(40, 30)
    matrix = np.array([[1.0, 0, -500], [0, 1, 0]])
    back = paste_face(photograph, np.full((16, 16, 3), 255, np.uint8), matrix)
    np.testing.assert_array_equal(np.asarray(back), photograph)


def test_a_mask_of_ones_own():
    """With the identity as matrix the crop's pixels go to the same places: half of them at weight 1, none else.

    Float, uint8 and PIL masks mean the same; 0.5 mixes 100 and 200 to 150.
    """
    photograph, crop = np.full((8, 8, 3), 100, np.uint8), np.full((8, 8, 3), 200, np.uint8)
    half = np.zeros((8, 8), np.float32)
    half[:, 4:] = 1
    expected = np.where(half[..., None] > 0, 200, 100)
    as_bytes = (half * 255).astype(np.uint8)
    for mask in (half, as_bytes, Image.fromarray(as_bytes), half > 0):
        back = paste_face(photograph, crop, np.eye(2, 3), mask=mask)
        np.testing.assert_array_equal(np.asarray(back), np.broadcast_to(expected, (8, 8, 3)))
    mixed = paste_face(photograph, crop, np.eye(2, 3), mask=np.full((8, 8), 0.5))
    assert (np.asarray(mixed) == 150).all()


def test_pasting_leaves_its_inputs_alone():
    photograph = Image.fromarray(skimage.data.astronaut())
    aligned = align_face(photograph, ASTRONAUT, 64)
    paste_face(photograph, np.zeros((64, 64, 3), np.uint8), aligned.matrix)
    np.testing.assert_array_equal(np.asarray(photograph), skimage.data.astronaut())


# --- the mask ---


@pytest.mark.parametrize("size", [7, 64, 512])
def test_crop_mask_is_zero_on_its_border_and_one_inside(size):
    mask = crop_mask(size)
    assert mask.shape == (size, size) and mask.dtype == np.float32
    for border in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert (border == 0).all()
    assert mask[size // 2, size // 2] == 1
    np.testing.assert_allclose(mask, mask[::-1])
    np.testing.assert_allclose(mask, mask.T)


def test_the_profile_of_the_soft_edge():
    """size 101, feather .2: at depth d px along the middle the weight is 3 t^2 - 2 t^3 with t = d / 20.2."""
    depth = np.arange(25)
    t = np.clip(depth / 20.2, 0, 1)
    np.testing.assert_allclose(crop_mask(101, 0.2)[50, :25], 3 * t**2 - 2 * t**3, atol=1e-6)


def test_feather_of_zero_is_a_hard_edge():
    assert set(np.unique(crop_mask(64, 0.0))) == {0.0, 1.0}


PROFILE = np.array([[-3, 0], [4, 0], [-16, 20], [-6, 40], [2, 40]], float)  # looks to the left: m = 40, e = 7


def in_crop(aligned, landmarks):
    return transform(aligned.matrix, landmarks)


def test_the_oval_by_hand():
    """A crop of 160 pixels of a face whose eyes lie 40 apart and whose mouth lies 40 below: e = 40, |m| = 40.

    The eyes' middle is at (79.5, 75.5), the ellipse from 75.5 - 1.05 * 40 = 33.5 to 75.5 + 1.75 * 40 = 145.5, its
    centre at 89.5, its half width 44. At 1.2 radii t = (1.4 - 1.2) / 0.4 = 1/2 and 3 t^2 - 2 t^3 = 1/2; beyond 1.4 it
    is 0. The crop's own soft edge is 0.08 * 160 = 12.8 pixels wide.
    """
    aligned = align_face(np.zeros((300, 300, 3), np.uint8), face_at(150, 150), 160)
    mask = face_mask(in_crop(aligned, face_at(150, 150)), 160)
    assert mask.shape == (160, 160) and mask.dtype == np.float32
    row = mask[90]  # half a pixel below the centre
    assert row[80] == 1 and row[79 + 43] == 1 and row[79 - 43] == 1
    x = 79.5 + 1.2 * 44
    assert np.interp(x, np.arange(160), row) == pytest.approx(0.5, abs=0.02)
    assert row[int(79.5 + 1.4 * 44) + 1] == 0 and row[int(79.5 - 1.4 * 44) - 1] == 0
    column = mask[:, 80]
    assert column[34:146].min() == 1 and column[33 - 23] < 0.02
    for border in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert (border == 0).all()


def test_a_profiles_oval_covers_the_cheek_behind_the_eyes():
    """|m| = 40 on either side of a centre shifted from the nose: by 0.5 * 16.5 to the right of the eyes' middle."""
    landmarks = PROFILE + 100
    aligned = align_face(np.zeros((200, 200, 3), np.uint8), landmarks, 200)
    mask, scale = face_mask(in_crop(aligned, landmarks), 200), np.hypot(*aligned.matrix[0, :2])
    eyes = in_crop(aligned, landmarks[:2]).mean(0)
    row = np.flatnonzero(mask[int(eyes[1] + 14 * scale)] == 1)
    assert row[-1] - eyes[0] == pytest.approx(scale * (40 + 8.25), abs=5)
    assert eyes[0] - row[0] == pytest.approx(scale * (40 - 8.25), abs=5)


@pytest.mark.parametrize("landmarks", [np.zeros((5, 2)), PROFILE * 1000, np.full((5, 2), -500.0)])
def test_whatever_the_landmarks_the_border_is_zero(landmarks):
    mask = face_mask(landmarks, 33)
    assert np.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1
    for border in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert (border == 0).all()


def seam(photograph, landmarks, mask_of=face_mask, size=128, change=60):
    """The largest step between neighbours that pasting a face of another brightness adds, per level of the change.

    The change is that of the photograph itself, so that what the photograph holds takes no part.
    """
    aligned = align_face(photograph, landmarks, size)
    lighter = np.asarray(aligned.crop) // 2 + change  # no clipping
    darker = np.asarray(aligned.crop) // 2
    mask = mask_of(in_crop(aligned, landmarks), size)
    half = photograph // 2
    pasted = (np.asarray(paste_face(half, crop, aligned.matrix, mask=mask), float) for crop in (lighter, darker))
    added = np.subtract(*pasted)
    assert added.max() > 0.95 * change
    return max(np.abs(np.diff(added, axis=axis)).max() for axis in (0, 1)) / change


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.6, np.pi, -2.2])
@pytest.mark.parametrize("kind", ["smooth", "textured", "border", "profile"])
def test_no_seam_shows(kind, angle):
    """Over the soft edge, of about w = 0.08 of the square's side, the weight changes by 1.5 / w per pixel at most, and
    where the oval meets the crop's border by twice that; with a hard edge it is 1. 2 levels of 60 are rounding.
    """
    rng = np.random.default_rng(0)
    textured = rng.integers(0, 256, (400, 400, 3), np.uint8)
    photograph = gradient(400, 400) if kind == "smooth" else textured
    place = (30, 380) if kind == "border" else (200, 200)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    landmarks = PROFILE @ turn + place if kind == "profile" else face_at(*place, angle=angle)
    side = np.hypot(*(alignment_quad(landmarks)[3] - alignment_quad(landmarks)[0]))
    bound = 2 * 1.5 / (0.08 * side) + 2 / 60
    assert seam(photograph, landmarks) < bound
    if kind != "border":
        assert seam(photograph, landmarks, lambda points, size: face_mask(points, size) > 0.5) > bound


# --- the change ---


@pytest.mark.parametrize(("size", "angle"), [(64, 0.0), (200, 2.0), (512, -0.7)])
def test_with_before_an_untouched_crop_changes_nothing(size, angle):
    photograph = skimage.data.astronaut()
    for landmarks in (ASTRONAUT, face_at(500, 300, angle=angle)):
        aligned = align_face(photograph, landmarks, size)
        back = paste_face(photograph, aligned.crop, aligned.matrix, before=aligned.crop)
        np.testing.assert_array_equal(np.asarray(back), photograph)


def test_the_change_is_added_to_the_photographs_own_detail():
    """A crop of 64 pixels of a square of 160, 30 levels lighter: so is every pixel of the noise in the middle."""
    photograph = np.random.default_rng(0).integers(60, 160, (300, 300, 3), np.uint8)
    aligned = align_face(photograph, face_at(150, 150), 64)
    lighter = np.asarray(aligned.crop) + np.uint8(30)
    back = np.asarray(paste_face(photograph, lighter, aligned.matrix, before=aligned.crop), int)
    assert np.abs(back - photograph - 30)[130:170, 130:170].max() <= 1
    with pytest.raises(ValueError, match="`before` has to be 64x64, like the crop, but is 32x32"):
        paste_face(photograph, lighter, aligned.matrix, before=np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_overlapping_faces_are_changed_once_each(factor):
    """Two crops of one place, 20 and 50 levels lighter: where the second covers the first, the change is its own."""
    photograph = Image.fromarray(np.random.default_rng(0).integers(60, 160, (200, 200, 3), np.uint8))
    large = photograph.resize((200 * factor, 200 * factor), Image.LANCZOS)
    canvas = large.copy()
    for x, level in ((90, 20), (110, 50)):
        aligned = align_face(photograph, face_at(x, 100, scale=0.7), 64)
        lighter = np.asarray(aligned.crop) + np.uint8(level)
        mask = face_mask(in_crop(aligned, face_at(x, 100, scale=0.7)), 64)
        paste_onto(canvas, lighter, enlarged(aligned.matrix, factor), mask, aligned.crop, photograph)
    change = np.asarray(canvas, int) - np.asarray(large, int)
    middle, edge = (np.s_[105 * factor : 115 * factor, x * factor : (x + 5) * factor] for x in (108, 64))
    assert np.abs(change[middle] - 50).max() <= 1 and np.abs(change[edge] - 20).max() <= 1


def test_enlarged_by_hand():
    """The centre of a pixel, 0, becomes the middle of two at 0 and 1: 0.5 is mapped where 0 was, 2.5 where 1 was."""
    matrix = np.array([[2.0, 0, 7], [0, 2, 1]])
    double = enlarged(matrix, 2)
    np.testing.assert_allclose(transform(double, np.array([[0.5, 0.5], [2.5, 4.5]])), [[7, 1], [9, 5]])


def test_a_band_at_a_time_gives_the_same(monkeypatch):
    """Faces are pasted and shrunk some rows at a time, so that a large one needs no more memory."""
    photograph = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((1024, 1024)))
    landmarks = (ASTRONAUT + 0.5) * 2 - 0.5
    results = []
    for pixels in (2**30, 3000):
        monkeypatch.setattr("faceprior.align._BAND", pixels)
        aligned = align_face(photograph, landmarks, 32)
        black = np.zeros((32, 32, 3), np.uint8)
        results += [np.asarray(aligned.crop), np.asarray(paste_face(photograph, black, aligned.matrix))]
    np.testing.assert_array_equal(results[0], results[2])
    assert np.abs(results[1].astype(int) - results[3]).max() <= 1
