"""Files: which of them are images, names and their order, writing whole or not at all."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from faceprior.files import atomic_write, content_mark, copy_file, find_images, natural_key, relative_stem, utf8_text
from faceprior.images import ImageError, load_image


def checker(height=6, width=8):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def touch(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_of(files, root):
    return [file.relative_to(root).as_posix() for file in files]


def test_a_folder_in_natural_order(tmp_path):
    touch(tmp_path, "img10.png", "img2.PNG", "Img1.jpg", "sub/b.png", "notes.txt", ".hidden.png", ".git/a.png")
    assert names_of(find_images(tmp_path), tmp_path) == ["Img1.jpg", "img2.PNG", "img10.png", "sub/b.png"]
    assert names_of(find_images(tmp_path, recursive=False), tmp_path) == ["Img1.jpg", "img2.PNG", "img10.png"]


def encoded(kind, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(checker()).convert(mode).save(file, kind)
    return file.getvalue()


HEIC = b"\0\0\0\x18ftypheic" + b"\0" * 200


@pytest.mark.parametrize("pattern", ["", "*"])
def test_the_content_decides_what_is_an_image(tmp_path, pattern, caplog):
    """Whatever its suffix; captions of images and hidden files are no news, all others are counted and named."""
    files = {
        "old.jfif": encoded("JPEG"), "old.jpe": encoded("JPEG"), "new.jp2": encoded("JPEG2000"), "none": encoded("PNG"),
        "a.jpg~": encoded("JPEG"), "p.dat": encoded("PPM"), "t.tga": encoded("TGA"), "phone.heic": HEIC, "phone": HEIC,
        "phone.txt": b"a woman", "none.json": b"{}", "old_qwen.json": b"{}", ".hidden": b"", "torn.jpe": b"",
        "notes.txt": b"Python P1", "raw.nef": encoded("TIFF"), "film.mpg": b"\0\0\1\xb3", "empty": b"",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with caplog.at_level("INFO", logger="faceprior.files"):
        found = find_images(tmp_path / pattern)
    expected = ["a.jpg~", "new.jp2", "none", "old.jfif", "old.jpe", "p.dat", "phone", "phone.heic", "t.tga", "torn.jpe"]
    assert names_of(found, tmp_path) == expected
    (line,) = caplog.messages
    others = ", ".join(str(tmp_path / name) for name in ("empty", "film.mpg", "notes.txt", "raw.nef"))
    assert line == f"4 files skipped that are no images: {others}"
    for path in (tmp_path / "p.dat", tmp_path / "t.tga", tmp_path / "none"):
        np.testing.assert_array_equal(np.asarray(load_image(path)), checker())


def test_a_folder_without_images_names_what_is_in_it(tmp_path):
    touch(tmp_path, *(f"{number}.md" for number in range(5)))
    with pytest.raises(
        ValueError, match=r"no images in .*: 5 files skipped that are no images: .*0.md, .*2.md and 2 more"
    ):
        find_images(tmp_path)


def test_heic_names_the_package_or_is_read_by_it(tmp_path, monkeypatch):
    """Here pillow-heif is a module that knows how to read one file."""
    (tmp_path / "phone.heic").write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="phone.heic is a HEIC image: `pip install pillow-heif`"):
        load_image(tmp_path / "phone.heic")

    def register():
        Image.register_open("HEIF", lambda file, name: Image.fromarray(checker()), lambda start: start[4:8] == b"ftyp")

    for registry in ("OPEN", "ID"):
        monkeypatch.setattr(Image, registry, getattr(Image, registry).copy())
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "phone.heic")), checker())


def test_files_folders_and_globs_keep_their_order_without_duplicates(tmp_path):
    touch(tmp_path, "a/1.png", "a/2.png", "b/3.png", "odd.dat")
    found = find_images(tmp_path / "odd.dat", tmp_path / "b", str(tmp_path / "*/*.png"), tmp_path / "a" / "2.png")
    assert names_of(found, tmp_path) == ["odd.dat", "b/3.png", "a/1.png", "a/2.png"]


def test_globs(tmp_path):
    touch(tmp_path, "a/1.png", "a/deep/2.png", "a/x.txt", "[b].png")
    assert names_of(find_images(str(tmp_path / "**/*.png")), tmp_path) == [
        "[b].png",
        "a/1.png",
        "a/deep/2.png",
    ]
    assert names_of(find_images(str(tmp_path / "a*")), tmp_path) == ["a/1.png", "a/deep/2.png"]
    assert names_of(find_images(tmp_path / "[b].png"), tmp_path) == ["[b].png"]
    with pytest.raises(FileNotFoundError, match=r"c\*"):
        find_images(str(tmp_path / "c*"))
    with pytest.raises(ValueError, match="no images"):
        find_images(str(tmp_path / "a/*.txt"))


def test_what_is_not_there(tmp_path):
    touch(tmp_path, "full/a.png", "empty/notes.txt")
    with pytest.raises(FileNotFoundError, match="gone"):
        find_images(tmp_path / "full", tmp_path / "gone")
    with pytest.raises(ValueError, match="no images in .*empty"):
        find_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="at least one"):
        find_images()


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "real/a.png")
    os.symlink(tmp_path, tmp_path / "real" / "loop")
    os.symlink(tmp_path / "real" / "a.png", tmp_path / "same.png")
    assert len(find_images(tmp_path)) == 1


def test_links_that_lead_nowhere_are_listed_and_named(tmp_path):
    touch(tmp_path, "a.png")
    os.symlink("nowhere.png", tmp_path / "broken.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("nowhere", tmp_path / "no_picture")
    for found in (find_images(tmp_path), find_images(tmp_path / "*.png")):
        assert names_of(found, tmp_path) == ["a.png", "broken.png", "loop.png"]
    for name, target in (("broken.png", "nowhere.png"), ("loop.png", "loop.png")):
        with pytest.raises(ImageError, match=f"{name} is a link that leads nowhere: {target} does not exist"):
            load_image(tmp_path / name)


def test_natural_key_is_a_total_order():
    names = ["a", "A", "a1", "a01", "a1b", "1", "10", "9z", "b²", ""]
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key)


def test_relative_stem():
    assert relative_stem("in/a/x.tar.png", "in") == Path("a/x.tar")
    assert relative_stem("in/a/x.png", "in", "in/a") == Path("x")
    assert relative_stem("elsewhere/x.png", "in") == Path("x")
    assert relative_stem("in/x.png", "in/x.png") == Path("x")


def test_atomic_write_makes_folders_and_leaves_no_trace(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path, "w") as file:
        file.write("é")
        assert not path.exists()
    assert path.read_bytes() == "é".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127 + "x", "祖" * 85], ids=["ascii", "latin", "han"])
def test_atomic_write_takes_the_longest_names(tmp_path, name):
    """A name has 255 bytes at most."""
    with atomic_write(tmp_path / name) as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_follows_links_and_the_umask(tmp_path):
    target = tmp_path / "target"
    target.touch()
    os.symlink(target, tmp_path / "link")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"x")
    assert target.read_bytes() == b"x" and (tmp_path / "link").is_symlink()
    touch(tmp_path, "plain")
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match="mode"), atomic_write(target, "a"):
        pass


def test_a_copied_file_is_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"any bytes")
    assert copy_file(tmp_path / "a", tmp_path / "new/b").read_bytes() == b"any bytes"


def test_a_name_is_the_same_text_in_every_locale():
    for name in ("祖母 100%.png", b"caf\xe9.png".decode(errors="surrogateescape")):
        under_ascii = name.encode(errors="surrogateescape").decode("ascii", "surrogateescape")
        assert utf8_text(name) == utf8_text(under_ascii) == name


def test_the_mark_of_contents_is_that_of_a_copy_and_of_no_other_file(tmp_path):
    """Of a small file every byte counts, of a large one every 512th part; of a folder its weights by their names."""
    small, large, folder = tmp_path / "a.txt", tmp_path / "b.bin", tmp_path / "model"
    small.write_bytes(b"x" * 1000)
    large.write_bytes(bytes(4_000_000))
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/x.safetensors").write_bytes(b"1")
    before = {path: content_mark(path) for path in (small, large, folder)}
    assert all(len(mark) == 8 for mark in before.values())
    assert content_mark(copy_file(small, tmp_path / "c")) == before[small]
    small.write_bytes(b"x" * 999 + b"y")
    with open(large, "r+b") as file:
        file.seek(1_000_000)
        file.write(b"1" * 8000)
    (folder / "config.json").touch()
    (folder / "resume").mkdir()
    (folder / "resume/x.safetensors").touch()
    assert content_mark(folder) == before[folder]
    (folder / "unet/x.safetensors").rename(folder / "unet/y.safetensors")
    assert all(content_mark(path) != mark for path, mark in before.items())
    assert content_mark(tmp_path / "none") == ""


def test_the_mark_of_a_model_is_of_what_is_loaded(tmp_path):
    """Another format beside a pipeline, and beside a LoRA, is no other model."""
    touch(tmp_path, "model_index.json", "unet/config.json", "lora/old.json")
    for name in ("unet/x.safetensors", "lora/pytorch_lora_weights.safetensors"):
        (tmp_path / name).write_bytes(b"1")
    before = content_mark(tmp_path), content_mark(tmp_path / "lora")
    for name in ("whole.safetensors", "lora/kohya.safetensors"):
        (tmp_path / name).write_bytes(b"2")
    assert (content_mark(tmp_path), content_mark(tmp_path / "lora")) == before
    for name in ("unet/x.safetensors", "lora/pytorch_lora_weights.safetensors"):
        (tmp_path / name).write_bytes(b"3")
    assert not {content_mark(tmp_path), content_mark(tmp_path / "lora")} & {*before}
