"""Which errors end in one line, and which keep their traceback as bugs."""

import errno
import importlib.util

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from faceprior.errors import explain, is_disk_full, is_out_of_memory
from faceprior.images import ImageError, load_image
from faceprior.metrics import MetricUnavailable, psnr


def caught(function, *args) -> BaseException:
    try:
        function(*args)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def throw(error: BaseException):
    raise error


def test_errors_of_faceprior_are_shown_as_they_are():
    size = caught(psnr, np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8))
    assert explain(size) == str(size) and "the images need one size" in str(size)
    assert explain(MetricUnavailable("no weights")) == "no weights"
    assert explain(ImageError("is empty")) == "is empty"
    assert explain(caught(load_image, "nowhere.png")) == "no image at nowhere.png"


def test_raise_statements_beside_faceprior_count_in_their_folder_only(tmp_path):
    path = tmp_path / "stage.py"
    path.write_text("def f(x):\n    raise ValueError(f'no {x}')\n\ndef g(x):\n    return int(x)\n")
    spec = importlib.util.spec_from_file_location("a_stage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    error = caught(module.f, "faces")
    assert explain(error, tmp_path) == "no faces" and explain(error) is None
    assert explain(caught(module.g, "x"), tmp_path) is None  # a ValueError that nobody wrote


def test_files_are_the_users_business_whoever_opens_them(tmp_path):
    assert explain(caught(open, tmp_path / "none")).endswith("none'")
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    message = explain(caught(load_file, tmp_path / "damaged.safetensors"))
    assert message.startswith("SafetensorError: ") and "\n" not in message
    assert "offline" in explain(LocalEntryNotFoundError("offline"))


def test_a_full_disk_says_what_to_do():
    for error in (OSError(errno.ENOSPC, "No space left on device", "f"), SafetensorError("I/O error (os error 28)")):
        assert is_disk_full(error)
        assert explain(error).startswith("the disk is full (") and "free space on it" in explain(error)
    assert not is_disk_full(OSError(errno.ENOENT, "No such file"))


def test_errors_of_model_libraries():
    """By their class, or by a `raise` statement of theirs; an operation that fails inside of them is a bug."""
    from diffusers import UNet2DConditionModel
    from huggingface_hub.utils import validate_repo_id

    assert explain(caught(validate_repo_id, "a/b/c")).startswith("HFValidationError: ")
    assert explain(HFValidationError("two\nlines")) == "HFValidationError: two lines"
    error = caught(lambda: UNet2DConditionModel(down_block_types=("DownBlock2D",)))
    assert type(error) is ValueError and explain(error).startswith("ValueError: Must provide the same number")
    assert len(explain(SafetensorError("x" * 5000))) < 450


@pytest.mark.parametrize(
    "error",
    [TypeError("x"), KeyError("x"), IndexError("x"), AttributeError("x"), AssertionError(), ZeroDivisionError()],
)
def test_bugs_keep_their_traceback(error):
    assert explain(caught(throw, error)) is None


def test_operations_that_fail_by_themselves_are_bugs():
    assert explain(caught(lambda: torch.zeros(2) @ torch.zeros(3))) is None
    assert explain(KeyboardInterrupt()) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        MemoryError("Unable to allocate 3 TiB"),
    ],
)
def test_out_of_memory(error):
    assert is_out_of_memory(error) and explain(caught(throw, error)).startswith("out of memory: ")
    assert "total capacity" not in explain(error)


def test_packages_that_are_not_installed():
    message = "the package not_a_package is not installed: `pip install not_a_package`"
    assert explain(caught(__import__, "not_a_package.part")) == message
    assert explain(caught(__import__, "faceprior.not_a_module")) is None


def test_errors_of_loading_processes_are_those_of_the_process():
    """torch raises them again with the whole traceback as their message."""

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return load_image("nowhere.png")

    loader = torch.utils.data.DataLoader(Files(), num_workers=1)
    error = caught(lambda: next(iter(loader)))
    assert explain(error) == str(caught(load_image, "nowhere.png"))
