"""The examples run, as they stand."""

import re
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


def test_gradient_ascent(tmp_path, monkeypatch, capsys):
    """On pixels and on latents the last score is above the first, and the picture another."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "gradient_ascent.py"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["pixels", "pixels", "latents", "latents"]
    scores = [float(re.search(r"Face Score (\S+)", line)[1]) for line in lines]
    assert scores[1] > scores[0] and scores[3] > scores[2]
    for name in ("pixels", "latents"):
        before, after = (Image.open(f"results/ascent_{name}_{when}.png") for when in ("before", "after"))
        assert before.size == after.size == (128, 128) and before.tobytes() != after.tobytes()


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path
