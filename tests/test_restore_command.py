"""`faceprior restore`: formats, faces alone, videos, the report, the summary; called as a user calls it."""

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from html_page import Page
from PIL import Image

from faceprior.cli import main, make_parser
from faceprior.cli import restore as restore_command
from faceprior.cli.options import hyphenated
from faceprior.cli.outcomes import Outcome, Summary, reason_kind
from faceprior.cli.outputs import RECORD_FILE, RestoreRecord
from faceprior.files import atomic_write
from faceprior.html import data_uri, shrunk
from faceprior.images import Metadata, SourceImage, read_source, save_image
from faceprior.procedural import draw_portrait
from faceprior.restorer import AuthFaceRestorer, RestorerSettings
from faceprior.tiny import tiny_controlnet, tiny_sdxl


@pytest.fixture(scope="module")
def restorer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("restorer")
    prior = tiny_sdxl()
    settings = RestorerSettings(
        resolution=128, num_inference_steps=1, guidance_scale=1.0, prompt="", negative_prompt=""
    )
    AuthFaceRestorer.from_prior(prior, tiny_controlnet(prior.unet), settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def restore(restorer, capsys):
    """Run `faceprior restore`; give (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        code = main(["restore", *map(str, arguments), "--checkpoint", restorer, "--detector", "mtcnn"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    return Image.fromarray(draw_portrait(3, 160).image)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def landscape(brightness: int = 1) -> Image.Image:
    return Image.fromarray(skimage.data.coffee()[:48, :48] // brightness)


# ---- formats


def test_formats(tmp_path, restore, portrait):
    """`same` keeps JPEG with profile, EXIF and XMP; a format by name is for all; what it does not hold is said."""
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "1987:06:05 04:03:02"
    described = {"exif": exif, "icc_profile": b"profile", "dpi": (300, 300), "xmp": b"<x:xmpmeta/>"}
    portrait.rotate(90).save(folder / "phone.JPG", quality=95, **described)
    cut = portrait.copy()
    cut.putalpha(Image.linear_gradient("L").resize(portrait.size))
    cut.save(folder / "cut.webp", lossless=True)
    portrait.convert("CMYK").save(folder / "print.tif")
    portrait.save(folder / "flat.ppm")

    code, out, _ = restore(folder, "-o", tmp_path / "same", "--format", "same", "--compare")
    assert code == 0 and "print.tif: 1 face restored, not kept: CMYK colours" in out
    results = {"phone.JPG", "cut.webp", "print.tif", "flat.png"}
    compared = {"phone_compare.JPG", "cut_compare.webp", "print_compare.tif", "flat_compare.png"}
    assert names_in(tmp_path / "same") == results | compared
    with Image.open(tmp_path / "same/phone.JPG") as result:
        assert result.format == "JPEG" and result.info["icc_profile"] == b"profile"
        assert dict(result.getexif()) == {0x0112: 1, 0x0132: "1987:06:05 04:03:02"}
        assert round(result.info["dpi"][0]) == 300 and result.info["xmp"] == b"<x:xmpmeta/>"
    with Image.open(tmp_path / "same/cut.webp") as result:
        assert result.format == "WEBP" and result.mode == "RGBA"
    with Image.open(tmp_path / "same/print_compare.tif") as sheet:
        assert sheet.size == (320, 160)

    code, out, _ = restore(folder, "-o", tmp_path / "jpeg", "--format", "jpeg", "--quality", 60)
    assert code == 0 and "cut.webp: 1 face restored, not kept: transparency (JPEG) ->" in out
    assert names_in(tmp_path / "jpeg") == {"phone.jpg", "cut.jpg", "print.jpg", "flat.jpg"}
    small = (tmp_path / "jpeg/flat.jpg").stat().st_size
    code, out, _ = restore(folder, "-o", tmp_path / "jpeg", "--format", "jpeg", "--quality", 95)
    assert "finished before" not in out and (tmp_path / "jpeg/flat.jpg").stat().st_size > small
    code, out, _ = restore(folder, "-o", tmp_path / "jpeg", "--format", "webp")
    assert names_in(tmp_path / "jpeg") == {"phone.webp", "cut.webp", "print.webp", "flat.webp"}  # the older ones went
    assert "not kept: the resolution in pixels per inch (WebP)" in out


def test_an_image_too_large_for_its_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="a.webp would have 16384x2 pixels, but a WEBP file has at most 16383"):
        save_image(Image.new("RGB", (16384, 2)), tmp_path / "a.webp")
    with pytest.raises(ValueError, match="a JPEG file has at most 65500 on a side: write it as PNG"):
        save_image(Image.new("L", (2, 65501)), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_texts_that_a_jpeg_does_not_hold_are_named(tmp_path, restore, portrait):
    save_image(portrait, tmp_path / "in/a.png", Metadata(text={"Author": "A", "Comment": "c"}))
    _, out, _ = restore(tmp_path / "in", "-o", tmp_path / "out", "--format", "jpeg")
    assert "not kept: texts (Author)" in out
    assert Image.open(tmp_path / "out/a.jpg").info["comment"] == b"c"


def test_pixels_under_transparency_by_hand():
    """(A) opaque: the edit; (B) half transparent: the same change; (C) fully transparent: the file's own, in strips."""
    rgba = np.zeros((600, 3, 4), np.uint8)
    rgba[...] = (100, 150, 200, 255)
    rgba[:, 1, 3], rgba[:, 2, 3] = 128, 0
    source = read_source(Image.fromarray(rgba))
    edited = np.asarray(source.rgb).copy()
    edited[590] = np.clip(edited[590].astype(int) + 20, 0, 255)
    result = np.asarray(source.with_pixels(Image.fromarray(edited)))
    np.testing.assert_array_equal(np.delete(result, 590, axis=0), np.delete(rgba, 590, axis=0))
    change = edited[590].astype(int) - np.asarray(source.rgb)[590]
    np.testing.assert_array_equal(result[590, 0], [120, 170, 220, 255])
    np.testing.assert_array_equal(result[590, 1], [*(np.array([100, 150, 200]) + change[1]), 128])
    np.testing.assert_array_equal(result[590, 2], rgba[590, 2])
    assert isinstance(source, SourceImage)


# ---- faces alone


def test_only_faces(tmp_path, restore, portrait):
    """By photograph and index, beside restored photographs; again, and of a photograph that lost a face."""
    pair = Image.new("RGB", (400, 160), (90, 110, 130))
    pair.paste(portrait, (0, 0))
    pair.paste(Image.fromarray(draw_portrait(4, 160).image).resize((128, 128)), (240, 20))
    pair.save(tmp_path / "pair.png")
    (tmp_path / "in").mkdir()
    pair.save(tmp_path / "in/a.png")
    landscape().save(tmp_path / "in/none.jpg")
    portrait.save(tmp_path / "in/a_face1.jpg")
    output = tmp_path / "out"
    command = [tmp_path / "in", "-o", output]
    assert restore(*command)[0] == 0
    photographs = {"a.png", "none.jpg", "a_face1.png"}
    assert names_in(output) == photographs

    code, out, err = restore(*command, "--only-faces", "--report", tmp_path / "faces.html")
    faces = {"a.png_face1.png", "a.png_face2.png", "a_face1_face1.png"}
    assert code == 0 and names_in(output) == photographs | faces
    assert "a.png: 2 faces restored -> " in out and "none.jpg: no face found\n" in out
    assert {Image.open(output / name).size for name in faces} == {(128, 128)}
    assert "3 files: 3 faces restored, 1 file without a face" in err
    code, out, err = restore(*command, "--only-faces")
    assert out.count("finished before") == 3 and "3 files: 3 faces restored, 1 file without a face" in err
    assert restore(*command)[1].count("finished before") == 3

    portrait.save(tmp_path / "in/a.png")
    restore(*command, "--only-faces")
    assert names_in(output) == photographs | faces - {"a.png_face2.png"}


def test_faces_overwrite_neither_inputs_nor_files_of_others(tmp_path, restore, portrait):
    (tmp_path / "in").mkdir()
    pair = Image.new("RGB", (400, 160), (90, 110, 130))
    pair.paste(portrait, (0, 0))
    pair.paste(portrait, (230, 0))
    pair.save(tmp_path / "in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a_face2.png").write_bytes(b"my own")  # the first is free
    code, out, err = restore(tmp_path / "in", "-o", tmp_path / "out", "--only-faces")
    assert code == 1 and "a_face2.png exists, and no run of `faceprior restore` of" in err
    assert (tmp_path / "out/a_face2.png").read_bytes() == b"my own" and not (tmp_path / "out/a_face1.png").exists()
    portrait.save(tmp_path / "in/a_face2.png")
    code, out, err = restore(tmp_path / "in", "-o", tmp_path / "in", "--only-faces")
    assert code == 1 and "would overwrite the input" in err
    with Image.open(tmp_path / "in/a_face2.png") as image:
        assert image.size == (160, 160)


def test_aligned_faces_are_counted_and_what_they_lose_is_said(tmp_path, restore, portrait):
    portrait.save(tmp_path / "a.jpg")
    see_through = portrait.convert("RGBA")
    see_through.putalpha(100)
    see_through.save(tmp_path / "b.png")
    code, out, err = restore(tmp_path / "a.jpg", tmp_path / "b.png", "-o", tmp_path / "out", "--aligned")
    assert code == 0 and "2 files: 2 faces restored" in err and "without a face" not in err
    assert "a.jpg: restored as an aligned face -> " in out
    assert "b.png: restored as an aligned face, not kept: transparency -> " in out


# ---- places that cannot be written to


def test_nothing_is_written_through_a_link(tmp_path, restore, portrait):
    """One of the results was replaced by a link to a photograph elsewhere; then the settings change."""
    portrait.save(tmp_path / "a.jpg")
    portrait.save(tmp_path / "precious.png")
    precious = (tmp_path / "precious.png").read_bytes()
    assert restore(tmp_path / "a.jpg", "-o", tmp_path / "out")[0] == 0
    (tmp_path / "out/a.png").unlink()
    (tmp_path / "out/a.png").symlink_to(tmp_path / "precious.png")
    code, _, err = restore(tmp_path / "a.jpg", "-o", tmp_path / "out", "--seed", "5")
    assert code == 2 and "a.png exists, and no run of `faceprior restore` wrote it" in err
    assert (tmp_path / "precious.png").read_bytes() == precious


@pytest.mark.parametrize(
    "change",
    [
        {"base": "../precious", "outputs": {"result": "../precious.png"}},
        {"outputs": {"result": "/precious.png"}},
        {"outputs": {"result": 5}},
        {"removed": ["../precious.png"]},
        {"faces": {"left": 5}},
    ],
    ids=str,
)
def test_a_record_names_no_file_outside_of_its_folder(tmp_path, restore, portrait, change):
    """As that of an archive from elsewhere might, whose results are gone."""
    portrait.save(tmp_path / "a.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "precious.png").write_bytes(b"mine")
    row = {"source": "../a.jpg", "base": "a", "outputs": {"result": "a.png"}, "settings": "other", **change}
    (tmp_path / "out" / RECORD_FILE).write_text(json.dumps(row) + "\n")
    code, _, err = restore(tmp_path / "a.jpg", "-o", tmp_path / "out")
    assert code == 2 and "is damaged" in err and "start over with --overwrite" in err
    assert restore(tmp_path / "a.jpg", "-o", tmp_path / "out", "--overwrite")[0] == 0
    assert names_in(tmp_path) == {"a.jpg", "precious.png", "out/a.png"}
    assert (tmp_path / "precious.png").read_bytes() == b"mine"


def test_places_that_cannot_be_written_to_are_said_before_a_face_is_restored(tmp_path, restore, portrait, monkeypatch):
    portrait.save(tmp_path / "a.png")
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / ".r.html.part").write_bytes(b"mine, too")
    monkeypatch.setattr(AuthFaceRestorer, "restore_all", None)
    for output, report, reason in (
        (tmp_path / "file/out", None, "-o: nothing can be written to"),
        (tmp_path / "out", tmp_path / "file/r.html", "--report: nothing can be written to"),
        (tmp_path / "out", tmp_path / "r.html", ".r.html.part, where --report keeps its cards, is no file of"),
        (tmp_path / "out", tmp_path / f"{'r' * 248}.html", "the name is too long"),
    ):
        code, out, err = restore(tmp_path / "a.png", "-o", output, *(("--report", report) if report else ()))
        assert code == 2 and not out and reason in err
    assert (tmp_path / ".r.html.part").read_bytes() == b"mine, too" and not names_in(tmp_path / "out")


def test_a_full_disk_ends_the_run(tmp_path, restore, portrait, monkeypatch):
    """The second of three results does not fit; the third is not restored for nothing."""
    for name in "abc":
        portrait.save(tmp_path / f"{name}.png")
    written = []

    def save(image, path, *rest, **options):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(save_image(image, path, *rest, **options))

    monkeypatch.setattr(restore_command, "save_image", save)
    images = [tmp_path / f"{name}.png" for name in "abc"]
    code, _, err = restore(*images, "-o", tmp_path / "out")
    assert code == 2 and "error: the disk is full" in err and "2 not reached: the same command resumes" in err
    monkeypatch.undo()
    code, out, err = restore(*images, "-o", tmp_path / "out")
    assert code == 0 and out.count("finished before") == 1 and "3 files: 3 faces restored" in err


def test_what_a_kill_left_goes_with_the_next_run(tmp_path, restore, portrait):
    (tmp_path / "in/sub").mkdir(parents=True)
    portrait.save(tmp_path / "in/sub/a.png")
    (tmp_path / "out/sub").mkdir(parents=True)
    (tmp_path / "out/sub/.faceprior-0a.tmp").write_bytes(b"half an image")
    with atomic_write(tmp_path / "out/sub/of_another_process.png") as file:
        assert restore(tmp_path / "in", "-o", tmp_path / "out")[0] == 0
        file.write(b"whole")
    assert names_in(tmp_path / "out") == {"sub/a.png", "sub/of_another_process.png"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_list_with_blank_lines(tmp_path, restore, portrait, monkeypatch):
    portrait.save(tmp_path / "a.png")
    lines = b"\xef\xbb\xbf" + os.fsencode(tmp_path / "a.png") + b"\r\n\r\n   \n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code, _, err = restore("-", "-o", tmp_path / "out")
    assert code == 0 and "1 file: 1 face restored" in err


# ---- videos


def test_videos_beside_photographs(tmp_path, restore, portrait):
    av = pytest.importorskip("av")
    (tmp_path / "in").mkdir()
    portrait.save(tmp_path / "in/a.png")
    for name, image in (("film.mp4", portrait), ("empty.avi", Image.new("RGB", (160, 160)))):
        with av.open(str(tmp_path / "in" / name), "w") as output:
            video = output.add_stream("libx264", rate=25)
            video.width, video.height, video.pix_fmt = 160, 160, "yuv420p"
            for _ in range(4):
                output.mux(video.encode(av.VideoFrame.from_image(image)))
            output.mux(video.encode(None))
    (tmp_path / "in/torn.mov").write_bytes((tmp_path / "in/film.mp4").read_bytes()[:300])
    (tmp_path / "in/song.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(50))
    command = [tmp_path / "in", "-o", tmp_path / "out", "--report", tmp_path / "r.html", "--compare"]
    code, out, err = restore(*command)
    assert code == 1 and "torn.mov cannot be read" in err and "1 of 4 images failed" in err
    assert "film.mp4: 1 face restored in 4 of 4 frames" in out
    assert "empty.avi: no face found in 4 frames, copied as it is" in out
    assert names_in(tmp_path / "out") == {"a.png", "a_compare.png", "film.mp4", "empty.avi"}
    with av.open(str(tmp_path / "out/film.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 4 and np.abs(frames[0] - np.asarray(portrait))[50:110, 50:110].mean() > 3
    assert (tmp_path / "out/empty.avi").read_bytes() == (tmp_path / "in/empty.avi").read_bytes()
    code, out, _ = restore(*command)
    assert out.count("finished before") == 3
    judged = ("--scorer", "tiny", "--min-gain", "99", "--detector", "mtcnn")
    _, out, _ = restore(tmp_path / "in/film.mp4", "-o", tmp_path / "judged", *judged)
    assert "1 face restored in 4 of 4 frames; --scorer left no face, as a video would flicker" in out
    code, _, err = restore(tmp_path / "in/film.mp4", "-o", tmp_path / "faces", "--only-faces")
    assert code == 1 and "film.mp4 is a video, which --only-faces does not take" in err
    assert not names_in(tmp_path / "faces")


# ---- the report


@pytest.fixture
def archive(tmp_path, portrait) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    portrait.save(folder / 'b <i>&"quoted"\'.png')
    Image.fromarray(draw_portrait(4, 160).image).save(folder / "c.png")
    landscape().save(folder / "a.png")
    (folder / "torn.png").write_bytes((folder / "c.png").read_bytes()[:2000])
    return folder


def test_the_report_of_a_run(archive, tmp_path, restore):
    """Complete in itself, in the files' order, escaped; a second run takes its cards, also those of a changed file."""
    report, command = tmp_path / "deep/report.html", [archive, "-o", tmp_path / "out", "--report"]
    code, out, err = restore(*command, report)
    assert code == 1 and f"report: {report}" in err
    assert "4 files: 2 faces restored, 1 file without a face, 1 failed" in err
    page, text = Page(report), report.read_text()
    assert page.balanced and page.count("article", "photograph") == 3 and page.count("div", "slider") == 2
    assert page.text.index("in/a.png") < page.text.index('b <i>&"quoted"\'.png') < page.text.index("in/c.png")
    assert "torn.png is truncated" in page.text and "face 1: restored" in page.text and "<i>&" not in text
    sources = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    assert sources and all(source.startswith("data:") for source in sources)
    assert not (tmp_path / "deep/.report.html.part").exists()

    restore(*command, report)
    again = Page(report)
    assert again.count("div", "slider") == 2 and "finished before" not in again.text  # the cards of the first run
    Image.fromarray(draw_portrait(5, 160).image).save(archive / "c.png")
    code, out, _ = restore(*command, report)
    assert out.count("finished before") == 2 and Page(report).count("article", "photograph") == 3
    assert re.findall(r"data:image/webp[^\"]*", report.read_text()) != re.findall(r"data:image/webp[^\"]*", text)

    report.unlink()
    restore(*command, report)  # by what lies on the disk
    page = Page(report)
    assert page.count("div", "slider") == 2 and "an earlier run, without a report, restored it" in page.text


def test_a_report_overwrites_nothing_of_others(archive, tmp_path, restore):
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    for name, reason in (
        ("mine.html", "exists, and no run of `faceprior restore` wrote it"),
        ("report.txt", "has to end in .html"),
        ("in", "has to end in .html"),
    ):
        code, out, err = restore(archive, "-o", tmp_path / "out", "--report", tmp_path / name)
        assert code == 2 and not out and reason in err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>" and not (tmp_path / "out").exists()


def test_ctrl_c_keeps_the_report_and_a_kill_its_cards(archive, tmp_path, restore, monkeypatch):
    report, command = tmp_path / "r.html", [archive, "-o", tmp_path / "out", "--report", tmp_path / "r.html"]
    original, calls = RestoreRecord.finish, iter(range(9))

    def stop(*arguments, **options):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as stopped:
        stopped.setattr(RestoreRecord, "finish", stop)
        code, out, err = restore(*command)
    assert code == 130 and "3 not reached: the same command resumes" in err
    page = Page(report)
    assert page.balanced and page.count("article", "photograph") >= 1 and "in/a.png" in page.text

    # a kill: no page, and a part with a torn card
    cards = report.read_bytes()
    start = cards.index(b"<!--card ")
    end = cards.index(b"<!--/card-->\n") + len(b"<!--/card-->\n")
    report.unlink()
    (tmp_path / ".r.html.part").write_bytes(cards[start:end] + b"<!--card 00-->\n<article>")
    code, out, err = restore(*command)
    page = Page(report)
    assert code == 1 and out.count("finished before") == 1 and page.balanced
    assert page.count("article", "photograph") == 3 and "without a report" not in page.text
    assert not (tmp_path / ".r.html.part").exists()


def test_embedded_images_are_bounded():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8))
    assert shrunk(noise, 300).size == (300, 233) and shrunk(noise, 1000) is noise
    uri = data_uri(noise, 300, "WEBP")
    assert uri.startswith("data:image/webp;base64,") and len(uri) < len(data_uri(noise, 300))


# ---- the summary, and options


def test_the_summary_names_the_common_reasons():
    summary = Summary(9)
    for gain in (0.1, -0.25):
        summary.add(Outcome("a", "", 1, (f"Face Score would fall by {gain}", "it has no landmarks")))
    summary.add(Outcome("b", "", 0, ("Face Score would fall by 12",)))
    summary.add(Outcome("c", ""))
    summary.add(Outcome("d", "error", error="torn"))
    assert summary.text == (
        "9 files: 2 faces restored, 5 left (3: Face Score would fall by …; 2: it has no landmarks), 1 file without a"
        " face, 1 failed, 4 not reached: the same command resumes"
    )
    assert reason_kind("from 1.5 to -0.25, by 3 only.") == "from … to …, by … only."
    assert reason_kind("it is sharper: 349 pixels against 128") == "it is sharper"


def test_options_with_underscores():
    words = ["restore", "--keep_better", "--min_gain=a_b", "x_y.png", "--", "--in_put"]
    assert hyphenated(words) == ["restore", "--keep-better", "--min-gain=a_b", "x_y.png", "--", "--in_put"]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], "nothing to restore"),
        (["a.png"], "-o DIR is missing"),
        (["a.png", "-o", "out", "--min-gain", "1"], "add --keep-better"),
        (["a.png", "-o", "out", "--process-size", "64"], "leave it out"),
        (["a.png", "-o", "out", "--aligned", "--only-faces"], "do not go together"),
        (["a.png", "-o", "out", "--aligned", "--scorer", "tiny"], "--aligned writes every face"),
    ],
)
def test_options_that_do_not_go_together(options, rule, capsys):
    assert main(["restore", *options]) == 2
    assert rule in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--quality=0", "--fidelity=1.5", "--max-drift=-1", "--steps=0", "--upscale=1.5"])
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["restore", "a.png", "-o", "out", option])
    assert stop.value.code == 2 and "has to be" in capsys.readouterr().err


def test_every_help_line_says_what_an_option_is():
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        make_parser().parse_args(["restore", "--help"])
    for group in ("what is written", "which faces are restored", "how a face is restored", "model, speed and memory"):
        assert f"{group}:" in text.getvalue()
    for option in ("--recipe", "--keep-better", "--plan", "--only-faces", "--report", "--offload", "--max-drift"):
        assert option in text.getvalue()


def test_an_enlargement_out_of_range_stops_before_the_first_image(tmp_path, restore, portrait):
    portrait.save(tmp_path / "a.png")
    code, out, err = restore(tmp_path / "a.png", "-o", tmp_path / "out", "--upscale", "8")
    assert code == 2 and not out and "from 1 to 4 but is 8" in err and "resumes" not in err


def test_aligned_faces_are_counted_as_restored(tmp_path, restore, portrait):
    portrait.save(tmp_path / "face.png")
    portrait.resize((160, 120)).save(tmp_path / "wide.png")
    code, out, err = restore(tmp_path, "-o", tmp_path / "out", "--aligned", "--upscale", "2")
    assert f"face.png: restored as an aligned face -> {tmp_path}/out/face.png" in out
    assert code == 1 and "wide.png: an aligned face has to be square but is 160 x 120" in err
    assert "2 files: 1 face restored, 1 failed" in err and "without a face" not in err
    assert "2 files: 1 face restored" in restore(tmp_path, "-o", tmp_path / "out", "--aligned", "--upscale", "2")[2]


def test_offload_needs_a_gpu(tmp_path, restore, portrait):
    portrait.save(tmp_path / "a.png")
    code, out, err = restore(tmp_path / "a.png", "-o", tmp_path / "out", "--offload", "model", "--device", "cpu")
    assert code == 2 and not out and "--offload model frees a GPU's memory" in err
    assert not (tmp_path / "out").exists()


# ---- what is found


def test_second_names_and_hidden_images_are_said(tmp_path, restore, portrait, caplog):
    (tmp_path / "in/.thumbs").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("a.png", ".hidden.png", ".thumbs/t.png"):
        landscape().save(tmp_path / "in" / name)
    os.link(tmp_path / "in/a.png", tmp_path / "in/hard.png")
    (tmp_path / "in/b.png").symlink_to(tmp_path / "in/a.png")
    (tmp_path / "other/c.png").symlink_to(tmp_path / "in/a.png")
    with caplog.at_level("INFO", logger="faceprior.files"):
        code, out, err = restore(tmp_path / "in", tmp_path / "other", "-o", tmp_path / "out")
    assert code == 0 and names_in(tmp_path / "out") == {"a.png", "hard.png"}
    assert any("2 hidden images skipped" in line and ".hidden.png" in line for line in caplog.messages)
    assert any(f"{tmp_path}/in/b.png is {tmp_path}/in/a.png" in line for line in caplog.messages)
    assert f"{tmp_path}/other/c.png: the same file as {tmp_path}/in/a.png, taken once" in err


# ---- memory


def status(process: subprocess.Popen, key: str) -> int:
    """A number of the kernel about a process, in bytes."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()).group(1)) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory from Linux")
def test_memory_stays_bounded(tmp_path, restorer):
    """After photograph 400 at most 300 MB above photograph 10, with comparisons and a report."""
    photographs = [Image.fromarray(draw_portrait(seed, 160).image) for seed in range(8)]
    (tmp_path / "in").mkdir()
    for number in range(400):
        photographs[number % 8].save(tmp_path / f"in/{number:03d}.jpg", quality=70 + number // 16)
    command = [sys.executable, "-m", "faceprior", "restore", tmp_path / "in", "-o", tmp_path / "out", "--compare"]
    command += ["--report", tmp_path / "r.html", "--format", "same", "--checkpoint", restorer, "--detector", "mtcnn"]
    resident = {}
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True)
        for number, _ in enumerate(process.stdout, 1):
            if number in (10, 399):
                resident[number] = status(process, "VmRSS")
        assert process.wait() == 0, (tmp_path / "errors").read_text()
    assert number == 400 and resident[399] - resident[10] < 300e6
    assert Page(tmp_path / "r.html").count("article", "photograph") == 400
    rows = [json.loads(line) for line in (tmp_path / "out/.faceprior-restored.jsonl").read_text().splitlines()]
    assert len({row["source"] for row in rows if "settings" in row}) == 400
    assert restore_command.COMPARED == 4096
