"""The examples run, as they stand."""

import runpy
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_sdk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "sdk.py"))
    printed = capsys.readouterr().out
    assert printed.count("Face Score: [") == 4 and "restored faces: 1" in printed
    assert (tmp_path / "results/example_lora/pytorch_lora_weights.safetensors").is_file()
    assert Image.open(tmp_path / "results/example_restored.png").size == (128, 128)


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path
