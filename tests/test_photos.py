"""Photographs from folders, globs, lists and shards: names, captions, damage."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from faceprior.images import ImageError, save_image
from faceprior.photos import (
    CaptionError,
    Member,
    Photograph,
    expand_braces,
    find_photographs,
    parse_caption,
    read_shard,
)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, kind)
    return file.getvalue()


def write_shard(path, members: dict[str, bytes], **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(photographs) -> list[str]:
    return [photograph.name for photograph in photographs]


# -------------------------------------------------------------------------------- files, globs and lists


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(("b/1.png", "b/2.jpg", "a/1.png")):
        save_image(pixels(number), tmp_path / "photos" / name)
    (tmp_path / "photos/b/1.txt").write_text("a woman")
    (tmp_path / "photos/a/1.json").write_text('{"caption": "a man"}')
    return tmp_path / "photos"


def test_a_folder(photos):
    found, problems = find_photographs(str(photos))
    assert names(found) == ["a/1.png", "b/1.png", "b/2.jpg"] and not problems
    assert [photograph.caption() for photograph in found] == ["a man", "a woman", None]
    assert (np.asarray(found[1].load()) == pixels(0)).all()


def test_names_are_the_same_in_every_locale(tmp_path):
    """Under an ASCII locale Python holds the bytes of other file names as lone surrogates."""
    (tmp_path / "祖母.png").touch()
    code = (
        f"from faceprior.photos import find_photographs as f; print(ascii([p.name for p in f({str(tmp_path)!r})[0]]))"
    )
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}):
        run = subprocess.run([sys.executable, "-c", code], env=os.environ | locale, capture_output=True, text=True)
        assert run.stdout.strip() == ascii(["祖母.png"]), run.stderr


def test_names_stay_when_photographs_are_added_or_removed(photos):
    """They are relative to the folder that was named, not to the deepest one that holds all of the images."""
    (photos / "a/1.png").unlink()
    assert names(find_photographs(str(photos))[0]) == ["b/1.png", "b/2.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos/*/1.png", ["a/1.png", "b/1.png"]),
        ("photos/b/*", ["1.png", "2.jpg"]),
        ("photos/{a,b}/1.png", ["a/1.png", "b/1.png"]),
        ("photos/b/1.png", ["1.png"]),
    ],
)
def test_globs_braces_and_single_files(photos, monkeypatch, pattern, expected):
    monkeypatch.chdir(photos.parent)
    assert names(find_photographs(pattern)[0]) == expected
    assert names(find_photographs(str(photos.parent / pattern))[0]) == expected


def test_a_list(photos, tmp_path):
    """Relative paths begin at the list's folder; what is not there is for the one who reads it."""
    elsewhere = save_image(pixels(9), tmp_path / "other/9.png")
    lines = ["b/1.png", "", "  a/1.png  ", "b/1.png", "missing.png", str(elsewhere), "no image.txt"]
    (photos / "list.txt").write_text("\ufeff" + "\r\n".join(lines))
    found, problems = find_photographs(str(photos / "list.txt"))
    assert names(found) == [str(elsewhere), "a/1.png", "b/1.png", "missing.png", "no image.txt"] and not problems
    assert (np.asarray(found[0].load()) == pixels(9)).all() and found[1].caption() == "a man"
    for photograph in found[3:]:
        with pytest.raises(FileNotFoundError, match=photograph.name):
            photograph.load()


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp"])
def test_a_file_of_several_images_is_no_photograph(tmp_path, suffix):
    first, second = (Image.fromarray(pixels(seed)) for seed in range(2))
    first.save(tmp_path / f"moving{suffix}", save_all=True, append_images=[second])
    (photograph,) = find_photographs(str(tmp_path))[0]
    with pytest.raises(ImageError, match=f"moving{suffix} holds 2 frames or pages, a photograph is one: extract them"):
        photograph.load()


def test_a_list_in_utf_16(photos):
    (photos / "list.txt").write_text("b/1.png\r\na/1.png", encoding="utf-16")
    assert names(find_photographs(str(photos / "list.txt"))[0]) == ["a/1.png", "b/1.png"]


def test_an_empty_list(tmp_path):
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="list.txt lists no photograph: it has to contain one path per line"):
        find_photographs(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("name", ["nowhere", "nowhere/*.png", "nowhere.txt", "nowhere.tar", "{0..1}.tar", "no*.tar"])
def test_what_is_not_there_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="nowhere|0.tar|no"):
        find_photographs(str(tmp_path / name))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("s/{008..010}.tar", ["s/008.tar", "s/009.tar", "s/010.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a,}x{b", ["ax{b", "x{b"]),
        ("{a}{}", ["{a}{}"]),
    ],
)
def test_braces_as_in_a_shell(pattern, expected):
    assert expand_braces(pattern) == expected


def test_braces_that_count_downwards():
    with pytest.raises(ValueError, match=r"`\{3..1\}` in x\{3..1\} counts downwards"):
        expand_braces("x{3..1}")


# ------------------------------------------------------------------------------------------------ shards

MEMBERS = {
    "0001.jpg": encoded(1, "JPEG"), "0001.txt": b"a  woman\n", "0001.json": b'{"caption": "not this one"}',
    "0002.json": json.dumps({"caption": "a man"}).encode(), "0002.png": encoded(2),  # sidecar first
    "sub/0001.WEBP": encoded(3, "WEBP"), "0003.seg.png": encoded(4), "0004.txt": b"no image",
}  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard(tmp_path, form):
    """Keys, sidecars before and after the image, long names; `0003.seg.png` is no image but another's mask."""
    long = "f" * 90 + "/" + "n" * 90
    shard = write_shard(tmp_path / "0.tar", {**MEMBERS, f"{long}.png": encoded(5), f"{long}.txt": b"long"}, format=form)
    found, problems = find_photographs(str(shard))
    assert not problems
    expected = ["0.tar/0001.jpg", "0.tar/0002.png", f"0.tar/{long}.png", "0.tar/sub/0001.WEBP"]
    assert names(found) == expected
    assert [photograph.caption() for photograph in found] == ["a woman", "a man", "long", None]
    assert (np.asarray(found[1].load()) == pixels(2)).all() and (np.asarray(found[2].load()) == pixels(5)).all()
    assert found[0].load().size == found[3].load().size == (30, 20)


def test_shards_of_several_folders_by_braces_and_globs(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"{number}/00{number}.tar", {"1.png": encoded(number)})
    for pattern in ("{0..1}/00{0..1}.tar", "*/*.tar"):
        if "{" in pattern:
            with pytest.raises(FileNotFoundError, match="0/001.tar"):
                find_photographs(str(tmp_path / pattern))
            continue
        found, _ = find_photographs(str(tmp_path / pattern))
        assert names(found) == ["0/000.tar/1.png", "1/001.tar/1.png"]
        assert (np.asarray(found[1].load()) == pixels(1)).all()


def test_folders_links_and_dots_in_a_shard(tmp_path):
    """A tar of `.`: folders are skipped, and a link out of it is no image."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("./", tarfile.DIRTYPE), ("./link.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("./1.png")
        info.size = len(encoded(1))
        tar.addfile(info, io.BytesIO(encoded(1)))
    assert names(read_shard(tmp_path / "0.tar", "0.tar")[0]) == ["0.tar/1.png"]


def test_a_broken_image_in_a_shard_is_named_when_it_is_read(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"1.png": encoded(1)[:300], "2.jpg": b"text", "3.png": b"", "4.json": b"{"})
    found, problems = find_photographs(str(shard))
    assert len(found) == 3 and not problems
    for photograph, reason in zip(found, ("truncated", "not an image", "empty"), strict=True):
        with pytest.raises(ImageError, match=rf"0.tar/{photograph.name[6:]} .*{reason}"):
            photograph.load()


def test_a_broken_sidecar_is_named(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"1.png": encoded(1), "1.json": b"[" * 100_000})
    with pytest.raises(ValueError, match="0.tar/1.json is not JSON"):
        find_photographs(str(shard))[0][0].caption()


def test_a_damaged_header_costs_its_member_only(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {f"{number}.png": encoded(number) for number in range(3)})
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[1].offset
    data[offset + 10] ^= 255
    shard.write_bytes(data)
    found, problems = find_photographs(str(shard))
    assert names(found) == ["0.tar/0.png", "0.tar/2.png"]
    assert (np.asarray(found[1].load()) == pixels(2)).all()
    assert problems == [(f"0.tar at byte {offset}", "damaged header: its member is skipped")]


@pytest.mark.parametrize("member", [0, 2])
def test_a_damaged_first_or_last_header(tmp_path, member):
    shard = write_shard(tmp_path / "0.tar", {f"{number}.png": encoded(number) for number in range(3)})
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[member].offset
    data[offset + 10] ^= 255
    shard.write_bytes(data)
    found, problems = find_photographs(str(shard))
    assert names(found) == [f"0.tar/{number}.png" for number in range(3) if number != member]
    assert len(problems) == 1 and problems[0][0].endswith(f"at byte {offset}")


def test_a_torn_shard_gives_what_is_whole(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {f"{number}.png": encoded(number) for number in range(3)})
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[2]
    whole = shard.read_bytes()
    for end, reason in ((last.offset_data + 100, "2.png is cut off"), (last.offset + 100, "no .tar header")):
        shard.write_bytes(whole[:end])
        found, problems = find_photographs(str(shard))
        assert names(found) == ["0.tar/0.png", "0.tar/1.png"]
        assert len(problems) == 1 and reason in problems[0][1] and problems[0][0] == f"0.tar at byte {last.offset}"


def test_two_shards_in_one_file_are_both_read(tmp_path):
    parts = [write_shard(tmp_path / f"{n}.tar", {f"{n}.png": encoded(n)}).read_bytes() for n in range(2)]
    (tmp_path / "both.tar").write_bytes(b"".join(parts))
    assert [len(side) for side in find_photographs(str(tmp_path / "both.tar"))] == [2, 0]


def test_a_size_below_zero_ends_the_shard(tmp_path):
    """As in CVE-2025-8194, where it led back and the reading never ended."""
    info = tarfile.TarInfo("1.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole = write_shard(tmp_path / "0.tar", {"0.png": encoded(0)}).read_bytes()
    (tmp_path / "0.tar").write_bytes(bytes(header) + whole)
    found, problems = read_shard(tmp_path / "0.tar", "0.tar")
    assert len(problems) == 1 and len(found) <= 1


def test_a_second_member_of_a_name(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for seed in (1, 2):
            info = tarfile.TarInfo("1.png")
            info.size = len(encoded(seed))
            tar.addfile(info, io.BytesIO(encoded(seed)))
    found, problems = find_photographs(str(tmp_path / "0.tar"))
    assert (np.asarray(found[0].load()) == pixels(1)).all() and len(found) == 1
    ((place, reason),) = problems  # under another name than the image that is used
    assert place.startswith("0.tar/1.png at byte ") and reason == "a second member of this name: the first one is used"


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b" + b"zip" * 1000])
def test_shards_without_an_image(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"no member of .*0.tar .* is an image; the first problem"):
        find_photographs(str(tmp_path / "0.tar"))


def test_a_bad_shard_beside_a_good_one(tmp_path):
    write_shard(tmp_path / "1.tar", {"1.png": encoded(1)})
    (tmp_path / "0.tar").write_bytes(b"text")
    found, problems = find_photographs(str(tmp_path / "{0..1}.tar"))
    assert names(found) == ["1.tar/1.png"] and problems[0][0] == "0.tar at byte 0"


def test_excluded_folders_are_skipped(tmp_path):
    for name in ("a.png", "pairs/good/a.png", "pairs/own.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(1))
    found, _ = find_photographs(str(tmp_path), [tmp_path / "pairs/good", tmp_path / "pairs/bad"])
    assert names(found) == ["a.png", "pairs/own.png"]
    with pytest.raises(ValueError, match="no photographs in .*good besides the images in .*good"):
        find_photographs(str(tmp_path / "pairs/good"), [tmp_path / "pairs/good"])


# ---------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_a_caption_is_decoded_by_its_mark(name, encoding):
    text = "une  femme âgée, 祖母\n"
    data = (json.dumps({"caption": text}, ensure_ascii=False) if name == "a.json" else text).encode(encoding)
    assert parse_caption(data, name) == "une femme âgée, 祖母"


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        ("âgée".encode("latin-1"), "a.txt", "a.txt is not UTF-8 .* save it as UTF-8"),
        ("woman".encode("utf-16-le"), "a.txt", "UTF-16 without a mark"),
        (b'"\\ud83d"', "a.json", "no text"),
        (b"{}", "a.json", "the key `caption`"),
        (b"{", "a.json", "a.json is not JSON"),
    ],
)
def test_what_is_no_caption(data, name, reason):
    with pytest.raises(CaptionError, match=reason):
        parse_caption(data, name)


def test_the_fingerprint_of_a_file_and_of_a_member_of_a_shard(tmp_path):
    """Another byte in the middle, and another size, are seen; the name and the place in a shard do not count."""
    data = bytes(range(256)) * 2000
    changed = data[:256_000] + b"!" + data[256_001:]
    for name, content in (("a.png", data), ("b.png", changed), ("c.png", data + b"!"), ("d.png", data[:100])):
        (tmp_path / name).write_bytes(content)
    marks = [Photograph(name, tmp_path / name).fingerprint() for name in ("a.png", "b.png", "c.png", "d.png")]
    assert len(set(marks)) == 4 and all(len(mark) == 16 for mark in marks)
    (tmp_path / "shard").write_bytes(b"header" + data + b"next")
    member = Member("a.png", 6, len(data))
    assert Photograph("x", tmp_path / "shard", member).fingerprint() == marks[0]
    assert Photograph("gone", tmp_path / "gone.png").fingerprint() == ""
