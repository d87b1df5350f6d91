import io
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence, TiffImagePlugin

from faceprior import images
from faceprior.images import (
    ImageError,
    Metadata,
    as_array,
    contact_sheet,
    count_frames,
    decode_image,
    load_image,
    read_source,
    save_image,
    to_pil,
    to_pixel_values,
    verify_image,
)


def checker(height=6, width=8):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def noise_file(path, size=200):
    """An image that does not compress, so that half of its file is half of its pixels."""
    Image.fromarray(checker(size, size)).save(path)
    return path


# --- load_image ---


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm"])
def test_lossless_files_come_back_exactly(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(checker()).save(path)
    for source in (path, str(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), checker())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_removed(tmp_path, orientation):
    """Orientation 6 asks a viewer to turn the stored pixels by 90 degrees clockwise, and so on (EXIF 2.3)."""
    stored = checker()
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path, exif=exif)
    image = load_image(path)
    np.testing.assert_array_equal(np.asarray(image), upright)
    assert 0x0112 not in image.getexif()


def test_sixteen_bits_are_divided_by_257(tmp_path):
    """257 k is the 16-bit twin of k; 257 k + 128 is the last value that rounds down to k."""
    k = np.arange(255, dtype=np.uint16)
    array = np.stack([257 * k, 257 * k + 128, 257 * k + 129])
    expected = np.stack([k, k, k + 1])
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    for source in (path, array, Image.fromarray(array.astype(np.int32))):
        np.testing.assert_array_equal(as_array(source)[..., 1], expected)


def test_floats_lie_in_zero_to_one():
    array = np.array([[0, 0.5, 1]], dtype=np.float32)
    np.testing.assert_array_equal(as_array(array)[..., 0], [[0, 128, 255]])
    np.testing.assert_array_equal(as_array(Image.fromarray(array))[..., 0], [[0, 128, 255]])
    for bad in (1.01, -0.01, np.nan, np.inf):
        with pytest.raises(ImageError, match=r"\[0, 1\]"):
            load_image(np.array([[0.5, bad]]))


def test_transparency_lies_over_white(tmp_path):
    """Black at alpha 0, 51, 255 over white: 255, 204, 0."""
    alpha = np.array([[0, 51, 255]], dtype=np.uint8)
    rgba = np.concatenate([np.zeros((1, 3, 3), np.uint8), alpha[..., None]], axis=2)
    rgba_image = Image.fromarray(rgba)
    for source in (rgba, rgba_image, rgba_image.convert("LA"), rgba_image.convert("RGBa")):
        np.testing.assert_array_equal(as_array(source)[..., 0], [[255, 204, 0]])


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert as_array(tmp_path / "a.png").tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = load_image(Image.new(mode, (5, 3)))
    assert image.mode == "RGB" and image.size == (5, 3)


def test_cmyk_jpeg_is_not_read_as_rgb(tmp_path):
    """Ink: cyan alone absorbs red, so the image is green + blue."""
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = as_array(tmp_path / "a.jpg")[8, 8]
    assert red < 20 and green > 150 and blue > 200


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.float32, np.float16])
def test_arrays_of_all_kinds(shape, dtype):
    image = load_image(np.ones(shape, dtype))
    assert image.mode == "RGB" and image.size == (5, 4)


@pytest.mark.parametrize("shape", [(3, 4, 5), (4,), (1, 4, 5, 3), (4, 5, 2)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(ImageError, match="channels last"):
        load_image(np.zeros(shape, np.uint8))


def test_arrays_of_other_types_are_refused():
    with pytest.raises(ImageError, match="int64"):
        load_image(np.zeros((4, 5), np.int64))
    with pytest.raises(ImageError, match="-1 to 0"):
        load_image(Image.fromarray(np.array([[-1, 0]], np.int32)))
    with pytest.raises(TypeError, match="Tensor"):
        load_image(torch.zeros(3, 4, 5))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert as_array(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tiff"])
def test_half_a_file_is_an_image_error(tmp_path, suffix):
    path = noise_file(tmp_path / f"a{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=f"a{suffix}"):
        load_image(path)


def test_bytes_are_read_as_the_file_is(tmp_path):
    """With its orientation; and what is wrong is told under the name that was given."""
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    image.save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    read = decode_image(data, "0.tar/a.png")
    assert read.size == (2, 4) and np.array_equal(read, load_image(tmp_path / "a.png"))
    for wrong, reason in ((b"", "is empty"), (b"text", "is not an image"), (data[:60], "0.tar/a.png")):
        with pytest.raises(ImageError, match=f"0.tar/a.png.*{reason}" if reason[0] == "i" else reason):
            decode_image(wrong, "0.tar/a.png")
    with pytest.raises(ImageError, match="more than `max_pixels` = 7"):
        decode_image(data, "0.tar/a.png", max_pixels=7)


def test_a_truncated_file_is_said_to_be_truncated(tmp_path):
    for suffix in (".png", ".jpg"):
        path = noise_file(tmp_path / f"a{suffix}")
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(ImageError, match="is truncated"):
            load_image(path)
        with pytest.raises(ImageError, match="is truncated"):
            load_image(Image.open(path))


def test_what_is_not_an_image(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="not an image"):
        load_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="0 bytes"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.png"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError, match="download"):
        load_image("https://example.org/a.png")


def test_size_is_checked_before_the_pixels_are_decoded(tmp_path):
    """A file cut off after its header would fail to decode: the complaint is about the size nevertheless."""
    path = noise_file(tmp_path / "a.png", size=100)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match="100x100 = 10000 pixels"):
        load_image(path, max_pixels=9999)
    with pytest.raises(ImageError, match="truncated"):
        load_image(path, max_pixels=10000)
    for source in (np.zeros((100, 100), np.uint8), Image.new("L", (100, 100))):
        load_image(source, max_pixels=10000)
        with pytest.raises(ImageError, match="max_pixels"):
            load_image(source, max_pixels=9999)


def test_pillows_own_limit(tmp_path, monkeypatch):
    """Pillow refuses above twice MAX_IMAGE_PIXELS: 10000 > 2 * 4999."""
    path = noise_file(tmp_path / "a.png", size=100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
        load_image(path)


def test_zero_pixels():
    for source in (np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0), np.float32), Image.new("RGB", (0, 3))):
        with pytest.raises(ImageError, match="no pixels"):
            load_image(source)


def test_a_plain_rgb_image_is_returned_itself(tmp_path):
    plain = Image.fromarray(checker())
    assert load_image(plain) is plain
    assert type(load_image(save_image(plain, tmp_path / "a.png"))) is Image.Image


def test_the_source_is_left_alone(tmp_path):
    """Metadata, arrays, and a file whose next page is decoded into the same memory."""
    described = Image.fromarray(checker())
    described.info["comment"] = "hello"
    assert load_image(described).info == {} and described.info == {"comment": "hello"}
    array = np.zeros((4, 4, 3), np.uint8)
    load_image(array).putpixel((0, 0), (1, 2, 3))
    assert array.sum() == 0
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    with Image.open(tmp_path / "pages.tif") as file:
        pages = [load_image(page) for page in ImageSequence.Iterator(file)]
    assert [page.getpixel((0, 0)) for page in pages] == [(255, 0, 0), (0, 0, 255)]


def test_only_an_rgb_colour_profile_stays(tmp_path):
    for mode, kept in (("RGB", True), ("CMYK", False)):
        Image.new(mode, (8, 8)).save(tmp_path / "a.jpg", icc_profile=b"profile", comment=b"hello")
        assert load_image(tmp_path / "a.jpg").info == ({"icc_profile": b"profile"} if kept else {})


# --- what RGB does not hold ---


def with_alpha(mode="RGBA"):
    """Random pixels, transparent on the left, half transparent in the middle, opaque on the right."""
    image = Image.fromarray(checker(6, 9))
    alpha = np.repeat(np.array([0, 128, 255], np.uint8), 3)[None].repeat(6, 0)
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_kept_and_unedited_pixels_are_the_file_s(tmp_path, mode):
    image = with_alpha() if mode != "P" else Image.fromarray(checker(6, 9)).quantize(16)
    image = image.convert("LA") if mode == "LA" else image
    image.save(tmp_path / "a.png", **({"transparency": 3} if mode == "P" else {}))
    source = read_source(tmp_path / "a.png")
    np.testing.assert_array_equal(source.rgb, load_image(tmp_path / "a.png"))
    stored = np.asarray(Image.open(tmp_path / "a.png").convert("RGBA")).astype(int)
    back = source.with_pixels(source.rgb)
    assert back.mode == "RGBA" and (np.asarray(back) == stored).all()
    edited = np.asarray(source.rgb).astype(int)
    edited[2:4] = np.clip(edited[2:4] + 9, 0, 255)
    result = np.asarray(source.with_pixels(Image.fromarray(edited.astype(np.uint8)))).astype(int)
    untouched = np.ones((6, 9), bool)
    untouched[2:4] = stored[2:4, :, 3] == 0
    assert (result[untouched] == stored[untouched]).all() and (result[..., 3] == stored[..., 3]).all()
    opaque = stored[..., 3] == 255
    assert (result[opaque][:, :3] == edited[opaque]).all()
    assert source.in_own_mode(back).mode == ("LA" if mode == "LA" else "RGBA")


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB", "P", "CMYK"])
def test_a_result_has_the_file_s_kind_of_mode_and_profile(tmp_path, mode):
    image = Image.new(mode, (5, 4))
    path = tmp_path / ("a.tif" if mode in ("CMYK", "1", "I;16") else "a.png")
    image.save(path, icc_profile=b"profile")
    source = read_source(path)
    result = source.in_own_mode(source.with_pixels(source.rgb))
    assert result.mode == ("L" if mode in ("1", "L", "I;16") else "RGB")
    assert result.info == ({} if mode == "CMYK" else {"icc_profile": b"profile"})
    lost = {"I;16": ("16 bits per channel",), "CMYK": ("CMYK colours", "the colour profile")}
    assert source.lost == lost.get(mode, ())


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_per_colour_are_named(tmp_path, suffix):
    """Pillow reads such files as RGB of 8 bits."""
    images.cv2.imwrite(str(tmp_path / f"a{suffix}"), np.full((5, 4, 3), 300, np.uint16))
    assert read_source(tmp_path / f"a{suffix}").lost == ("16 bits per channel",)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_metadata_go_from_file_to_file(tmp_path, suffix):
    """Date, maker, place and resolution; the pixels are turned, so the orientation is 1 afterwards."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0132], exif[0x010F] = 6, "1987:06:05 04:03:02", "Camera"
    exif[0x8769] = {0x9003: "1987:06:05 04:03:02"}
    Image.fromarray(checker()).save(tmp_path / f"a{suffix}", exif=exif.tobytes(), dpi=(300, 300))
    source = read_source(tmp_path / f"a{suffix}")
    assert source.rgb.size == (6, 8)
    for target in (".png", ".jpg", ".tif", ".webp"):
        with Image.open(save_image(source.rgb, tmp_path / f"b{target}", source.metadata)) as saved:
            found = saved.getexif()
            assert (found.get(0x0112, 1), found[0x0132], found[0x010F]) == (1, "1987:06:05 04:03:02", "Camera")
            assert found.get_ifd(0x8769)[0x9003] == "1987:06:05 04:03:02"
            assert suffix == ".webp" or target == ".webp" or round(saved.info["dpi"][0]) == 300
            assert saved.size == (6, 8)


def test_texts_of_a_png_and_xmp_stay(tmp_path):
    info = images.PngInfo()
    info.add_text("parameters", "a portrait, Steps: 20")
    Image.fromarray(checker()).save(tmp_path / "a.png", pnginfo=info)
    xmp = b'<x tiff:Orientation="6" dc:title="Ana"/>'
    Image.fromarray(checker()).save(tmp_path / "b.jpg", xmp=xmp)
    for name, key, value in (
        ("a.png", "parameters", "a portrait, Steps: 20"),
        ("b.jpg", "XML:com.adobe.xmp", '<x tiff:Orientation="1" dc:title="Ana"/>'),
    ):
        source = read_source(tmp_path / name)
        with Image.open(save_image(source.rgb, tmp_path / "out.png", source.metadata)) as saved:
            assert saved.text == {key: value}


@pytest.mark.parametrize("suffix", [".jpg", ".gif"])
def test_the_comment_of_a_file_stays(suffix, tmp_path):
    Image.fromarray(checker()).save(tmp_path / f"a{suffix}", comment="Grandmother, 1931, \u00c9vian".encode())
    source = read_source(tmp_path / f"a{suffix}")
    for target, where in (("b.png", "Comment"), ("b.jpg", "comment")):
        with Image.open(save_image(source.rgb, tmp_path / target, source.metadata)) as saved:
            found = saved.info[where]
            assert (found.decode() if isinstance(found, bytes) else found) == "Grandmother, 1931, \u00c9vian"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_damaged_metadata_are_named_and_the_image_is_read(tmp_path):
    Image.fromarray(checker()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x0f")
    source = read_source(tmp_path / "a.jpg")
    assert source.rgb.size == (8, 6) and not source.metadata.exif
    save_image(source.rgb, tmp_path / "b.png", source.metadata)


def test_sources_that_are_no_files():
    for source in (checker(), np.dstack([checker(), checker()[..., :1]]), checker()[..., 0], with_alpha("LA")):
        found = read_source(source)
        np.testing.assert_array_equal(found.rgb, load_image(source))
        assert found.metadata == Metadata() and found.lost == ()
    with pytest.raises(TypeError, match="Tensor"):
        read_source(torch.zeros(3, 4, 5))
    with pytest.raises(FileNotFoundError):
        read_source("nowhere.png")


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_frames_are_counted(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / f"one{suffix}")
    assert count_frames(tmp_path / f"a{suffix}") == 3 and count_frames(tmp_path / f"one{suffix}") == 1


def test_previews_are_no_frames(tmp_path):
    """The second image that telephones put in a JPEG, and the smaller copy of a page in a TIFF file."""
    large, small = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (10, 10), "red")
    large.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[small])
    assert count_frames(tmp_path / "phone.jpg") == 1
    assert read_source(tmp_path / "phone.jpg").lost == ("1 further image in the file (MPO)",)
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "scan.tif"), new=True) as pages:
        for page, kind in ((large, 0), (small, 1)):
            page.save(pages, format="TIFF", tiffinfo={254: kind})
            pages.newFrame()
    assert count_frames(tmp_path / "scan.tif") == 1


# --- pixel values ---


def test_pixel_values_by_hand():
    """0, 51, 255 -> -1, 51 / 127.5 - 1 = -0.6, 1."""
    array = np.array([[[0, 51, 255]]], dtype=np.uint8)
    values = to_pixel_values(array)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([-1, -0.6, 1]).reshape(1, 3, 1, 1))


def test_pixel_values_round_trip():
    array = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    images_back = to_pil(to_pixel_values([array, array]))
    assert len(images_back) == 2
    np.testing.assert_array_equal(np.asarray(images_back[1]), array)


def test_to_pil_clamps_and_refuses_nan():
    values = torch.tensor([-2.0, 0, 2]).reshape(3, 1, 1)
    assert to_pil(values)[0].getpixel((0, 0)) == (0, 128, 255)
    assert to_pil(values.bfloat16())[0].getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ValueError, match="NaN"):
        to_pil(values * float("nan"))
    with pytest.raises(ValueError, match=r"\(1, 4, 1, 1\)"):
        to_pil(torch.zeros(1, 4, 1, 1))


def test_a_batch_needs_one_size():
    images = [checker(6, 8), checker(8, 8)]
    with pytest.raises(ValueError, match=r"pass `size`"):
        to_pixel_values(images)
    assert to_pixel_values(images, size=4).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="empty"):
        to_pixel_values([])


def test_size_keeps_the_centre():
    """Of black | white | black the middle third is the centred square."""
    array = np.zeros((32, 96, 3), np.uint8)
    array[:, 32:64] = 255
    torch.testing.assert_close(to_pixel_values(array, size=32), torch.ones(1, 3, 32, 32))


# --- writing ---


def test_save_image(tmp_path):
    save_image(Image.fromarray(checker()), tmp_path / "a.png")
    np.testing.assert_array_equal(as_array(tmp_path / "a.png"), checker())
    assert save_image(checker() / 255, tmp_path / "b.png") == tmp_path / "b.png"
    np.testing.assert_array_equal(as_array(tmp_path / "b.png"), checker())
    save_image(checker()[..., 0], tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == "L"
    for suffix in (".jpg", ".webp", ".bmp", ".tif"):
        assert load_image(save_image(checker(), tmp_path / f"c{suffix}")).size == (8, 6)


def test_save_image_keeps_the_colour_profile(tmp_path):
    image = Image.fromarray(checker())
    image.info["icc_profile"] = b"profile"
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        save_image(image, tmp_path / f"a{suffix}")
        assert Image.open(tmp_path / f"a{suffix}").info["icc_profile"] == b"profile"


def test_save_image_refuses_an_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match="'.xyz'"):
        save_image(checker(), tmp_path / "a.xyz")
    assert not list(tmp_path.iterdir())


# --- OpenCV ---


def test_opencv_is_loaded_on_first_use():
    code = """
        import sys
        import faceprior.images
        assert "cv2" not in sys.modules and "torch" not in sys.modules
        from faceprior.images import cv2
        assert cv2 is sys.modules["cv2"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        ("ImportError('libGL.so.1: cannot open shared object file')", "--no-deps opencv-python-headless"),
        ("ModuleNotFoundError('No module named cv2')", "pip install opencv-python-headless"),
    ],
)
def test_a_broken_opencv_names_the_command(tmp_path, monkeypatch, failure, remedy):
    (tmp_path / "cv2.py").write_text(f"raise {failure}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    with pytest.raises(ImportError, match=remedy):
        images.__getattr__("cv2")


def test_no_other_attribute_appears():
    with pytest.raises(AttributeError, match="cv3"):
        images.cv3  # noqa: B018


def test_an_image_from_memory():
    buffer = io.BytesIO()
    Image.fromarray(checker()).save(buffer, "png")
    np.testing.assert_array_equal(as_array(Image.open(buffer)), checker())


def damaged(fmt: str, seed: int, **options) -> bytes:
    """An image whose file has twelve bytes of noise in its first 600."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, fmt, **options)
    data = bytearray(buffer.getvalue())
    for place in rng.integers(12, min(600, len(data)), 12):
        data[place] = rng.integers(256)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_file_never_raises_anything_else():
    """Pillow's decoders raise RuntimeError for a damaged AVIF and TypeError for a damaged EXIF entry, among others."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 6, "maker", "2026:01:01 00:00:00"
    kinds = {"AVIF": {}, "JPEG": {"exif": exif}, "WEBP": {"exif": exif}, "TIFF": {}, "GIF": {}}
    failed = 0
    for fmt, options in kinds.items():
        for seed in range(40):
            try:
                decode_image(damaged(fmt, seed, **options), "a")
            except ImageError:
                failed += 1
    assert failed > 40


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to decode image"), TypeError("The fill character"), KeyError(1)]
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    path = save_image(checker(), tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.getexif", lambda image: (_ for _ in ()).throw(error))
    with pytest.raises(ImageError, match="a.png"):
        load_image(path)


def test_a_torn_png_is_found_without_decoding_it(tmp_path):
    path = save_image(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8), tmp_path / "a.png")
    assert verify_image(path) == (40, 50)
    whole = path.read_bytes()
    for size in (len(whole) - 20, len(whole) // 2, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ImageError, match="a.png"):
            verify_image(path)
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    with pytest.raises(ImageError, match="a.png"):
        verify_image(path)


def test_a_name_that_is_too_long_is_no_image():
    with pytest.raises(FileNotFoundError, match="no image at xxx"):
        load_image("x" * 300 + ".png")


def test_contact_sheet_fills_its_rows():
    """Three images in rows of two make two rows; the fourth place is grey."""
    sheet = contact_sheet([np.zeros((4, 4, 3), np.uint8)] * 3, columns=2)
    assert sheet.shape == (8, 8, 3)
    assert (sheet[4:, 4:] == 128).all()
