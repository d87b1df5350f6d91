"""
How much longer a stage takes beside a busy program, by the number of its threads and by how they wait for one another.

    python tests/benchmarks/beside.py                          # stage 6 of the tiny models, some minutes
    python tests/benchmarks/beside.py --busy 2 --steps 10      # beside two busy threads
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from faceprior.procedural import draw_folder

STAGE = Path(__file__).resolve().parents[2] / "stages/06_train_restorer.py"
# What OpenMP reads at the start of a process. The stage's own threads are as many as the processor has cores.
WAYS = {
    "OpenMP's own": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
BUSY = """
import torch
torch.set_num_threads(1)
layers = torch.nn.Sequential(*[torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(6)])
images = torch.randn(4, 32, 96, 96)
with torch.no_grad():
    while True:
        layers(images)
"""


def main() -> None:
    options = parse()
    print(f"{os.cpu_count()} cores, stage 6 with {options.steps} steps, beside {options.busy} busy threads")
    print(f"{'':24}  {'alone, s':>9}  {'beside, s':>9}  {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        draw_folder(Path(folder, "faces"), range(8), 128)
        for name, variables in WAYS.items():
            alone = seconds(Path(folder), options, variables)
            with busy_threads(options.busy):
                beside = seconds(Path(folder), options, variables)
            stopped = "  at least: stopped" if beside >= options.limit else ""
            print(f"{name:24}  {alone:9.1f}  {beside:9.1f}  {beside / alone:5.2f}x{stopped}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="busy threads, each a process of its own")
    parser.add_argument("--steps", type=int, default=20, help="of the training")
    parser.add_argument("--limit", type=float, default=120, help="seconds after which a run is stopped")
    return parser.parse_args()


def seconds(folder: Path, options: argparse.Namespace, variables: dict[str, str]) -> float:
    """Train anew, with those variables and none of the caller's, and return the time by the clock, or the limit."""
    known = {name for way in WAYS.values() for name in way}
    environment = {name: value for name, value in os.environ.items() if name not in known} | variables
    words = ["--images", folder / "faces", "--prior", "tiny", "--output", folder / "out", "--overwrite"]
    start = time.perf_counter()
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, STAGE, *map(str, words), "--steps", str(options.steps)],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=options.limit,
        )
        return time.perf_counter() - start
    return options.limit


@contextlib.contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Keep `count` cores busy, in a session of their own, as another program is."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(count)]
    try:
        time.sleep(5)  # until they are busy
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
