"""Settings of a stage: a flat dataclass, a YAML preset, a command line, and the copy saved beside the results.

A field's trailing comment is its help text. An interval in it, such as `(0, 1]` or `[1, inf)`, is also the rule that
the value is checked against, so the documented range and the enforced one cannot differ. A field that had another name
before is still read under it, everywhere:

    @dataclass
    class Config:
        learning_rate: float = 1e-5  # learning rate of AdamW, (0, inf)
        batch_size: int = 4  # images at once, [1, inf)
        RENAMED = {"rate": "learning_rate"}  # former name -> field, or the fields that share its value
        FREE = {"batch_size"}  # may differ when a run is resumed, beside RUN_KEYS

A line `# ---- Memory` above some fields is their heading in `--help`.

Precedence: dataclass < YAML section < command line.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import json
import logging
import math
import re
import shutil
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from faceprior.errors import explain, is_out_of_memory
from faceprior.files import hold_folder, printable, remove_leftovers

logger = logging.getLogger(__name__)

T = TypeVar("T")
CONFIG_FILE = "config.yaml"
UNSAVED_FILE = "config.yaml.part"  # what a kill while it is written leaves of it
DONE_FILE = "done.json"
METRICS_FILE = "metrics.jsonl"
REVIEW_FILE = "review.jsonl"  # what a person decided about the results: never deleted
EXTENDS = "extends"  # key of a preset
# Where and how fast a stage runs, not what comes out: these may differ when a run is resumed.
RUN_KEYS = frozenset(
    {"overwrite", "device", "num_workers", "tracker", "gradient_checkpointing", "save_every", "cache", "ema_device"}
)
_INTERVAL = re.compile(r"([\[(])\s*(-?[\d.]+(?:e-?\d+)?|-inf)\s*,\s*(-?[\d.]+(?:e-?\d+)?|inf)\s*([\])])")


def run_stage(
    main: Callable[[T], None],
    config_class: type[T],
    argv: list[str] | None = None,
    plan: Callable[[T, str], int] | None = None,
) -> None:
    """Parse the command line into `config_class` and call `main`.

    plan: what `--plan [SIZE]` calls instead, with the settings and the size, empty without one; its result is the exit
    code, and that of an error 2, so that 1 says one thing only.

    An error that is the user's business (see `errors`) is shown as one line; any other keeps its traceback. Ctrl-C ends
    the program with exit code 130. Printed names that the terminal's encoding lacks are shown as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    stage = Path(inspect.getfile(config_class))
    config, size = _parse(config_class, argv, plan is not None)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("faceprior").setLevel(logging.INFO)  # which detector, from which step a run resumes
    try:
        if size is not None:
            raise SystemExit(plan(config, size))
        main(config)
    except KeyboardInterrupt:
        print(f"{stage.name}: interrupted; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        message = explain(error, stage.parent)
        if message is None:
            raise
        if is_out_of_memory(error):
            message += f"; {memory_advice(config)}"
            message += "; `--plan 8GB` finds what fits into 8 GB" if plan else ""
        message = f"{stage.name}: error: {printable(message, sys.stderr.encoding)}"
        if size is None:
            raise SystemExit(message) from error
        print(message, file=sys.stderr)
        raise SystemExit(2) from error


@contextmanager
def advise_on_memory(settings: dict[str, Any]) -> Iterator[None]:
    """Turn an error for lack of memory into a MemoryError that names the settings that need less."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"{explain(error)}; {memory_advice(settings)}") from error


def memory_advice(settings: Any) -> str:
    """Say with which options less memory is needed; those come first with which the same run resumes.

    settings: a stage's Config, whose options are written as on the command line, or a dict of arguments in Python.
    """
    in_python = isinstance(settings, dict)
    values = settings if in_python else dataclasses.asdict(settings)
    free = RUN_KEYS | {"batch_size", "accumulation"} | getattr(type(settings), "FREE", frozenset())
    same, other = [], []
    for changes in memory_options(values):
        resumes = bool(values.get("output")) and changes.keys() <= free
        (same if resumes else other).append(_written(changes, in_python))
    parts = [f"{' or '.join(same)} (the same run resumes)" if same else "", ", ".join(other)]
    options = ", else, in a new run, ".join(filter(None, parts))
    return f"less is needed with {options}" if options else "use a machine with more"


def memory_options(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the changes of settings that need less memory, {option: value}, in the order of what they cost.

    First what costs nothing but a place on the disk or time, then what changes the numbers a little, then what is
    trained, at last the size of the images, whose value is None: smaller.
    """
    value, options = values.get, []
    if value("cache") == "":
        options.append({"cache": "data/cache"})
    if (value("batch_size") or 1) > 1:
        size, micro_batches = value("batch_size"), value("accumulation")
        factor = 2 if size % 2 == 0 else size
        rest = {"accumulation": micro_batches * factor} if micro_batches else {}
        options.append({"batch_size": size // factor, **rest})
    if value("vae_tiling") is False:
        options.append({"vae_tiling": True})
    if value("gradient_checkpointing") is False:
        options.append({"gradient_checkpointing": True})
    if value("ema_decay") and value("ema_device") == "auto":
        options.append({"ema_device": "cpu"})
    if value("mixed_precision") == "no":
        options.append({"mixed_precision": "bf16"})
    if value("dtype") == "float32":
        options.append({"dtype": "bfloat16"})
    if value("offload") == "none":
        options.append({"offload": "model"})
    if value("optimizer") == "adamw":
        options.append({"optimizer": "adamw8bit"})
    lora = {} if value("train") in (None, "lora") else {"train": "lora"}
    if lora:
        options.append(lora)
    if value("quantization") in ("none", "8bit"):
        options.append({**lora, "quantization": "nf4"})
    if value("offload") in ("none", "model"):
        options.append({"offload": "sequential"})
    if (
        "validate_every" in values and value("scorer") not in (None, "none") and not value("keep_best")
    ):  # it only watches
        options.append({"scorer": "none"})
    return options + [{name: None} for name in values if name.endswith("resolution")]


def _written(changes: dict[str, Any], in_python: bool) -> str:
    """Write options as arguments in Python, or as flags."""
    if None in changes.values():
        return f"a smaller {'' if in_python else '--'}{next(iter(changes))}"
    if in_python:
        return " with ".join(f"{name}={value!r}" for name, value in changes.items())
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items())


def parse_config(config_class: type[T], argv: list[str] | None = None) -> T:
    """Read `--config FILE` and `--key value` overrides into a `config_class`; wrong input ends the program, named."""
    return _parse(config_class, argv)[0]


def _parse(config_class: type[T], argv: list[str] | None, plannable: bool = False) -> tuple[T, str | None]:
    """Return the settings of `parse_config`, and the size of `--plan`; None without it."""
    section = stage_name(config_class)
    parser = _parser(config_class, section)
    if plannable:
        parser.add_argument("--plan", nargs="?", const="", metavar="SIZE", help=_PLAN_HELP)
    known, unknown = parser.parse_known_args(argv)
    values = {key: value for key, value in vars(known).items() if key not in ("config", "plan")}
    try:
        if unknown:
            raise ValueError(_unexpected(unknown[0], config_class))
        preset = load_section(known.config, section, config_class) if known.config else {}
        config = make_config(config_class, {**preset, **_current_names(config_class, values)})
        return config, getattr(known, "plan", None)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def make_config(config_class: type[T], values: dict[str, Any]) -> T:
    """Build `config_class` from plain values (YAML's or text), each cast to its field's type and checked.

    Raises ValueError that names the key, the value and the rule.
    """
    hints, helps = typing.get_type_hints(config_class), field_help(config_class)
    values = _current_names(config_class, values)
    for key in values:
        if key not in hints:
            raise ValueError(_unknown(key, f"for {stage_name(config_class)}", hints))
    config = config_class(**{key: _cast(key, value, hints[key]) for key, value in values.items()})
    for field in dataclasses.fields(config):
        _check_range(field.name, getattr(config, field.name), helps.get(field.name, ""))
    return config


def load_section(path: str | Path, section: str, config_class: type) -> dict[str, Any]:
    """Return the settings of `section` in a preset, which must have it (empty: the defaults).

    A preset may begin with `extends: OTHER.yaml`, or a list of such files, which lie beside it: their settings come
    first, and its own go over them, key by key. The names of all sections are checked against the stages, the keys
    against the fields of `config_class`.
    """
    chain = _read_presets(Path(path))
    stages = {p.stem for p in Path(inspect.getfile(config_class)).parent.glob("*.py")}
    hints, values, found = typing.get_type_hints(config_class), {}, []
    for file, preset in chain.items():
        for name in preset:
            if name not in stages:
                raise ValueError(_unknown(name, f"in {file}", stages, "section"))
        own = _current_names(config_class, preset.get(section) or {})
        for key in own:
            if key not in hints:
                raise ValueError(_unknown(key, f"in section {section} of {file}", hints))
        values |= own
        found += preset
    if section not in found:
        names = ", ".join(dict.fromkeys(found))
        raise ValueError(f"{path} has no section {section} but {names}: add it, or leave out `--config`")
    return values


def _read_presets(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[Path, dict[str, Any]]:
    """Read a preset and those that it extends -> the sections of each file, in the order in which they apply."""
    # ---- The file itself
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml")))
        source = f" ({extended_by[-1]} extends it)" if extended_by else ""
        raise FileNotFoundError(f"no preset {path}{source}" + (f": {path.parent} has {near}" if near else ""))
    if path.resolve() in {other.resolve() for other in extended_by}:
        raise ValueError(f"{path} extends itself, by way of {', '.join(map(str, extended_by))}")
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    extends = preset.pop(EXTENDS, []) if isinstance(preset, dict) else []
    names = extends if isinstance(extends, list) else [extends]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{EXTENDS}` in {path} has to be the name of a preset, or a list of names, but is {extends}")
    if not isinstance(preset, dict) or not all(isinstance(v, dict | None) for v in preset.values()):
        raise ValueError(f"{path} has to hold one section per stage, each with `key: value` lines")

    # ---- What it extends comes first
    chain: dict[Path, dict[str, Any]] = {}
    for name in names:
        chain |= _read_presets(path.parent / name, (*extended_by, path))
    return {**chain, path: preset}


def open_output(config: Any, free: Iterable[str] = ()) -> Path:
    """Create the folder `config.output` for this run, or open it to resume; the settings are saved in it.

    A folder that holds the results of other settings is refused with the differing keys named, unless
    `config.overwrite` is set, which deletes what is in it. Keys that may differ are RUN_KEYS, the `FREE` of the Config,
    `free`, and keys that this version does not know; all of them where only the settings are in the folder, of a run
    that failed before its first result. A folder with anything else in it is never touched. Folders of other runs
    inside it (as `results/demo` in `results`) are left alone. A folder in which another process runs is refused.
    Raises FileExistsError.
    """
    output, section = Path(config.output), stage_name(type(config))
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"`output` has to be a folder but {output} is a file")
    if output.is_dir():
        hold_folder(output, config)
    stored = saved_settings(config)
    if stored is not None:
        if config.overwrite:
            _empty(output)
        else:
            require_same_settings(config, free)
    elif output.is_dir() and (found := _entries(output)):
        raise FileExistsError(
            f"{output} was not made by {section} but has {found[0].name} in it: choose another `output`"
        )
    output.mkdir(parents=True, exist_ok=True)
    hold_folder(output, config)
    remove_leftovers(output, recursive=True)
    save_config(config, output)
    return output


def require_same_settings(config: Any, free: Iterable[str] = ()) -> None:
    """Raise FileExistsError, as `open_output`, if `config.output` holds the results of other settings."""
    output, stored, now = Path(config.output), saved_settings(config), _plain(config)
    if stored is None or all(path.name == CONFIG_FILE or _is_empty_log(path) for path in _entries(output)):
        return
    if removed := sorted(stored.keys() - now.keys()):
        logger.info("%s has settings that this version does not know, ignored: %s", output, ", ".join(removed))
    free = RUN_KEYS | getattr(type(config), "FREE", frozenset()) | frozenset(free)
    keys = [key for key in sorted(now.keys() - free) if stored.get(key) != now[key]]
    if keys:
        changes = ", ".join(f"{key} ({_text(stored.get(key))} there, {_text(now[key])} now)" for key in keys)
        raise FileExistsError(
            f"{output} holds a run with other settings: {changes}. "
            "Give the same settings to resume it, another `output`, or `--overwrite` to start over"
        )


def saved_settings(config: Any) -> dict[str, Any] | None:
    """Return the settings that the run in `config.output` was made with, by their current names; None without a run.

    An option that has come since was then what is its default now. Raises FileExistsError if another stage saved them.
    """
    config_class, saved = type(config), Path(config.output) / CONFIG_FILE
    if not saved.is_file():
        return None
    section = stage_name(config_class)
    try:
        stored = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict) or list(stored) != [section] or not isinstance(stored[section], dict):
        raise FileExistsError(f"{saved.parent} was not made by {section}: choose another `output`")
    return _plain(config_class()) | _current_names(config_class, stored[section])


def save_config(config: Any, folder: str | Path) -> None:
    """Write the settings to `folder/config.yaml`, which is itself a preset for `--config`; the same are not touched."""
    text = yaml.safe_dump({stage_name(type(config)): _plain(config)}, sort_keys=False, allow_unicode=True).encode()
    temporary, saved = Path(folder) / UNSAVED_FILE, Path(folder) / CONFIG_FILE
    if saved.is_file() and saved.read_bytes() == text:
        return
    temporary.write_bytes(text)
    temporary.replace(saved)


def is_complete(output: str | Path) -> bool:
    """Tell whether the stage that writes to `output` has finished."""
    return (Path(output) / DONE_FILE).is_file()


def finish(output: str | Path, **summary) -> None:
    """Write `done.json`, which tells the next call of the same command that the stage is complete."""
    path = Path(output) / DONE_FILE
    temporary = path.with_suffix(".part")  # always the same, so that what a kill leaves of it is replaced
    temporary.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    temporary.replace(path)


def stage_name(config_class: type) -> str:
    """Return the name of the file that defines `config_class`: a preset's section, as `04_guidance_tune`."""
    return Path(inspect.getfile(config_class)).stem


def field_help(config_class: type) -> dict[str, str]:
    """Return the comment behind every field of a dataclass (empty where there is none)."""
    comments, fields = _source(config_class)
    # a formatter may have wrapped the line: all comments from its first to its last row count
    return {name: " ".join(comments[row] for row in span if row in comments) for name, span in fields.items()}


def field_headings(config_class: type) -> dict[str, str]:
    """Return the heading that every field of a dataclass stands under (empty before the first)."""
    comments, fields = _source(config_class)
    headings = {row: text.strip("- ") for row, text in comments.items() if text.startswith("----")}
    above = {name: [row for row in headings if row < span.start] for name, span in fields.items()}
    return {name: headings[max(rows)] if rows else "" for name, rows in above.items()}


def _source(config_class: type) -> tuple[dict[int, str], dict[str, range]]:
    """Return the comments in a dataclass by row, and the rows of each field."""
    source = textwrap.dedent(inspect.getsource(config_class))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return comments, {node.target.id: range(node.lineno, node.end_lineno + 1) for node in fields}


_PLAN_HELP = (
    "print the memory that the training takes, by part and phase, and end; with a card's size, such as 8GB: also the "
    "options with which it fits, cheapest first. Loads no weights. Exit code 0 if it fits, 1 if not, 2 after an error"
)


def _parser(config_class: type, section: str) -> argparse.ArgumentParser:
    description = (sys.modules[config_class.__module__].__doc__ or "").strip()
    parser = argparse.ArgumentParser(
        prog=f"{section}.py",
        usage="%(prog)s [-h] [--config FILE] [--KEY VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a preset, such as stages/presets/sd15.yaml")
    hints, helps = typing.get_type_hints(config_class), field_help(config_class)
    headings = field_headings(config_class)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(headings.values()) if title}
    for field in dataclasses.fields(config_class):
        hint, default = hints[field.name], field.default
        text = f"{helps[field.name]} (default: {_text(default)})".replace("%", "%%")
        options: dict[str, Any] = {"help": text}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            options |= {"nargs": "+", "metavar": "VALUE"}
        else:
            options["metavar"] = "{" + ",".join(map(str, _choices(hint))) + "}" if _choices(hint) else "VALUE"
        former = [name for name, fields in _renamed(config_class).items() if fields[0] == field.name]
        for name in (field.name, *former):
            if name != field.name:
                options["help"] = argparse.SUPPRESS  # still read, no longer shown
            # set afterwards: given a default, BooleanOptionalAction adds its own text about it to the help
            group = groups.get(headings[field.name], parser)
            group.add_argument(f"--{name}", **options).default = argparse.SUPPRESS
    return parser


def _renamed(config_class: type) -> dict[str, tuple[str, ...]]:
    """Return the former names and the fields that have their values now, as the class attribute `RENAMED` declares."""
    declared = getattr(config_class, "RENAMED", {})
    return {former: (fields,) if isinstance(fields, str) else tuple(fields) for former, fields in declared.items()}


def _current_names(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return settings of one source under the current names of their fields; ValueError for both names of one field."""
    renamed, current = _renamed(config_class), {}
    for key, value in values.items():
        for name in renamed.get(key, (key,)):
            if name != key and name in values:
                raise ValueError(f"`{key}` is the former name of `{name}`, and both are given: give `{name}` only")
            current[name] = value
    return current


def _choices(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _cast(key: str, value: Any, hint: Any) -> Any:
    """Cast a YAML or command line value to a field's type. PyYAML reads `5e-5` as text, hence the casts of text."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() in ("", "none", "null"))):
            return None
        words = [word for option in args for word in _choices(option)]
        if value in words:  # as the `auto` of `float | Literal["auto"]`
            return value
        try:
            return _cast(key, value, next(a for a in args if a is not type(None)))
        except ValueError as error:
            raise ValueError(f"{error}; or {', '.join(words)}" if words else str(error)) from None
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"`{key}` has to be a list but is {value!r}")
        return tuple(_cast(key, v, args[0]) for v in value)
    if origin is Literal:
        if value is False and "no" in args:  # YAML reads a bare `no` as false
            value = "no"
        if value not in args:
            raise ValueError(f"`{key}` has to be one of {', '.join(map(str, args))} but is {value!r}")
        return value
    return _cast_scalar(key, value, hint)


def _cast_scalar(key: str, value: Any, hint: type) -> Any:
    wrong = ValueError(f"`{key}` has to be {_TYPE_NAMES[hint]} but is {value!r}")
    if hint in (bool, str):
        if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, hint):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    if hint is int and isinstance(value, int):
        return value
    try:
        if hint is int and isinstance(value, str) and value.strip("+-").isdecimal():
            return int(value)  # not by way of float, which holds 53 bits
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if math.isnan(number) or (hint is int and not number.is_integer()):
        raise wrong
    return hint(number)


_TYPE_NAMES = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}


def _check_range(key: str, value: Any, text: str) -> None:
    match = _INTERVAL.search(text)
    if match is None:
        return
    left, low, high, right = match.group(1), float(match.group(2)), float(match.group(3)), match.group(4)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool | str | None):
            continue
        above = number >= low if left == "[" else number > low
        below = number <= high if right == "]" else number < high
        if not (above and below):
            raise ValueError(f"`{key}` has to be in {match.group(0)} but is {number}")


def _entries(output: Path) -> list[Path]:
    """Return what is in a folder, without other runs and people's reviews, in the order in which it may be deleted.

    The settings come last: killed in between, the folder is still known as the run's.
    """
    order = {DONE_FILE: 0, CONFIG_FILE: 2}
    kept = (UNSAVED_FILE, REVIEW_FILE)
    found = [p for p in output.iterdir() if p.name not in kept and not (p.is_dir() and any(p.rglob(CONFIG_FILE)))]
    return sorted(found, key=lambda path: (order.get(path.name, 1), path.name))


def require_outside(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise ValueError for an input that lies in what a run writes to `output`, and `overwrite` deletes.

    Folders of other runs inside it may be inputs.
    """
    made = [path.resolve() for path in _entries(Path(output))] if is_run(output) else []
    for path in inputs:
        if any(Path(path).expanduser().resolve().is_relative_to(own) for own in made):
            raise ValueError(
                f"{path} lies in the output folder {output}, where files are replaced and `--overwrite` deletes them:"
                " move it out, or choose another `output`"
            )


def is_run(output: str | Path) -> bool:
    """Tell whether a folder holds the settings of a run."""
    return (Path(output) / CONFIG_FILE).is_file()


def _is_empty_log(path: Path) -> bool:
    """Tell whether a file is the log of a run that has not taken a step."""
    return path.name == METRICS_FILE and path.is_file() and path.stat().st_size == 0


def _empty(output: Path) -> None:
    for path in _entries(output):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _plain(config: Any) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if key != "overwrite"}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "empty" if value == "" else str(value)


def _unexpected(argument: str, config_class: type) -> str:
    """Return the message for what is left of the command line."""
    if not argument.startswith("-"):
        return f"unexpected value {argument!r}: give settings as `--key value`, switches as `--key` or `--no-key`"
    return _unknown(argument.partition("=")[0].lstrip("-"), "on the command line", field_help(config_class))


def _unknown(name: Any, where: str, valid: Iterable[str], what: str = "key") -> str:
    near = difflib.get_close_matches(str(name), list(valid), 1)
    hint = f"did you mean `{near[0]}`?" if near else f"the {what}s are {', '.join(sorted(valid))}"
    return f"unknown {what} `{name}` {where}: {hint}"


def print_problems(problems: list[tuple[str, str]], kind: str = "input", most: int | None = None) -> None:
    """Print what was skipped and why, at the end of a stage; most: how many are listed, None for all."""
    if problems:
        print(f"{len(problems)} {kind}{'s' if len(problems) > 1 else ''} skipped:")
    for name, reason in problems[:most]:
        print(f"  {printable(f'{name}: {reason}', sys.stdout.encoding)}")
    if len(problems[:most]) < len(problems):
        print(f"  and {len(problems) - most} more")
