"""Official names, sizes and files; every shape of the published checkpoint, on the meta device."""

import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch

from faceprior.convert import (
    describe_mismatch,
    face_score_config,
    find_checkpoint_folder,
    find_official_checkpoint,
    load_official_state_dict,
    official_face_score_to_ours,
    ours_to_official,
    read_med_config,
    read_official_checkpoint,
    require_same_tensors,
)
from faceprior.scorer import FaceScorer

DATA = Path(__file__).parent / "data"
MED_CONFIG = {  # of the published models; `encoder_width` is overruled by the weights
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 30524,
    "encoder_width": 768,
}
DROPPED = (
    "blip.text_encoder.embeddings.position_ids",
    "blip.text_proj.bias",
    "blip.text_proj.weight",
    "blip.vision_proj.bias",
    "blip.vision_proj.weight",
)


@pytest.fixture(scope="module")
def official():
    """The published state dict (625 names and shapes) without its values."""
    rows = [line.split("\t") for line in (DATA / "facescore_official_keys.tsv").read_text().splitlines()]
    shapes = {name: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for name, shape, _ in rows}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return FaceScorer()


def test_the_full_model_has_the_official_tensors(official, full_size):
    """625 official tensors are the 620 of ours and the five that the reward does not use."""
    ours = official_face_score_to_ours(official)
    assert (len(official), len(ours)) == (625, 620)
    require_same_tensors(full_size.state_dict(), ours)
    assert sorted(set(official) - set(ours_to_official(ours))) == sorted(DROPPED)


def test_the_sizes_are_read_from_the_shapes(official, full_size):
    config = face_score_config(official_face_score_to_ours(official), MED_CONFIG)
    assert config == {name: full_size.config[name] for name in config}


def test_renaming_there_and_back_shares_the_tensors(official):
    kept = {name: tensor for name, tensor in official.items() if name not in DROPPED}
    back = ours_to_official(official_face_score_to_ours(official))
    assert list(back) == list(kept)
    assert all(back[name] is kept[name] for name in kept)


def test_the_module_prefix_is_stripped(official):
    prefixed = {f"module.{name}": tensor for name, tensor in official.items()}
    assert list(official_face_score_to_ours(prefixed)) == list(official_face_score_to_ours(official))


def test_freezing_matches_the_official_list(official, full_size):
    """The official border is int(24 x 0.7) = 16 vision and int(12 x 0.7) = 8 text layers.

    Its loop stops after the first name with `blocks.16` or `layer.8` in it, so these two names are frozen as
    well, and the four projections, which ours drops: 414 = 408 + 2 + 4.
    """
    assert (int(24 * 0.7), int(12 * 0.7)) == (16, 8)
    frozen = set(json.loads((DATA / "facescore_frozen_names.json").read_text())["frozen"])
    ours = set(ours_to_official({name: None for name in full_size.freeze(0.7)}))
    border = [
        next(name for name in official if f"blocks.{int(24 * 0.7)}." in name),
        next(name for name in official if f"layer.{int(12 * 0.7)}." in name),
    ]
    assert ours < frozen
    assert frozen - ours == {*border, *(name for name in DROPPED if "_proj" in name)}
    assert (len(frozen), len(ours)) == (414, 408)
    trained = sum(p.numel() for p in full_size.parameters() if p.requires_grad)
    in_border = sum(math.prod(official[name].shape) for name in border)
    assert round((trained - in_border) / 1e6, 2) == 140.49  # what the official recipe trains
    full_size.freeze(0)


def test_a_checkpoint_of_another_model_is_named():
    unet = {f"down_blocks.{n}.weight": torch.zeros(1) for n in range(20)}
    with pytest.raises(ValueError, match=r"unet\.pt is not(.|\n)*missing \(7\)(.|\n)*unexpected \(20\)") as error:
        official_face_score_to_ours(unet, "unet.pt")
    assert str(error.value).endswith("unexpected (20): down_blocks.{0-19}.weight")
    with pytest.raises(ValueError, match="mlp_head"):
        ours_to_official({"mlp_head.weight": torch.zeros(1)})


def test_every_name_of_a_face_scorer_is_in_the_message(full_size):
    """All 620 tensors missing: folded by layer, the message unfolds to every one of them."""
    names = list(full_size.state_dict())
    named = set()
    for text in describe_mismatch("x.pt", names).partition("missing (620): ")[2].split(", "):
        layers = re.search(r"\{(.*)\}", text)
        runs = [run.split("-") for run in layers[1].split(",")] if layers else [["0"]]
        numbers = [n for run in runs for n in range(int(run[0]), int(run[-1]) + 1)]
        named |= {re.sub(r"\{.*\}", str(number), text) for number in numbers}
    assert named == set(names)
    assert describe_mismatch("x.pt", [f"a.{n}" for n in range(66)]).endswith("a.63 and 2 more")
    assert describe_mismatch("x.pt", [f"a.{n}.b" for n in (5, 0, 2, 3, 4)]).endswith("(5): a.{0,2-5}.b")


def test_the_difference_of_two_state_dicts_is_named():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    require_same_tensors(expected, {"b": torch.ones(3), "a": torch.ones(2)})
    with pytest.raises(ValueError) as error:
        require_same_tensors(expected, {"a": torch.zeros(2, 1), "c": torch.zeros(1)}, "x.pt")
    message = str(error.value)
    assert message == describe_mismatch("x.pt", ["b"], ["c"], ["a is (2, 1) instead of (2,)"])
    assert all(part in message for part in ("missing (1): b", "unexpected (1): c", "misshapen (1): a is (2, 1)"))


@pytest.mark.parametrize(
    ("med_config", "rule"),
    [({"hidden_act": "gelu"}, "num_attention_heads"), ({**MED_CONFIG, "hidden_act": "relu"}, "relu")],
)
def test_a_med_config_of_another_model(official, med_config, rule):
    with pytest.raises(ValueError, match=rule):
        face_score_config(official_face_score_to_ours(official), med_config)


def test_a_state_dict_without_the_tensors_that_show_the_sizes(official):
    ours = official_face_score_to_ours(official)
    name = "text_model.embeddings.word_embeddings.weight"
    with pytest.raises(ValueError, match=rf"missing \(1\): {name}"):
        face_score_config({key: value for key, value in ours.items() if key != name}, MED_CONFIG)
    with pytest.raises(ValueError, match=rf"{name} has 1 dimensions instead of 2"):
        face_score_config({**ours, name: torch.zeros(3)}, MED_CONFIG)


@pytest.mark.parametrize(
    ("weights", "mean", "std"),
    [("FS_model.pt", 0, 1), ("FaceScore_model/FS_model.pt", 0, 1), ("ImageReward.pt", 0.1672, 1.0333)],
)
def test_finding_the_official_files(tmp_path, weights, mean, std):
    assert find_official_checkpoint(tmp_path) is None
    path = tmp_path / weights
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(FileNotFoundError, match=r"med_config\.json beside"):
        find_official_checkpoint(tmp_path)
    path.with_name("med_config.json").write_text("{}")
    found = find_official_checkpoint(tmp_path)
    assert (found.weights, found.reward_mean, found.reward_std) == (path, mean, std)


def test_a_scorers_folder_is_ours_or_a_released_one(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no scorer in .*no config\.json or FS_model\.pt.*`tiny` is the small one"
    ):
        find_checkpoint_folder(tmp_path)
    for number, name in enumerate(("config.json", "FaceScore_model/FS_model.pt", "ImageReward.pt")):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        path.touch()
        assert find_checkpoint_folder(tmp_path / str(number)) == tmp_path / str(number)
        assert find_checkpoint_folder(str(tmp_path), subfolder=str(number)) == tmp_path / str(number)


def test_a_scorer_that_is_neither_a_folder_nor_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no scorer 'nobody/nothing'.*`tiny` is the small one"):
        find_checkpoint_folder("nobody/nothing", cache_dir=tmp_path / "cache", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="no scorer at .*missing.*02_train_scorer.py"):
        find_checkpoint_folder(tmp_path / "missing")


def test_a_tensor_file_is_loaded(tmp_path):
    path = tmp_path / "FS_model.pt"
    torch.save({"a": torch.arange(3)}, path)
    assert torch.equal(load_official_state_dict(path)["a"], torch.arange(3))


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("part", [0, 0.3, 0.9])
def test_a_truncated_file(tmp_path, part, old_format):
    path = tmp_path / "FS_model.pt"
    torch.save({"a": torch.randn(50, 50)}, path, _use_new_zipfile_serialization=not old_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=r"FS_model\.pt.*(truncated|damaged)"):
        load_official_state_dict(path)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_with_code_in_it_is_refused(tmp_path, save):
    target = tmp_path / "was_here"
    save({"a": Malicious(target)}, tmp_path / "FS_model.pt")
    with pytest.raises(ValueError, match=r"FS_model\.pt is refused.*it asks for "):
        load_official_state_dict(tmp_path / "FS_model.pt")
    assert not target.exists()


@pytest.mark.parametrize(("value", "rule"), [([torch.zeros(1)], "not list"), ({"model": {}, "step": 3}, "model, step")])
def test_a_file_of_something_else_than_tensors(tmp_path, value, rule):
    torch.save(value, tmp_path / "FS_model.pt")
    with pytest.raises(ValueError, match=f"names to tensors.*{rule}"):
        load_official_state_dict(tmp_path / "FS_model.pt")


def test_missing_files_and_broken_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_official_state_dict(tmp_path / "FS_model.pt")
    path = tmp_path / "med_config.json"
    for text, rule in (("{", "not valid JSON"), ("[1]", "holds a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rule):
            read_med_config(path)


def test_reading_a_released_checkpoint(tmp_path):
    """Sizes of a small one, with the padding of the official layout around it."""
    small = FaceScorer(
        vision_hidden_size=64,
        vision_layers=2,
        vision_heads=1,
        vision_intermediate=96,
        image_size=24,
        patch_size=8,
        text_hidden_size=32,
        text_layers=3,
        text_heads=4,
        text_intermediate=48,
        vocab_size=10,
        max_positions=7,
        prompt_token_ids=(1, 2),
    )
    torch.save(ours_to_official(small.state_dict()), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps({"num_attention_heads": 4}))
    state_dict, config = read_official_checkpoint(find_official_checkpoint(tmp_path))
    require_same_tensors(small.state_dict(), state_dict)
    assert (config.pop("reward_mean"), config.pop("reward_std")) == (0.1672, 1.0333)
    assert config == {name: small.config[name] for name in config}
