"""Settings: where a value comes from, what is refused and how it is named, and the output folder of a run."""

import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest
import yaml
from conftest import STAGES, load_stage

from faceprior.config import (
    advise_on_memory,
    field_headings,
    field_help,
    is_complete,
    load_section,
    make_config,
    memory_advice,
    memory_options,
    open_output,
    parse_config,
    run_stage,
    save_config,
    saved_settings,
    stage_name,
)
from faceprior.files import atomic_write

STAGE = '''
"""Stage 0: an example. 100% of it is for the tests."""

from dataclasses import dataclass
from typing import Literal

import torch

from faceprior.config import open_output, run_stage


@dataclass
class Config:
    output: str = "out"  # folder
    rate: float = 1e-3  # of the optimizer, (0, 1]
    steps: int = 10  # optimizer steps, [1, inf)
    limits: tuple[float, ...] = (0.5, 1.0)  # upper ends, (0, 1]
    mode: Literal["no", "fp16"] = "no"  # dtype
    warmup: int | None = None  # steps, [0, 100]; none: a tenth
    wrapped_by_a_formatter: float = (
        0.25  # fraction, [0, 1)
    )
    fast: bool = False  # a switch
    seed: int = 0  # [0, inf)
    num_workers: int = 0  # processes, [0, 64]
    device: str = "auto"  # where
    overwrite: bool = False  # start over


def main(config):
    if config.mode == "fp16":
        raise ValueError("fp16 has to have a GPU")
    if config.fast:
        torch.zeros(2) @ torch.zeros(3)
    if config.seed:
        raise KeyboardInterrupt
    open_output(config)


if __name__ == "__main__":
    run_stage(main, Config)
'''


@pytest.fixture
def stage(tmp_path):
    """The module of a stage in a separate file."""
    folder = tmp_path / "stages"
    folder.mkdir()
    path = folder / "00_example.py"
    path.write_text(STAGE)
    (folder / "01_other.py").write_text("")
    spec = importlib.util.spec_from_file_location("stage_00_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def preset(tmp_path):
    """Writes a preset and returns its path."""

    def write(text):
        path = tmp_path / "preset.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return write


def refusal(stage, capsys, *argv):
    """The last line that the command line ends with when it is refused."""
    with pytest.raises(SystemExit) as ended:
        parse_config(stage.Config, list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# where a value comes from


def test_precedence_is_dataclass_yaml_command_line(stage, preset):
    path = preset("00_example: {rate: 0.5, steps: 20}")
    config = parse_config(stage.Config, ["--config", path, "--steps", "30"])
    assert (config.output, config.rate, config.steps) == ("out", 0.5, 30)


def test_without_arguments_the_defaults_hold(stage):
    assert parse_config(stage.Config, []) == stage.Config()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rate", "5e-5", 5e-5),  # as PyYAML reads it
        ("rate", 1, 1.0),
        ("steps", 2.0, 2),
        ("steps", "1e3", 1000),
        ("seed", 2**62 + 1, 2**62 + 1),  # a float would round it
        ("seed", str(2**62 + 1), 2**62 + 1),
        ("output", 7, "7"),
        ("fast", True, True),
        ("mode", "fp16", "fp16"),
        ("mode", False, "no"),  # YAML reads a bare `no` as false
        ("warmup", None, None),
        ("warmup", "none", None),
        ("warmup", "5", 5),
        ("limits", [1, "0.25"], (1.0, 0.25)),
    ],
)
def test_casts(stage, key, value, expected):
    result = getattr(make_config(stage.Config, {key: value}), key)
    assert result == expected and type(result) is type(expected)


def test_casts_of_yaml_text(stage, preset):
    path = preset(
        """
        00_example:
          rate: 5e-5
          mode: no
          warmup: null
          limits: [0.1, 1]
          fast: true
          output: résultats
        """
    )
    config = parse_config(stage.Config, ["--config", path])
    assert (config.rate, config.mode, config.warmup, config.limits) == (5e-5, "no", None, (0.1, 1.0))
    assert config.fast is True and config.output == "résultats"


def test_switches_and_lists_on_the_command_line(stage, preset):
    path = preset("00_example: {fast: true}")
    assert parse_config(stage.Config, ["--fast"]).fast is True
    assert parse_config(stage.Config, ["--config", path, "--no-fast"]).fast is False
    assert parse_config(stage.Config, ["--limits", "0.1", "0.2", "1"]).limits == (0.1, 0.2, 1.0)
    assert parse_config(stage.Config, ["--rate=0.25"]).rate == 0.25


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rate", "fast", "`rate` has to be a number but is 'fast'"),
        ("rate", True, "`rate` has to be a number but is True"),
        ("rate", float("nan"), "`rate` has to be a number but is nan"),
        ("rate", None, "`rate` has to be a number but is None"),
        ("rate", [1], "`rate` has to be a number but is [1]"),
        ("steps", 2.5, "`steps` has to be a whole number but is 2.5"),
        ("steps", "--5", "`steps` has to be a whole number but is '--5'"),
        ("steps", float("inf"), "`steps` has to be a whole number but is inf"),
        ("fast", "yes", "`fast` has to be true or false but is 'yes'"),
        ("output", None, "`output` has to be text but is None"),
        ("output", True, "`output` has to be text but is True"),
        ("mode", "bf16", "`mode` has to be one of no, fp16 but is 'bf16'"),
        ("mode", True, "`mode` has to be one of no, fp16 but is True"),
        ("limits", 0.5, "`limits` has to be a list but is 0.5"),
        ("limits", ["a"], "`limits` has to be a number but is 'a'"),
    ],
)
def test_wrong_values_are_named(stage, key, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(stage.Config, {key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rate", 0, "`rate` has to be in (0, 1] but is 0.0"),
        ("rate", 1.5, "`rate` has to be in (0, 1] but is 1.5"),
        ("steps", 0, "`steps` has to be in [1, inf) but is 0"),
        ("warmup", 101, "`warmup` has to be in [0, 100] but is 101"),
        ("limits", [0.5, 2], "`limits` has to be in (0, 1] but is 2.0"),
        ("wrapped_by_a_formatter", 1, "`wrapped_by_a_formatter` has to be in [0, 1) but is 1.0"),
    ],
)
def test_the_range_in_the_comment_is_enforced(stage, key, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(stage.Config, {key: value})


def test_closed_ends_belong_to_the_range(stage):
    config = make_config(stage.Config, {"rate": 1, "steps": 1, "warmup": 100, "wrapped_by_a_formatter": 0})
    assert (config.rate, config.steps, config.warmup, config.wrapped_by_a_formatter) == (1, 1, 100, 0)


# what is refused


def test_unknown_key_on_the_command_line_names_the_nearest(stage, capsys):
    line = refusal(stage, capsys, "--stepz", "3")
    assert line.endswith("unknown key `stepz` on the command line: did you mean `steps`?")
    assert "did you mean `steps`" in refusal(stage, capsys, "--step=3")  # no abbreviations


def test_unknown_key_without_a_neighbour_lists_the_keys(stage, capsys):
    assert "the keys are device, fast, limits" in refusal(stage, capsys, "--zzzz", "3")


def test_leftover_value_says_how_switches_are_given(stage, capsys):
    assert "unexpected value 'true': give settings as `--key value`" in refusal(stage, capsys, "--fast", "true")


def test_range_on_the_command_line(stage, capsys):
    assert refusal(stage, capsys, "--steps", "-5").endswith("`steps` has to be in [1, inf) but is -5")


def test_unknown_key_in_a_preset(stage, preset, capsys):
    line = refusal(stage, capsys, "--config", preset("00_example: {stepz: 3}"))
    assert "unknown key `stepz` in section 00_example of" in line and "did you mean `steps`?" in line


def test_unknown_section_in_a_preset(stage, preset, capsys):
    """A misspelt section would else be skipped, and the run would silently take the defaults."""
    line = refusal(stage, capsys, "--config", preset("00_exampel: {steps: 3}"))
    assert "unknown section `00_exampel` in" in line and "did you mean `00_example`?" in line


def test_preset_without_this_stage(stage, preset, capsys):
    assert "has no section 00_example but 01_other" in refusal(stage, capsys, "--config", preset("01_other: {a: 3}"))


def test_empty_section_means_the_defaults(stage, preset):
    assert parse_config(stage.Config, ["--config", preset("00_example:\n01_other: {a: 3}")]) == stage.Config()


@pytest.mark.parametrize("text", ["- a list", "just text", "00_example: 3", ""])
def test_preset_of_another_shape(stage, preset, capsys, text):
    assert "has to hold one section per stage" in refusal(stage, capsys, "--config", preset(text))


def test_preset_that_is_no_yaml(stage, preset, capsys, tmp_path):
    with pytest.raises(ValueError, match="preset.yaml is not YAML"):
        load_section(preset("a: [1"), "00_example", stage.Config)
    (tmp_path / "latin.yaml").write_bytes("00_example: {output: é}".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.yaml is not YAML"):
        load_section(tmp_path / "latin.yaml", "00_example", stage.Config)


def test_missing_preset_names_what_is_there(stage, preset, capsys, tmp_path):
    preset("00_example:")
    line = refusal(stage, capsys, "--config", str(tmp_path / "prezet.yaml"))
    assert "no preset" in line and f"{tmp_path} has preset.yaml" in line


# former names of settings


@pytest.fixture
def renamed(stage, monkeypatch):
    """The stage's Config, whose `rate` and `fast` had other names before."""
    monkeypatch.setattr(stage.Config, "RENAMED", {"speed": "rate", "quick": "fast"}, raising=False)
    return stage.Config


def test_former_names_on_the_command_line(renamed):
    assert parse_config(renamed, ["--speed", "0.5", "--quick"]) == renamed(rate=0.5, fast=True)


def test_former_names_in_a_preset(renamed, preset):
    """The command line goes before the preset, whichever name either of them uses."""
    path = preset("00_example: {speed: 0.5, quick: true}")
    assert parse_config(renamed, ["--config", path]) == renamed(rate=0.5, fast=True)
    assert parse_config(renamed, ["--config", path, "--rate", "0.25", "--no-quick"]) == renamed(rate=0.25)
    assert parse_config(renamed, ["--config", preset("00_example: {rate: 0.5}"), "--speed=0.25"]).rate == 0.25
    assert make_config(renamed, {"speed": "0.5"}) == renamed(rate=0.5)


def test_a_former_name_may_have_become_several(stage, monkeypatch, preset, capsys):
    """As stage 7's `resolution`: its value is that of both, and each of them may be given apart."""
    monkeypatch.setattr(stage.Config, "RENAMED", {"count": ("steps", "seed")}, raising=False)
    assert parse_config(stage.Config, ["--count", "7"]) == stage.Config(steps=7, seed=7)
    path = preset("00_example: {count: 7}")
    assert parse_config(stage.Config, ["--config", path, "--seed", "1"]) == stage.Config(steps=7, seed=1)
    message = "`count` is the former name of `seed`, and both are given: give `seed` only"
    assert refusal(stage, capsys, "--count", "7", "--seed", "1").endswith(message)


def test_former_names_are_checked_as_the_current_ones(stage, renamed, capsys):
    assert refusal(stage, capsys, "--speed", "2").endswith("`rate` has to be in (0, 1] but is 2.0")


def test_a_setting_under_both_of_its_names_is_an_error(stage, renamed, preset, capsys):
    message = "`speed` is the former name of `rate`, and both are given: give `rate` only"
    assert refusal(stage, capsys, "--speed", "0.5", "--rate", "0.5").endswith(message)
    path = preset("00_example: {speed: 0.5, rate: 0.5}")
    assert refusal(stage, capsys, "--config", path).endswith(message)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(renamed, {"speed": 0.5, "rate": 0.5})


def test_former_names_are_not_shown_in_the_help(stage, renamed, capsys):
    with pytest.raises(SystemExit):
        parse_config(renamed, ["--help"])
    assert "--speed" not in capsys.readouterr().out


def test_a_run_that_was_saved_under_former_names_resumes_and_is_saved_under_the_current_ones(config, renamed):
    saved = open_output(config) / "config.yaml"
    (saved.parent / "row").write_text("kept")
    saved.write_text(saved.read_text().replace("rate:", "speed:").replace("fast:", "quick:"))
    with pytest.raises(FileExistsError, match=r"rate \(0.001 there, 0.5 now\)"):
        open_output(dataclasses.replace(config, rate=0.5))
    assert "speed:" in saved.read_text()
    open_output(config)
    assert "rate: 0.001" in saved.read_text() and "fast: false" in saved.read_text()
    assert "speed" not in saved.read_text() and "quick" not in saved.read_text()


# help


def test_help_shows_range_and_default_of_every_key(stage, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(stage.Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "Stage 0: an example. 100% of it is for the tests." in text
    for field in dataclasses.fields(stage.Config):
        assert f"--{field.name}" in text
    assert "of the optimizer, (0, 1] (default: 0.001)" in text
    assert "upper ends, (0, 1] (default: 0.5 1.0)" in text
    assert "fraction, [0, 1) (default: 0.25)" in text
    assert "--fast, --no-fast a switch (default: False)" in text
    assert "{no,fp16} dtype (default: no)" in text


def test_help_of_a_field_is_its_comment():
    @dataclasses.dataclass
    class Config:
        a: int = 1
        b: str = "# no comment"  # of b, # here
        c: tuple[int, ...] = (
            1,  # first
            2,  # second
        )  # third

    assert field_help(Config) == {"a": "", "b": "of b, # here", "c": "first second third"}


def test_headings_part_the_help(capsys):
    """A `# ----` line stands above the fields up to the next one; the order is that of the fields."""

    @dataclasses.dataclass
    class Config:
        a: int = 0  # a of all, [0, 9]

        # ---- Memory and speed
        b: int = 1  # b of all, [0, 9]
        c: bool = False  # c of all
        # ---- Files
        d: str = ""  # d of all

    assert field_headings(Config) == {"a": "", "b": "Memory and speed", "c": "Memory and speed", "d": "Files"}
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    shown = capsys.readouterr().out
    order = ["--a VALUE", "\nMemory and speed:", "--b VALUE", "--no-c", "\nFiles:", "--d VALUE"]
    assert sorted(order, key=shown.index) == order


# the output folder


@pytest.fixture
def config(stage, tmp_path):
    return stage.Config(output=str(tmp_path / "run"))


def test_output_is_made_with_the_settings_in_it(config, tmp_path):
    output = open_output(config)
    assert output == tmp_path / "run"
    stored = yaml.safe_load((output / "config.yaml").read_text())
    assert list(stored) == ["00_example"]
    assert stored["00_example"]["limits"] == [0.5, 1.0] and "overwrite" not in stored["00_example"]
    assert not is_complete(output)
    (output / "done.json").write_text("{}")
    assert is_complete(output)


def test_saved_settings_are_a_preset(stage, config):
    changed = dataclasses.replace(config, rate=5e-5, limits=(0.25, 1.0), mode="no", warmup=None, output=config.output)
    save_config(changed, open_output(config))
    assert parse_config(stage.Config, ["--config", str(Path(config.output) / "config.yaml")]) == changed


def test_same_settings_resume(config):
    """The file of the settings is not written again, as it could not be where nobody may write."""
    (open_output(config) / "row").write_text("kept")
    saved = Path(config.output, "config.yaml")
    os.utime(saved, (1, 1))
    assert (open_output(config) / "row").read_text() == "kept"
    assert saved.stat().st_mtime == 1


def test_what_a_kill_left_of_a_file_goes_at_the_next_start(config):
    """In sub-folders, too, where the samples are; not while another file is written there."""
    folder = open_output(config) / "validation/000002"
    folder.mkdir(parents=True)
    left = folder / ".faceprior-0123456789abcdef.tmp"
    left.write_bytes(b"half an image")
    with atomic_write(folder / "000.png") as file:
        file.write(b"another half")
        open_output(config)
        assert not left.exists() and Path(file.name).exists()
    assert [path.name for path in folder.iterdir()] == ["000.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_folder_in_which_another_process_runs_is_refused(config, monkeypatch):
    """It is held as long as that process lives, and once by all that one process does in it."""
    monkeypatch.setattr("faceprior.files._PATIENCE", 0)
    Path(config.output).mkdir()
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, config.output]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FileExistsError, match="another process is running in .*run: wait until it has ended"):
            open_output(config)
        other.kill()
    open_output(config)
    open_output(dataclasses.replace(config))


def test_other_settings_are_refused_with_their_keys(config):
    (open_output(config) / "row").write_text("kept")
    with pytest.raises(FileExistsError) as refused:
        open_output(dataclasses.replace(config, rate=0.5, limits=(1.0,)))
    message = str(refused.value)
    assert "limits (0.5 1.0 there, 1.0 now), rate (0.001 there, 0.5 now)" in message and "--overwrite" in message
    assert (Path(config.output) / "row").read_text() == "kept"


def test_a_log_without_a_step_is_no_result(config):
    (open_output(config) / "metrics.jsonl").touch()
    open_output(dataclasses.replace(config, rate=0.5))
    (Path(config.output) / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(FileExistsError, match=r"rate \(0.5 there, 0.001 now\)"):
        open_output(config)


@pytest.mark.parametrize("left", ["row", "drawn", None])
def test_settings_that_made_nothing_yet_are_replaced(config, left):
    """A run that failed before its first result can be corrected; a file or folder of its own is a result."""
    output = open_output(config)
    (output / "config.yaml.part").write_text("00_exa")
    corrected = dataclasses.replace(config, rate=0.5)
    if left is None:
        open_output(corrected)
    else:
        (output / left).mkdir()
        with pytest.raises(FileExistsError, match=r"rate \(0.001 there, 0.5 now\)"):
            open_output(corrected)
    assert saved_settings(config)["rate"] == (0.5 if left is None else 0.001)


def test_where_and_how_fast_it_runs_may_differ(config):
    (open_output(config) / "row").write_text("kept")
    open_output(dataclasses.replace(config, device="cpu", num_workers=4))


def test_settings_that_the_stage_declares_free_may_differ(config, stage, monkeypatch):
    """And those that the caller names; the saved settings follow."""
    monkeypatch.setattr(stage.Config, "FREE", frozenset({"steps"}), raising=False)
    (open_output(config) / "row").write_text("kept")
    open_output(dataclasses.replace(config, steps=20, rate=0.5), free=["rate"])
    assert saved_settings(config)["steps"] == 20 and saved_settings(config)["rate"] == 0.5
    with pytest.raises(FileExistsError, match=r"rate \(0.5 there, 0.25 now\)"):
        open_output(dataclasses.replace(config, steps=30, rate=0.25))
    assert saved_settings(config)["steps"] == 20


def test_an_option_that_has_come_since_was_its_default_then(config):
    saved = open_output(config) / "config.yaml"
    (saved.parent / "row").write_text("kept")
    saved.write_text(saved.read_text().replace("  rate: 0.001\n", ""))
    with pytest.raises(FileExistsError, match=r"rate \(0.001 there, 0.5 now\)"):
        open_output(dataclasses.replace(config, rate=0.5))
    open_output(config)
    assert "rate: 0.001" in saved.read_text()


def test_a_setting_that_this_version_does_not_know_is_ignored(config, caplog):
    caplog.set_level("INFO", logger="faceprior")
    saved = open_output(config) / "config.yaml"
    (saved.parent / "row").write_text("kept")
    saved.write_text(saved.read_text() + "  old_unknown_key: 3\n")
    with pytest.raises(FileExistsError, match=r"other settings: rate \(0.001 there, 0.5 now\)\."):
        open_output(dataclasses.replace(config, rate=0.5))
    caplog.clear()
    open_output(config)
    assert caplog.messages == [
        f"{config.output} has settings that this version does not know, ignored: old_unknown_key"
    ]
    assert "old_unknown_key" not in saved.read_text()


def test_overwrite_starts_over(config):
    output = open_output(config)
    (output / "done.json").write_text("{}")
    (output / "folder").mkdir()
    (output / "folder/row").write_text("old")
    open_output(dataclasses.replace(config, rate=0.5, overwrite=True))
    assert [path.name for path in output.iterdir()] == ["config.yaml"]
    assert yaml.safe_load((output / "config.yaml").read_text())["00_example"]["rate"] == 0.5


def test_overwrite_deletes_in_a_linked_folder_and_not_what_is_linked_from_it(config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs/one.png").write_text("kept")
    Path(config.output).symlink_to(tmp_path / "disk")
    output = open_output(config)
    (output / "photographs").symlink_to(tmp_path / "photographs")
    open_output(dataclasses.replace(config, overwrite=True))
    assert Path(config.output).is_symlink() and [p.name for p in output.iterdir()] == ["config.yaml"]
    assert (tmp_path / "photographs/one.png").read_text() == "kept"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_something_else_is_never_touched(config, overwrite):
    output = Path(config.output)
    output.mkdir()
    (output / "thesis.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="was not made by 00_example but has thesis.txt in it"):
        open_output(dataclasses.replace(config, overwrite=overwrite))
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("text", ["01_other: {}", "jekyll: {theme: dark}", "a: [1", "00_example: 3"])
def test_folder_with_settings_of_something_else_is_never_touched(config, overwrite, text):
    output = Path(config.output)
    output.mkdir()
    (output / "config.yaml").write_text(text)
    with pytest.raises(FileExistsError, match="was not made by 00_example"):
        open_output(dataclasses.replace(config, overwrite=overwrite))
    assert (output / "config.yaml").read_text() == text


def test_output_that_is_a_file(config):
    Path(config.output).write_text("kept")
    with pytest.raises(FileExistsError, match="has to be a folder but .* is a file"):
        open_output(config)


def test_runs_inside_of_the_folder_are_left_alone(config):
    """As the demo's `results/demo`, which lies in the last stage's `results`."""
    inner = dataclasses.replace(config, output=f"{config.output}/demo/run")
    (open_output(inner) / "row").write_text("kept")
    output = open_output(config)
    (output / "row").write_text("old")
    open_output(dataclasses.replace(config, overwrite=True))
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "demo"]
    assert (Path(inner.output) / "row").read_text() == "kept"


def test_killed_while_the_settings_were_written(config):
    """What is left is the temporary file; the same command resumes."""
    Path(config.output).mkdir()
    (Path(config.output) / "config.yaml.part").write_text("00_exa")
    open_output(config)


# errors of a stage


def test_own_errors_are_one_line(stage):
    with pytest.raises(SystemExit) as ended:
        run_stage(stage.main, stage.Config, ["--mode", "fp16"])
    assert ended.value.code == "00_example.py: error: fp16 has to have a GPU"


def test_errors_of_faceprior_are_one_line(stage, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="00_example.py: error: `output` has to be a folder but"):
        run_stage(stage.main, stage.Config, ["--output", str(tmp_path / "file")])


def test_other_errors_keep_their_traceback(stage):
    """A RuntimeError that torch raises in the stage's own line is a bug, not a message."""
    with pytest.raises(RuntimeError, match="size"):
        run_stage(stage.main, stage.Config, ["--fast"])


def throw(error):
    raise error


def test_errors_of_libraries_are_one_line(stage, tmp_path):
    """A damaged file, whatever class its reader raises; and memory that does not suffice."""
    from safetensors.torch import load_file

    (tmp_path / "damaged").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="00_example.py: error: SafetensorError: "):
        run_stage(lambda _: load_file(tmp_path / "damaged"), stage.Config, [])
    error = MemoryError("Unable to allocate 3 TiB")
    with pytest.raises(SystemExit, match="error: out of memory: Unable to allocate 3 TiB; use a machine with more"):
        run_stage(lambda _: throw(error), stage.Config, [])


def test_options_that_need_less_memory():
    """Those of the same run first, with the samples of a step kept; of what is used already none."""
    config_class = load_stage("05_prior_tune").Config
    assert memory_advice(config_class(batch_size=4, accumulation=3)) == (
        "less is needed with --cache data/cache or --batch_size 2 --accumulation 6 or --gradient_checkpointing (the "
        "same run resumes), else, in a new run, --mixed_precision bf16, --optimizer adamw8bit, --train lora, "
        "--train lora --quantization nf4, a smaller --resolution"
    )
    small = {"batch_size": 1, "cache": "mine", "gradient_checkpointing": True}
    lora = config_class(**small, mixed_precision="bf16", train="lora")
    last = ", --quantization nf4, a smaller --resolution"
    assert memory_advice(lora) == f"less is needed with --optimizer adamw8bit{last}"
    spare = {"gradient_checkpointing": True, "mixed_precision": "bf16", "optimizer": "adamw8bit", "train": "lora"}
    spare |= {"quantization": "nf4", "cache": "mine"}
    assert memory_advice(config_class(batch_size=1, **spare)) == "less is needed with a smaller --resolution"
    guidance = load_stage("04_guidance_tune").Config
    assert "--cache data/cache or --batch_size" in memory_advice(guidance())
    assert "--cache" not in memory_advice(guidance(cache="mine"))
    assert "--batch_size 1 --accumulation 3 (the" in memory_advice(config_class(**{**spare, "batch_size": 3}))
    assert "a smaller --restoration_resolution" in memory_advice(load_stage("07_eval").Config())
    restorer = memory_advice(load_stage("06_train_restorer").Config(batch_size=1))
    assert "--gradient_checkpointing (the same run resumes), else, in a new run, " in restorer
    assert restorer.endswith(last)
    without = dataclasses.make_dataclass("Settings", [("seed", int, 0)])
    assert memory_advice(without()) == "use a machine with more"


def test_what_costs_least_comes_first():
    """The cache before all else; 8 bits have a smaller form left; arguments in Python are written as such."""
    values = {"cache": "", "batch_size": 3, "accumulation": 2, "gradient_checkpointing": False, "optimizer": "adamw"}
    options = [{"cache": "data/cache"}, {"batch_size": 1, "accumulation": 6}, {"gradient_checkpointing": True}]
    options += [{"optimizer": "adamw8bit"}, {"quantization": "nf4"}, {"resolution": None}]
    values |= {"train": "lora", "quantization": "8bit", "resolution": 64}
    assert memory_options(values) == options
    assert memory_options({"batch_size": 4}) == [{"batch_size": 2}]
    assert memory_options({"batch_size": None, "train": "lora", "quantization": "nf4"}) == []
    assert memory_advice({"batch_size": 4, "accumulation": 1, "resolution": 64}) == (
        "less is needed with batch_size=2 with accumulation=2, a smaller resolution"
    )


def test_only_a_lack_of_memory_is_turned_into_advice():
    with pytest.raises(ValueError, match="^another$"), advise_on_memory({"batch_size": 2}):
        raise ValueError("another")
    advice = "^out of memory: too much; less is needed with batch_size=1$"
    with pytest.raises(MemoryError, match=advice), advise_on_memory({"batch_size": 2}):
        raise MemoryError("too much")


def test_interrupt_ends_with_its_exit_code(stage, capsys):
    with pytest.raises(SystemExit) as ended:
        run_stage(stage.main, stage.Config, ["--seed", "1"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "00_example.py: interrupted; the same command resumes\n"


def test_as_a_script_from_its_own_folder(stage, tmp_path):
    """Names of files are then relative or those of `__main__`."""
    script = Path(inspect.getfile(stage.Config))
    script.write_text(script.read_text().replace("import torch\n", ""))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, script.name, *arguments], cwd=script.parent, capture_output=True, text=True, timeout=600
        )

    refused = run("--mode", "fp16")
    assert (refused.returncode, refused.stderr) == (1, "00_example.py: error: fp16 has to have a GPU\n")
    assert "of the optimizer, (0, 1] (default: 0.001)" in run("--help").stdout
    assert run("--output", str(tmp_path / "run")).returncode == 0
    assert (tmp_path / "run/config.yaml").is_file()


def test_names_are_printed_under_an_ascii_locale(stage, tmp_path):
    """The console lacks the letters and the bytes of a file's name: they are shown as escapes."""
    script = Path(inspect.getfile(stage.Config))
    text = (
        script.read_text()
        .replace("import torch\n", "")
        .replace("import open_output", "import open_output, print_problems")
    )
    script.write_text(
        text.replace(
            "    open_output(config)\n", "    print(open_output(config))\n    print_problems([('\\udcff', 'ü')])\n"
        )
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    command = [sys.executable, script.name, "--output", str(tmp_path / "résultats")]
    done = subprocess.run(command, cwd=script.parent, env=os.environ | environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    folder, *problems = done.stdout.decode("ascii").splitlines()
    assert folder.endswith("r\\udcc3\\udca9sultats") and problems == ["1 input skipped:", "  \\udcff: \\xfc"]
    assert (tmp_path / "résultats/config.yaml").is_file()


# presets that extend others


def test_a_preset_extends_others_key_by_key(stage, tmp_path):
    """Files beside it, in their order; its own values last; sections that it does not name are theirs."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more/base.yaml").write_text("00_example: {steps: 20, rate: 0.5, seed: 3}")
    (tmp_path / "second.yaml").write_text("00_example: {rate: 0.25}")
    (tmp_path / "own.yaml").write_text("extends: [more/base.yaml, second.yaml]\n00_example: {seed: 4}")
    (tmp_path / "none.yaml").write_text("extends: own.yaml")
    for name in ("own", "none"):
        config = parse_config(stage.Config, ["--config", str(tmp_path / f"{name}.yaml"), "--steps", "7"])
        assert (config.steps, config.rate, config.seed) == (7, 0.25, 4)


def test_what_is_wrong_with_an_extended_preset_is_named_with_its_file(stage, capsys, tmp_path):
    own = tmp_path / "own.yaml"

    def refused(text, other=""):
        own.write_text(text)
        (tmp_path / "other.yaml").write_text(other)
        return refusal(stage, capsys, "--config", str(own))

    assert f"no preset {tmp_path}/nowhere.yaml ({own} extends it)" in refused("extends: nowhere.yaml")
    assert "own.yaml extends itself, by way of" in refused("extends: other.yaml", "extends: own.yaml")
    assert "`extends` in " in refused("extends: {a: 3}") and "but is {'a': 3}" in refused("extends: {a: 3}")
    text = refused("extends: other.yaml\n00_example: {steps: 3}", "00_example: {stepps: 3}")
    assert "unknown key `stepps` in section 00_example of" in text and "other.yaml" in text
    assert "has no section 00_example but 01_other" in refused("extends: other.yaml", "01_other: {a: 3}")


# the project's own stages and presets


NUMBERED = sorted(path.stem for path in STAGES.glob("0*.py"))
PRESETS = sorted((STAGES / "presets").rglob("*.yaml"))


@pytest.mark.parametrize("name", NUMBERED)
def test_every_number_of_a_stage_has_a_range(name):
    config_class = load_stage(name).Config
    helps = field_help(config_class)
    for key, hint in typing.get_type_hints(config_class).items():
        assert helps[key], f"{key} has no help"
        numeric = {int, float} & {hint, *typing.get_args(hint)}
        if numeric:
            assert re.search(r"[\[(](-?[\d.e-]+|-inf), (-?[\d.e-]+|inf)[\])]", helps[key]), f"{key} has no range"


@pytest.mark.parametrize("name", NUMBERED)
def test_defaults_of_a_stage_are_in_their_ranges(name):
    config_class = load_stage(name).Config
    defaults = dataclasses.asdict(config_class())
    assert make_config(config_class, defaults) == config_class() == parse_config(config_class, [])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_section_of_a_preset_parses(path):
    sections = yaml.safe_load(path.read_text())
    sections.pop("extends", None)
    assert sections and set(sections) <= set(NUMBERED)
    for name in sections:
        config_class = load_stage(name).Config
        assert stage_name(config_class) == name
        config = parse_config(config_class, ["--config", str(path)])
        own = make_config(config_class, sections[name])
        assert all(getattr(config, key) == getattr(own, key) for key in sections[name])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_no_preset_repeats_what_it_extends(path):
    preset = yaml.safe_load(path.read_text())
    extended = preset.pop("extends", [])
    for file in [extended] if isinstance(extended, str) else extended:
        for name, values in preset.items():
            try:
                before = load_section(path.parent / file, name, load_stage(name).Config)
            except ValueError:
                continue  # it has no such section
            assert not {key for key in values if key in before and before[key] == values[key]}


def test_the_rows_of_a_table_differ_in_what_the_paper_compares():
    """Table 5 in the distance, Table 6 in the timesteps and the trained weights, Table 7 in the timesteps."""
    config_class = load_stage("04_guidance_tune").Config

    def settings(name):
        return dataclasses.asdict(parse_config(config_class, ["--config", str(STAGES / "presets" / f"{name}.yaml")]))

    dino = settings("face_score_table5_rv51_dino")
    expected = {
        "face_score_table5_rv51_l2": {"distance": "l2"},
        "face_score_table6_all_timesteps": {"t_end": 1.0},
        "face_score_table6_full": {"train": "full"},
        "face_score_table7_t_end_250": {"t_end": 0.25},
        "face_score_table7_t_end_750": {"t_end": 0.75},
    }
    for name, difference in expected.items():
        row = settings(name)
        assert {key: value for key, value in row.items() if dino[key] != value and key != "output"} == difference
    assert dino["train"] == "self_attention" and (dino["t_end"], dino["learning_rate"]) == (0.5, 1e-6)


@pytest.mark.parametrize(
    "path",
    [p for p in PRESETS if (p.parent.name == "rows" or "_table" in p.stem) and "04_guidance_tune" in p.read_text()],
    ids=lambda p: p.stem,
)
def test_the_evaluation_of_a_row_measures_its_own_model(path):
    tuned, measured = (
        parse_config(load_stage(name).Config, ["--config", str(path)]) for name in ("04_guidance_tune", "07_eval")
    )
    assert measured.generators == ("base", f"tuned={tuned.output}")
    assert (measured.base, measured.vae) == (tuned.base, tuned.vae)
    assert measured.output == tuned.output.replace("checkpoints/", "results/")


def test_the_rows_of_authface_differ_in_what_the_paper_compares():
    """Table 2 in prior and facial loss, Table 4 in m and s; tiny rows as the real ones."""
    config_class = load_stage("06_train_restorer").Config

    def settings(name):
        return dataclasses.asdict(parse_config(config_class, ["--config", str(STAGES / "presets" / f"{name}.yaml")]))

    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    expected = {
        "table2_sdxl_none": ("sdxl_none", {"facial_loss": "none", "prior": sdxl}),
        "table2_tuned_none": ("none", {"facial_loss": "none"}),
        "table2_tuned_constant": ("constant", {"facial_loss": "constant"}),
        "table4_m_0": ("m_0", {"time_m": 0.0}),
        "table4_m_0.5": ("m_0.5", {"time_m": 0.5}),
        "table4_s_0.5": ("s_0.5", {"time_s": 0.5}),
    }
    real, tiny = settings("authface_table2_tuned_time_aware"), settings("rows/authface_time_aware")
    assert (real["facial_loss"], real["time_m"], real["time_s"]) == ("time_aware", -0.5, 1.0)
    assert real["prior"] == "checkpoints/prior" and real["reward_weight"] == 0
    for name, (row, difference) in expected.items():
        own, small = settings(f"authface_{name}"), settings(f"rows/authface_{row}")
        assert {key: v for key, v in own.items() if real[key] != v and key != "output"} == difference
        in_small = difference | ({"prior": "tiny"} if "prior" in difference else {})
        assert {key: v for key, v in small.items() if tiny[key] != v and key != "output"} == in_small


def test_the_prior_is_tuned_as_the_paper_tunes_it():
    """AuthFace, 4.1: AdamW at 5e-7, 96 portraits a step, 50k steps, squares of 1024 pixels, the whole U-Net."""
    config = parse_config(
        load_stage("05_prior_tune").Config, ["--config", str(STAGES / "presets" / "authface_table3_both.yaml")]
    )
    assert (config.optimizer, config.learning_rate, config.steps, config.train) == ("adamw", 5e-7, 50000, "full")
    assert (config.batch_size * config.accumulation, config.resolution, config.schedule) == (96, 1024, "constant")
    assert not (config.min_snr_gamma or config.ema_decay or config.warmup_steps) and config.quantization == "none"


def test_the_rows_of_authface_table_3_differ_in_their_tags():
    """Each has an output of its own; tiny rows as the real ones, which are the preset `sdxl`."""
    config_class = load_stage("05_prior_tune").Config

    def settings(name):
        return dataclasses.asdict(parse_config(config_class, ["--config", str(STAGES / "presets" / f"{name}.yaml")]))

    outputs = set()
    for tags in ("none", "semantic", "both"):
        for name, base in (
            (f"authface_table3_{tags}", settings("sdxl")),
            (f"rows/authface_tags_{tags}", dataclasses.asdict(config_class())),
        ):
            row = settings(name)
            assert row["tags"] == tags and row["output"].endswith(tags)
            assert {key for key in row if row[key] != base[key]} <= {"tags", "output"}
            outputs.add(row["output"])
    assert len(outputs) == 6 and config_class().output not in outputs


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("-0.25", -0.25), ("1e-1", 0.1)])
def test_a_number_or_a_word(text, value):
    config_class = load_stage("06_train_restorer").Config
    assert parse_config(config_class, ["--time_m", text]).time_m == value
    with pytest.raises(ValueError, match="`time_m` has to be a number but is 'soon'; or auto"):
        make_config(config_class, {"time_m": "soon"})


@pytest.mark.parametrize("text", ["", "none", None])
def test_an_empty_value_of_an_optional_number_is_none(text):
    assert make_config(load_stage("06_train_restorer").Config, {"gray_prob": text}).gray_prob is None


def test_stage_1_reads_the_former_names_of_its_strengths():
    config_class = load_stage("01_make_pairs").Config
    config = parse_config(config_class, ["--noise_factors", "0.1", "0.2", "0.3", "0.4", "--crop_noise_factors", "0.5"])
    assert config.strengths == (0.1, 0.2, 0.3, 0.4) and config.crop_strengths == (0.5,)


@pytest.mark.parametrize("name", NUMBERED)
def test_former_names_of_a_stage_lead_to_its_fields(name):
    config_class = load_stage(name).Config
    fields, renamed = field_help(config_class).keys(), getattr(config_class, "RENAMED", {})
    current = {name for value in renamed.values() for name in ((value,) if isinstance(value, str) else value)}
    assert not renamed.keys() & fields and current <= fields
    for attribute in ("FREE", "AFTER_TRAINING"):
        assert getattr(config_class, attribute, frozenset()) <= fields
