"""JSON lines that survive a kill, and paths that do not lead out of their folder."""

import json
import math
from pathlib import Path

import pytest

from faceprior.config import print_problems
from faceprior.files import common_folder
from faceprior.jsonl import (
    KeyedRows,
    append_row,
    read_rows,
    require_keys,
    resolve_file,
    resume_rows,
    rewrite_rows,
    sort_rows,
)
from faceprior.photos import read_caption, safe_name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "rows.jsonl"


def test_rows_come_back(path):
    rows = [{"id": "a", "box": [1, 2.5]}, {"id": "é", "nothing": None}, {"id": "c", "deep": {"yes": True}}]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == (rows, [])
    assert resume_rows(path) == rows
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x0c", "\x1e", "\n", "\r", '"', "\udce9"])
def test_any_character_comes_back(path, character):
    """Some of them end a line for `str.splitlines`; the last is what Python makes of a file name that is no UTF-8."""
    row = {"caption": f"a{character}b", f"k{character}": 1}
    append_row(path, row)
    append_row(path, row)
    assert read_rows(path) == ([row, row], [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_json_form_are_refused(path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_row(path, {"loss": value})
    assert not path.exists()
    append_row(path, {"id": "a"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        rewrite_rows(path, [{"box": [value]}])
    assert resume_rows(path) == [{"id": "a"}]


@pytest.mark.parametrize("text", ["NaN", "[1, Infinity]", '{"a": -Infinity}'])
def test_numbers_without_a_json_form_make_a_line_foreign(path, text):
    append_row(path, {"id": "a"})
    with open(path, "a") as file:
        file.write(f'{{"id": "b", "box": {text}}}\n')
    rows, problems = read_rows(path)
    assert rows == [{"id": "a"}] and problems[0][0] == f"{path}:2" and "is not valid JSON" in problems[0][1]


# killed in the middle of a line


@pytest.mark.parametrize("torn", ['{"id": "b"', '{"id": "b"}', "\x00\x00", '{"id": "é'])
def test_torn_last_line_is_cut_off_on_resume(path, torn):
    """Without its newline even a line that reads as whole counts as torn: a number in it may be cut."""
    append_row(path, {"id": "a"})
    with open(path, "ab") as file:
        file.write(torn.encode()[:-1] if torn.endswith("é") else torn.encode())
    assert resume_rows(path) == [{"id": "a"}]
    assert path.read_text() == '{"id": "a"}\n'


def test_only_line_torn(path):
    append_row(path, {"id": "a"})
    path.write_bytes(path.read_bytes()[:5])
    assert resume_rows(path) == [] and path.read_bytes() == b""


def test_append_after_a_kill(path):
    """The new row does not run on from the torn one."""
    append_row(path, {"id": "a"})
    append_row(path, {"id": "b"})
    path.write_bytes(path.read_bytes()[:-4])
    append_row(path, {"id": "c"})
    assert read_rows(path) == ([{"id": "a"}, {"id": "c"}], [])


def test_torn_row_in_the_middle_is_named(path):
    append_row(path, {"id": "a"})
    with open(path, "a") as file:
        file.write('{"id": "b\n\n[1]\n')
    append_row(path, {"id": "c"})
    rows, problems = read_rows(path)
    assert rows == [{"id": "a"}, {"id": "c"}]
    assert [place for place, _ in problems] == [f"{path}:2", f"{path}:4"]
    assert "not a JSON object" in problems[1][1]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: torn or foreign row .*; remove the line .*--overwrite"):
        resume_rows(path)


def test_bytes_that_are_no_text_are_named(path):
    append_row(path, {"id": "a"})
    with open(path, "ab") as file:
        file.write(b'{"id": "\xff"}\n')
    rows, problems = read_rows(path)
    assert rows == [{"id": "a"}] and problems[0][0] == f"{path}:2"


def test_resume_without_a_file(path):
    assert resume_rows(path) == []
    with pytest.raises(FileNotFoundError):
        read_rows(path)


def test_sorting_makes_interrupted_and_whole_runs_alike(tmp_path):
    rows = [{"id": name, "value": index / 3} for index, name in enumerate("cab")]
    for row in rows:
        append_row(tmp_path / "one.jsonl", row)
    for row in reversed(rows):
        append_row(tmp_path / "two.jsonl", row)
    assert [row["id"] for row in sort_rows(tmp_path / "one.jsonl")] == ["a", "b", "c"]
    sort_rows(tmp_path / "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]


# paths


def test_a_row_is_written_once(path):
    """Those of an earlier run, whose last line was torn, count; the first of a key stays."""
    rows = KeyedRows(path)
    assert not rows and not path.exists()
    rows.add({"id": "a", "value": 1})
    rows.add({"id": "a", "value": 2})
    with open(path, "a") as file:
        file.write('{"id": "b", "va')
    again = KeyedRows(path)
    again.add({"id": "b", "value": 3})
    again.add({"id": "a", "value": 4})
    assert read_rows(path) == ([{"id": "a", "value": 1}, {"id": "b", "value": 3}], [])
    assert again["b"]["value"] == 3 and "c" not in again
    assert KeyedRows(path, "value").keys() == {1, 3}
    again.replace([{"id": "a", "value": 5}])
    assert again == KeyedRows(path) == {"a": {"id": "a", "value": 5}, "b": {"id": "b", "value": 3}}
    again.remove(["a", "c"])
    assert again == KeyedRows(path) == {"b": {"id": "b", "value": 3}}


def test_files_below_the_folder_are_found(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good/a.png").write_text("")
    assert resolve_file(tmp_path, "good/a.png") == tmp_path / "good/a.png"
    assert resolve_file(tmp_path, "good/../good/a.png").is_file()


@pytest.mark.parametrize("relative", ["../secret.png", "good/../../secret.png", "{absolute}"])
def test_escaping_paths_are_refused(tmp_path, relative):
    (tmp_path / "secret.png").write_text("")
    folder = tmp_path / "folder"
    (folder / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="leads out of .*folder: paths in a manifest are relative"):
        resolve_file(folder, relative.format(absolute=tmp_path / "secret.png"))


def test_absolute_path_into_the_folder_is_refused(tmp_path):
    """It would break when the folder is moved."""
    (tmp_path / "a.png").write_text("")
    with pytest.raises(ValueError, match="paths in a manifest are relative"):
        resolve_file(tmp_path, str(tmp_path / "a.png"))


def test_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.png").write_text("")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    for relative in ("link.png", "linked/secret.png"):
        with pytest.raises(ValueError, match="leads out of"):
            resolve_file(folder, relative)


def test_linked_folder_is_itself_no_escape(tmp_path):
    """A data folder on another disk, linked to from the checkout."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.png").write_text("")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert resolve_file(tmp_path / "data", "a.png").is_file()


@pytest.mark.parametrize("relative", ["none.png", "", ".", "folder"])
def test_missing_files_are_named(tmp_path, relative):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="is missing"):
        resolve_file(tmp_path, relative)


def test_common_folder():
    paths = [Path("photos/a/1.png"), Path("photos/b/c/2.png")]
    assert common_folder(paths) == Path("photos")
    assert common_folder(paths[:1]) == Path("photos/a")
    assert common_folder([Path("/x/1.png"), Path("/y/2.png")]) == Path("/")
    folder = common_folder([Path("1.png"), Path("a/2.png")])
    assert Path("a/2.png").relative_to(folder).as_posix() == "a/2.png"
    with pytest.raises(ValueError, match="absolute and relative"):
        common_folder([Path("1.png"), Path("/2.png")])


def test_safe_names_are_unique_and_plain():
    names = ["a/b.png", "a_b.png", "a/b.jpg", "a b.png", "A/b.png", "a-b.png", "a/./b", "ä/b.png", "\udce9.png"]
    safe = [safe_name(name) for name in names]
    assert len({name.lower() for name in safe}) == len(names)  # also where file systems ignore case
    assert all(c.isalnum() or c in "-_" for name in safe for c in name)
    assert safe_name("a/b.png") == safe[0] and safe[0].startswith("a_b_")


def test_safe_names_can_be_written_in_every_locale():
    """Also under LC_ALL=C, where a path of other letters raises UnicodeEncodeError; they stay apart."""
    safe = [safe_name(name) for name in ("größe.png", "gräße.png", "祖母.png", "caf\udce9.png")]
    assert all(name.isascii() for name in safe) and len(set(safe)) == 4 and safe[0].startswith("gr__e_")


def test_safe_names_fit_file_systems():
    """255 bytes at most, with room for `_12.png`; U+20000 takes four bytes."""
    long = [safe_name("\U00020000" * 300 + f"{end}.png") for end in "ab"]
    assert all(len(name.encode()) < 240 for name in long) and long[0] != long[1]


# rows


KINDS = {"id": str, "score": (int, float), "box": list}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "`id` has to be str but is 3"),
        ({"score": "3"}, "`score` has to be int or float but is '3'"),
        ({"score": True}, "`score` has to be int or float but is True"),
        ({"score": None}, "`score` has to be int or float but is None"),
        ({"score": math.nan}, "`score` has to be finite but is nan"),
        ({"score": math.inf}, "`score` has to be finite but is inf"),
        ({"box": "1 2"}, "`box` has to be list but is '1 2'"),
    ],
)
def test_wrong_values_of_a_row_are_named(change, message):
    row = {"id": "a", "score": 1, "box": []}
    require_keys(row, KINDS)
    with pytest.raises(ValueError, match=message):
        require_keys({**row, **change}, KINDS)


def test_missing_keys_of_a_row_are_named():
    with pytest.raises(ValueError, match="the row has no `box`"):
        require_keys({"id": "a", "score": 1}, KINDS)


# captions


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("face.txt", " a woman,\n soft light \n"),
        ("face.json", json.dumps("a woman,  soft light\n")),
        ("face.json", json.dumps({"caption": "a woman, soft light", "model": "any"})),
        ("face_qwen.json", json.dumps({"caption": "a woman,\nsoft light"})),
    ],
)
def test_captions_beside_a_picture(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_caption(tmp_path / "face.png") == "a woman, soft light"


def test_no_caption(tmp_path):
    (tmp_path / "other.txt").write_text("a man")
    assert read_caption(tmp_path / "face.png") is None


def test_text_goes_before_json(tmp_path):
    (tmp_path / "face.json").write_text('"json"')
    (tmp_path / "face_qwen.json").write_text('"qwen"')
    assert read_caption(tmp_path / "face.png") == "json"
    (tmp_path / "face.txt").write_text("text")
    assert read_caption(tmp_path / "face.png") == "text"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b"3", "has to contain a string"),
        (b'{"text": "a"}', "has to contain"),
    ],
)
def test_json_without_a_caption_is_named(tmp_path, content, message):
    (tmp_path / "face.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"face.json {message}"):
        read_caption(tmp_path / "face.png")


def test_problems_are_printed(capsys):
    print_problems([])
    print_problems([("a.png", "truncated")])
    print_problems([("a.png", "truncated"), ("\udce9.png", "no face")], "picture")
    assert capsys.readouterr().out == (
        "1 input skipped:\n  a.png: truncated\n2 pictures skipped:\n  a.png: truncated\n  \\udce9.png: no face\n"
    )


def test_control_characters_in_a_name_are_printed_as_escapes(capsys):
    print_problems([("new\nline\x1b[31m.png", "bild é\r")])
    assert capsys.readouterr().out == "1 input skipped:\n  new\\nline\\x1b[31m.png: bild é\\r\n"


def test_of_many_problems_some_are_printed(capsys):
    problems = [(f"{number}.png", "truncated") for number in range(5)]
    print_problems(problems, most=2)
    assert capsys.readouterr().out == "5 inputs skipped:\n  0.png: truncated\n  1.png: truncated\n  and 3 more\n"
    print_problems(problems, most=5)
    assert "more" not in capsys.readouterr().out


def test_a_picture_whose_name_is_nearly_too_long_has_no_caption():
    assert read_caption("x" * 250 + ".jpg") is None
