"""The images of a method: made in batches, timed alike for every method, with what fails named and tried again."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from tqdm.auto import tqdm

from faceprior.errors import explain, is_disk_full, is_out_of_memory

Item = TypeVar("Item")
Problems = list[tuple[str, str]]


def make_images(
    make: Callable[[list[Item]], list[Image.Image]],
    items: Sequence[Item],
    save: Callable[[Item, Image.Image, float], None],
    device: torch.device,
    batch_size: int = 1,
    desc: str = "",
) -> Problems:
    """Make the image of every item and hand it to `save(item, image, seconds)`; returns (id, reason) of failures.

    seconds: of one image, as a fraction of its batch, with the device's work finished before and after; a first call,
    which compiles and allocates, is made before and not measured. A batch that fails is made again one by one. A full
    disk ends the run, and so does memory that does not suffice for the first image: all have one size.
    """
    if not items:
        return []
    batches = [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    failed: Problems = []
    done = 0
    is_warm = False
    bar = tqdm(total=len(items), desc=desc, unit="image", disable=None)
    while batches:
        batch = batches.pop(0)
        try:
            if not is_warm:
                make(batch)
                is_warm = True
            images, seconds = timed(make, batch, device)
        except Exception as error:
            reason = explain(error)
            if reason is None or is_disk_full(error) or (done == 0 and len(batch) == 1 and is_out_of_memory(error)):
                raise
            if len(batch) > 1:
                batches[:0] = [[item] for item in batch]
            else:
                failed.append((batch[0].id, reason))
                bar.update()
            continue
        for item, image in zip(batch, images, strict=True):
            save(item, image, seconds / len(batch))
        done += len(batch)
        bar.update(len(batch))
    bar.close()
    return failed


def timed(make: Callable[[Any], Any], batch: Any, device: torch.device) -> tuple[Any, float]:
    """Call `make(batch)` -> (result, seconds), with the work of a GPU finished before and after."""
    synchronize(device)
    start = time.perf_counter()
    result = make(batch)
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_note(device: torch.device, batch_size: int) -> str:
    """Say how `seconds` were measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"time: per image in batches of {batch_size} on {name}, after a first one that is not counted"


def picture_file(protocol: str, folder: str, item: str) -> Path:
    """Return the file of an image below the output folder, in which people can compare or rank the images."""
    return Path(protocol, "images", folder, f"{item}.png")
