"""The measures of stage 7 by small networks of the real classes, and what is said where weights are missing."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from faceprior.bases.single_file import _read_vocabulary
from faceprior.cli import main
from faceprior.detect import Face
from faceprior.evaluation.judges import (
    _ARCFACE_POINTS,
    CLIP_ID,
    _to_image,
    arcface_network,
    clip_score_metric,
    quality_metric,
)
from faceprior.evaluation.measures import (
    MEASURES,
    MeasureSettings,
    Sample,
    find_measure,
    measures_of,
    read_weights,
)
from faceprior.metrics import MetricUnavailable


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """Empty caches of torch, the hub, CLIP and insightface."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home" / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


# --- which there are


def test_every_measure_has_words_and_a_place():
    for protocol in ("restoration", "generation"):
        keys = [measure.key for measure in measures_of(protocol)]
        assert len(set(keys)) == len(keys)
    for measure in MEASURES:
        assert measure.title and measure.licence and f"{0.5:{measure.spec}}"
        if measure.stands_in_for:
            assert find_measure(measure.stands_in_for, measure.protocols[0]).better == measure.better


def test_wanted_measures_come_with_what_stands_in_for_them():
    assert [measure.key for measure in measures_of("restoration", ("fid", "psnr"))] == ["psnr", "fid", "fid_tiny"]
    with pytest.raises(ValueError, match="`measures` has to hold some of psnr, .* but has 'PSNR'"):
        measures_of("restoration", ("PSNR",))


def test_weights_are_named():
    assert read_weights(["hps=a=b.pt", "clip=x"]) == {"hps": "a=b.pt", "clip": "x"}
    for text in ("hps", "fid=x", "hps="):
        with pytest.raises(ValueError, match="`weights` has to hold NAME=PATH"):
            read_weights([text])


# --- CLIP-Score


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A small random CLIP with the real vocabulary, as a folder of transformers."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "image_size": 32, "patch_size": 8}
    text |= {"eos_token_id": 49407, "bos_token_id": 49406}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(folder)
    vocab, merges = _read_vocabulary()
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    processor |= {"crop_size": {"height": 32, "width": 32}, "do_resize": True, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model, folder


def test_clip_score_is_the_cosine_of_image_and_prompt(tiny_clip, picture):
    """By hand from the two projections; negative cosines count 0; a prompt of more than 77 tokens is cut."""
    from transformers import CLIPProcessor

    model, folder = tiny_clip
    score = find_measure("clip_score", "generation").load(MeasureSettings(weights={"clip": str(folder)}))
    processor = CLIPProcessor.from_pretrained(folder)
    prompts = ["a man", "a lighthouse in a storm", "two dogs", "a man " * 100]
    inputs = processor(text=prompts, images=[picture], return_tensors="pt", padding=True, truncation=True)
    assert inputs["input_ids"].shape[1] == 77
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)[0]
        texts = model.text_projection(
            model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        )
    expected = torch.cosine_similarity(image[None], texts).clamp(min=0)
    found = [score(Sample(picture, prompt=prompt)) for prompt in prompts]
    assert found == pytest.approx(expected.tolist(), abs=1e-5) and max(found) > 0


def test_clip_score_names_its_weights(tiny_clip, no_weights):
    metric = clip_score_metric(str(tiny_clip[1]), "cpu")
    assert metric.by.endswith(")") and tiny_clip[1].name in metric.by
    with pytest.raises(MetricUnavailable, match=rf"it needs the weights {CLIP_ID} \(`hf download {CLIP_ID} --excl"):
        clip_score_metric(CLIP_ID, "cpu")


# --- ArcFace


def onnx_mean(path) -> None:
    """Write an ONNX network of two nodes, the mean of each channel: (1, 3, 112, 112) -> (1, 3)."""

    def varint(number: int) -> bytes:
        return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)

    def field(number: int, value: "int | bytes | str") -> bytes:
        if isinstance(value, int):
            return varint(8 * number) + varint(value)
        data = value.encode() if isinstance(value, str) else value
        return varint(8 * number + 2) + varint(len(data)) + data

    def node(kind: str, source: str, target: str) -> bytes:
        return field(1, field(1, source) + field(2, target) + field(4, kind))

    def value(name: str, *shape: int) -> bytes:
        dimensions = b"".join(field(1, field(1, side)) for side in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dimensions)))

    graph = node("GlobalAveragePool", "pixels", "pooled") + node("Flatten", "pooled", "vector") + field(2, "mean")
    graph += field(11, value("pixels", 1, 3, 112, 112)) + field(12, value("vector", 1, 3))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))


def face_at(points: np.ndarray) -> Face:
    return Face((0.0, 0.0, 1.0, 1.0), points, 1.0)


def test_landmarks_are_moved_to_arcface_s_places():
    """A turn by 30 degrees, three times as large and shifted: the similarity found is the one that was applied."""
    turn = 3 * np.array([[np.cos(0.5236), -np.sin(0.5236)], [np.sin(0.5236), np.cos(0.5236)]])
    matrix = _to_image(_ARCFACE_POINTS @ turn.T + (7, -5))
    np.testing.assert_allclose(matrix, np.column_stack([turn, (7, -5)]), atol=1e-9)


def test_arcface_similarity_is_the_cosine_of_the_embeddings(tmp_path):
    """The stand-in's embedding is the crop's mean colour in [-1, 1]: (1, -1, -1) . (1, 1, -1) / 3 of red and yellow."""
    pytest.importorskip("onnxruntime")
    onnx_mean(tmp_path / "mean.onnx")
    face = face_at(_ARCFACE_POINTS + 10)
    red, yellow = (Image.new("RGB", (132, 132), colour) for colour in ((255, 0, 0), (255, 255, 0)))
    embed = arcface_network(str(tmp_path / "mean.onnx"))
    np.testing.assert_allclose(embed(red, face), np.array([1, -1, -1]) / np.sqrt(3), atol=1e-5)
    settings = MeasureSettings(weights={"arcface": str(tmp_path / "mean.onnx")})
    measure = find_measure("arcface", "restoration").load(settings)
    assert measure(Sample(red, yellow, face=face, reference_face=face)) == pytest.approx(1 / 3, abs=1e-5)
    assert measure(Sample(red, yellow, face=face)) is None


# --- pyiqa


def test_what_pyiqa_needs_is_looked_for_before_it_is_called(no_weights, monkeypatch):
    """Else it would retry for 47 s. All that is missing is named at once."""
    monkeypatch.setitem(sys.modules, "pyiqa", None)  # importing it would fail
    with pytest.raises(MetricUnavailable, match=r"musiq_koniq_ckpt-e95806b9.pth \(`curl .*resolve/main/musiq_koniq"):
        quality_metric("musiq", "cpu")
    with pytest.raises(MetricUnavailable, match=r"ckpt_koniq10k.pt .*model.safetensors \(`hf download timm/vit_base"):
        quality_metric("maniqa", "cpu")
    with pytest.raises(MetricUnavailable, match=r"clip/RN50.pt \(`curl .*/RN50.pt`"):
        quality_metric("clipiqa", "cpu")


@pytest.mark.slow
def test_musiq_is_pyiqa_s(no_weights, picture, monkeypatch):
    """A random MUSIQ, saved as pyiqa keeps it."""
    pytest.importorskip("pyiqa")
    from pathlib import Path

    from pyiqa.archs.musiq_arch import MUSIQ
    from torchvision.transforms.functional import to_tensor

    torch.manual_seed(0)
    network = MUSIQ(pretrained=False).eval()
    folder = Path(torch.hub.get_dir(), "pyiqa")
    folder.mkdir(parents=True)
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(folder))
    torch.save(network.state_dict(), folder / "musiq_koniq_ckpt-e95806b9.pth")
    measure = find_measure("musiq", "generation").load(MeasureSettings())
    with torch.no_grad():
        expected = network(to_tensor(picture)[None]).item()
    assert measure(Sample(picture)) == pytest.approx(expected, rel=1e-4)


# --- the listing


def test_the_command_lists_every_measure(no_weights, tmp_path, capsys):
    assert main(["eval-metrics", "--weights", f"hps={tmp_path / 'missing.pt'}"]) == 0
    text = capsys.readouterr().out
    table, _, missing = text.partition("How to get the others:")
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()[2:] if line}
    assert rows.keys() == {measure.key for measure in MEASURES}
    assert " | yes | " in rows["psnr"] and "| restoration | reference | higher, dB |" in rows["psnr"]
    assert " | no | " in rows["musiq"] and "PolyForm Noncommercial" in rows["musiq"]
    assert "| both | face | " in rows["face_score"] and "| generation | prompt | " in rows["clip_score"]
    for text in ("- clip_score: it needs the weights openai/", "- fid, kid: ", "missing.pt"):
        assert text in missing
    assert (
        "THUDM/ImageReward`" in missing and "the tokenizer bert-base-uncased (`hf download bert" in missing
    )  # at once
    assert "- face_score: it needs the weights OPPOer/FaceScore (`hf download OPPOer/FaceScore`" in missing
    assert main(["eval-metrics", "--weights", "fid=x"]) == 2
