"""The accelerator of a run: its device, precision and tracker."""

import json

import pytest
import torch
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from training_runs import metrics, train, train_until

from faceprior.models import resolve_device, weight_dtype
from faceprior.training import accelerator, make_accelerator

# devices


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "mps", "meta", "cuda:99"])
def test_other_devices_are_refused(name):
    """`meta` and `mps` are devices of torch that a run would silently not use."""
    with pytest.raises(
        ValueError, match=f"`device` (has to be auto, cpu, cuda or cuda:N but is '{name}'|is {name} but)"
    ):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_where_there_is_none():
    with pytest.raises(ValueError, match="`device` is cuda but this machine has no CUDA device.*--device cpu"):
        make_accelerator("cuda")


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="`mixed_precision` is fp16, which a CPU cannot train in: use bf16 or no"):
        make_accelerator("cpu", "fp16")


def test_the_environment_does_not_override_the_settings(monkeypatch):
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "7"), ("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "eager")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    accelerator = make_accelerator("cpu", "no", 2)
    assert accelerator.gradient_accumulation_steps == 2 and accelerator.mixed_precision == "no"
    network = torch.nn.Linear(1, 1)
    assert accelerator.prepare(network) is network  # not compiled


def test_one_process_may_train_twice_with_other_settings():
    """As a notebook does; accelerate alone refuses another precision."""
    for precision, accumulation in (("no", 3), ("bf16", 1), ("no", 2)):
        accelerator = make_accelerator("cpu", precision, accumulation)
        assert accelerator.mixed_precision == precision
        assert accelerator.gradient_accumulation_steps == accumulation
    assert weight_dtype("bf16") == torch.bfloat16 and weight_dtype("no") == torch.float32


# trackers


class Lines(GeneralTracker):
    """A tracker of accelerate's that keeps what is logged to it."""

    name, requires_logging_directory = "lines", False

    def __init__(self):
        super().__init__()
        self.rows, self.finished = [], False

    @property
    def tracker(self):
        return self.rows

    def log(self, values, step=None, **kwargs):
        self.rows.append({"step": step, **values})

    def finish(self):
        self.finished = True


def test_a_tracker_gets_the_rows_of_the_log(tmp_path):
    """At their steps, also when the run is resumed: step 3 is done, and logged, again."""
    first, second = Lines(), Lines()
    train_until(tmp_path, 3, tracker=first)
    train(tmp_path, tracker=second)
    lines = [json.loads(line) for line in metrics(tmp_path).splitlines()]
    assert first.rows == lines[:3] and second.rows == lines[2:]
    assert second.finished


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path, tracker):
    if tracker in get_available_trackers():
        pytest.skip(f"{tracker} is installed")
    with pytest.raises(ImportError, match=f"`tracker` is {tracker}, which is not installed: `pip install {tracker}`"):
        make_accelerator("cpu", tracker=tracker, output=tmp_path)


def test_an_installed_tracker_is_accepted_by_its_name(tmp_path, monkeypatch):
    """accelerate lists trackers as members of an enum, which are not equal to their names."""
    monkeypatch.setattr(accelerator, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    make_accelerator("cpu", tracker="tensorboard", output=tmp_path)
    with pytest.raises(ImportError, match="`tracker` is wandb"):
        make_accelerator("cpu", tracker="wandb", output=tmp_path)


def test_tensorboard_files_are_in_the_output_folder(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, tracker="tensorboard")
    assert any((tmp_path / "tensorboard").rglob("events.out.tfevents*"))
