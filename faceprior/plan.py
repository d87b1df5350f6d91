"""`--plan`: what a stage's training needs of a graphics card's memory, before any weight is loaded.

A stage rehearses its step (see `faceprior.memory`): `rehearse(config, rehearsal)` builds the networks from their
configs, takes an optimizer step and a micro-batch, and draws the samples, by the functions that train.

    run_stage(main, Config, plan=partial(show_plan, rehearse))

Sizes are in GiB, 2^30 bytes, as a card of "8 GB" has 8 GiB.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from faceprior.config import make_config, memory_options, stage_name
from faceprior.models import quiet_libraries

logger = logging.getLogger(__name__)
GIB = 2**30
# What is not in tensors: CUDA's context and the workspaces of its libraries, and a share of the rest that lies between
# tensors in the allocator's blocks. Estimates: both depend on the card and on the versions.
CONTEXT, FRAGMENTATION = 0.5 * GIB, 0.04
WORTHWHILE = 0.01  # share of the peak that an option has to save
_LOWEST_RESOLUTION = 256  # pixels


# ---- what a run needs


@dataclass(frozen=True)
class Plan:
    """The memory of a run: phase -> part -> bytes, at the moment of the phase when most is in use.

    peak: bytes of tensors, what `torch.cuda.max_memory_allocated` returns; needed: with what lies outside of them.
    """

    phases: dict[str, dict[str, int]]
    device: str

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def needed(self) -> int:
        return self._with_overhead(self.peak)

    def excess(self, size: int) -> int:
        """Return the bytes that are missing in a card of `size`, added over the phases that do not fit into it."""
        sums = (self._with_overhead(sum(parts.values())) for parts in self.phases.values())
        return sum(max(0, total - size) for total in sums)

    def training(self) -> str:
        """Return what the run needs, and of it what grows with the number of trained weights, in words."""
        most = {part: max(phase.get(part, 0) for phase in self.phases.values()) for part in _OF_TRAINED}
        return f"{text(self.needed)}, of which " + ", ".join(f"{part} {text(size)}" for part, size in most.items())

    def _with_overhead(self, total: int) -> int:
        return total + int(CONTEXT + FRAGMENTATION * total) if self.device == "cuda" else total

    def rows(self) -> list[list[str]]:
        """Return the table: a row per part and a column per phase, in GiB (MiB of small runs), with the sums below."""
        unit, size = ("GiB", GIB) if self.peak >= GIB else ("MiB", 2**20)
        known = [phase for phase in _PHASES if phase in self.phases]
        phases = {name: self.phases[name] for name in dict.fromkeys([*known, *self.phases])}
        parts = dict.fromkeys(part for phase in phases.values() for part in phase)
        parts = sorted(parts, key=lambda part: next((i for i, p in enumerate(_PARTS) if part.startswith(p)), -1))
        rows = [[part, *(f"{phase.get(part, 0) / size:.2f}" for phase in phases.values())] for part in parts]
        sums = ["together", *(f"{sum(phase.values()) / size:.2f}" for phase in phases.values())]
        return [[unit, *phases], *(row for row in rows if set(row[1:]) != {"0.00"}), sums]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines.insert(-1, "-" * len(lines[0]))
        overhead = self.needed - self.peak
        outside = f" and about {text(overhead)} for CUDA and fragmentation: {text(self.needed)}" if overhead else ""
        return "\n".join([*lines, f"peak: {text(self.peak)}{outside}"])


# The order of the table's rows and columns, by how their names begin; other networks come first, other phases last.
_PARTS = ("VAE", "text encoders", "trained weights", "other weights", "gradients", "optimizer state", "activations")
_OF_TRAINED = ("trained weights", "gradients", "optimizer state")
_PHASES = ("encoding", "training", "optimizer step", "samples", "scores")


def make_plan(rehearse: Callable[[Any, Any], None], config: Any) -> Plan:
    """Rehearse a stage with its settings; for the CPU if `config.device` is cpu, else for CUDA, on any machine."""
    from faceprior.memory import Rehearsal

    device = "cpu" if config.device == "cpu" else "cuda"
    values = {"device": "cpu"}
    # both 16-bit types take the same memory, and a CPU does not train in float16
    for name, half, brain in (("mixed_precision", "fp16", "bf16"), ("dtype", "float16", "bfloat16")):
        if getattr(config, name, "") == half:
            values[name] = brain
    if getattr(config, "optimizer", "").startswith("paged_"):  # pages that fit stay on the card, and a CPU has none
        values["optimizer"] = config.optimizer.removeprefix("paged_")
    rehearsal = Rehearsal(device)
    rehearse(dataclasses.replace(config, **values), rehearsal)
    return Plan(rehearsal.peaks, device)


# ---- what makes it fit


def options(config: Any) -> Iterator[dict[str, Any]]:
    """Yield changes of a stage's settings that may save memory, cheapest first: all steps of `memory_options`.

    Of those that have several: micro-batches down to one sample, 8 bits before 4, and ever smaller images.
    """
    value = dataclasses.asdict(config)
    for option in memory_options(value):
        if "batch_size" in option:
            smaller = option
            while smaller:
                yield smaller
                smaller = next((o for o in memory_options({**value, **smaller}) if "batch_size" in o), None)
        elif "quantization" in option:
            for bits in ("8bit", "nf4")[value["quantization"] == "8bit" :]:
                yield {**option, "quantization": bits}
        elif "resolution" in option:
            side = value["resolution"]
            while (side := side * 3 // 4 // 64 * 64) >= _LOWEST_RESOLUTION:
                yield {"resolution": side}
        else:
            yield option


def find_fitting(
    rehearse: Callable[[Any, Any], None], config: Any, size: int, plan: Plan
) -> Iterator[tuple[dict[str, Any], Plan, bool]]:
    """Try `options` on a run whose `plan` needs more than `size` bytes, until one fits.

    Yields (the option, the plan with it and those kept before, whether it is kept) for each try. An option that lowers
    no phase that does not fit is left out, and tried again when another one was kept.
    """
    left, saved = [(option, -1) for option in options(config)], 0  # with what was saved when each was tried last
    while plan.needed > size and (option := next((o for o, tried in left if tried < saved), None)):
        left = [(o, saved if o == option else tried) for o, tried in left]
        try:
            changed = make_config(type(config), {**dataclasses.asdict(config), **option})
            lower = make_plan(rehearse, changed)
        except ValueError as error:  # a base or another setting does not go with it
            logger.debug("%s: %s", option, error)
            continue
        saves = plan.excess(size) - lower.excess(size) > WORTHWHILE * plan.peak
        kept = saves or lower.needed <= size
        yield option, lower, kept
        if kept:
            config, plan, saved = changed, lower, saved + 1
            left = [(o, tried) for o, tried in left if o != option]


def find_needless(
    rehearse: Callable[[Any, Any], None], config: Any, size: int, chosen: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], Plan]]:
    """Yield those of the `chosen` options that later ones have made needless, with the plan without them.

    The last one stays: without it the run did not fit.
    """
    left = list(chosen)
    for option in reversed(chosen[:-1]):
        fewer = [o for o in left if o != option]
        if _merged(fewer) == _merged(left):  # a later one of its kind goes further
            continue
        changed = make_config(type(config), {**dataclasses.asdict(config), **_merged(fewer)})
        lower = make_plan(rehearse, changed)
        if lower.needed <= size:
            yield option, lower
            left = fewer


def _merged(options: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for option in options for name, value in option.items()}


def show_plan(
    rehearse: Callable[[Any, Any], None],
    config: Any,
    size: str = "",
    title: str = "",
    link: str = "_",
    beside: dict[str, Any] | None = None,
) -> int:
    """Print the memory that a stage needs and, for a `size` such as 8GB, the options with which it fits.

    title: what is planned, for what is not a stage; link: what joins the words of an option there; beside: settings
    whose plan is printed in a line below, to compare, where the run has others.

    Returns the exit code: 0, or 1 if it does not fit, with or without options.
    """
    quiet_libraries()
    limit = parse_size(size) if size else None
    plan = make_plan(rehearse, config)
    print(f"{title or f'{stage_name(type(config))}: a step'} rehearsed without data, for {plan.device}")
    print(plan, flush=True)
    if changes := {key: value for key, value in (beside or {}).items() if getattr(config, key) != value}:
        other = make_plan(rehearse, make_config(type(config), {**dataclasses.asdict(config), **changes}))
        print(f"with {command_options(changes, link)}: {other.training()}", flush=True)
    if limit is None:
        return 0
    if plan.needed <= limit:
        print(f"it fits into {text(limit)}")
        return 0

    # ---- options, cheapest first
    print(f"it does not fit into {text(limit)}; tried, cheapest first:", flush=True)
    chosen: list[dict[str, Any]] = []
    for option, lower, kept in find_fitting(rehearse, config, limit, plan):
        note = "" if kept else "  saves nothing here, left out"
        print(f"  {command_options(option, link):40} {text(lower.needed):>10}{note}", flush=True)
        if kept:
            plan = lower
            chosen.append(option)
    if plan.needed <= limit:
        for option, lower in find_needless(rehearse, config, limit, chosen):
            print(
                f"  without {command_options(option, link):32} {text(lower.needed):>10}  not needed any more",
                flush=True,
            )
            plan = lower
            chosen.remove(option)
    added = _merged(chosen)
    if added:
        print(plan)
    if plan.needed > limit:
        least = f" with {command_options(added, link)}" if added else ""
        print(f"nothing fits into {text(limit)}: the least is {text(plan.needed)}{least}")
        return 1
    print(f"it fits into {text(limit)} with {command_options(added, link)}")
    return 0


def command_options(values: dict[str, Any], link: str = "_") -> str:
    """Write settings as a stage's command line takes them, or, with another `link` of words, another command's."""
    flags = {True: "--{0}", False: "--no-{0}"}
    values = {name.replace("_", link): value for name, value in values.items()}
    return " ".join(
        flags.get(v, "--{0} {1}").format(k, v) if isinstance(v, bool) else f"--{k} {v}" for k, v in values.items()
    )


def parse_size(text: str) -> int:
    """Return the bytes of a card's size: `8GB`, `8`, `7.5GiB`, `7500MB`; GB are GiB here."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(g|m)i?b?)?\s*", text, re.IGNORECASE)
    if not match or not 0 < float(match[1]) < math.inf:
        raise ValueError(f"`--plan` takes the memory of a card, such as 8GB, but got {text!r}")
    return int(float(match[1]) * (2**20 if (match[2] or "g").lower() == "m" else GIB))


def text(size: float) -> str:
    """Write a number of bytes in GiB, or in MiB if it is below one."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
