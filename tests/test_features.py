"""FeatureNetwork: its outputs, distances and files; and what the tiny one is trained on."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from checkpoints.tiny_models import data as tiny_data
from checkpoints.tiny_models import features as tiny_features
from faceprior.features import LANDMARK_OUTPUTS, FeatureNetwork, Tag, tiny_fid_extractor
from faceprior.metrics import fid
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.training import seeded

TAGS = {"sex": ("woman", "man"), "glasses": ("none", "round", "aviator")}
SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "layers": 3, "heads": 2}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


def make_network(seed=0, **options):
    with seeded(seed):
        return FeatureNetwork.from_tags(TAGS, **{**SMALL, **options}).eval()


def images(count=2, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def set_head(network, outputs):
    """Let the head give `outputs` for every image."""
    with torch.no_grad():
        network.model.classifier.weight.zero_()
        network.model.classifier.bias.copy_(torch.tensor(outputs, dtype=torch.float32))


# --- what the outputs mean ---


def test_outputs_by_their_names():
    """sex=woman, sex=man, glasses=none, =round, =aviator, then landmark_0_x .. landmark_4_y."""
    network = make_network()
    outputs = torch.arange(15.0)[None]
    logits = network.tag_logits(outputs)
    assert {name: values[0].tolist() for name, values in logits.items()} == {"sex": [0, 1], "glasses": [2, 3, 4]}
    assert network.landmark_fractions(outputs)[0].tolist() == [[5, 6], [7, 8], [9, 10], [11, 12], [13, 14]]


def test_outputs_in_another_order():
    """Names decide, not places: here the landmarks come first and the tags are mixed."""
    labels = [*LANDMARK_OUTPUTS, "glasses=round", "sex=man", "glasses=none"]
    config = ViTConfig(**CONFIG, id2label=dict(enumerate(labels)), label2id={v: i for i, v in enumerate(labels)})
    network = FeatureNetwork(ViTForImageClassification(config))
    assert network.groups == {"glasses": {"round": 10, "none": 12}, "sex": {"man": 11}}
    assert network.landmark_outputs == list(range(10))


CONFIG = {
    "image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


def test_tags_are_one_softmax_each():
    """sex: logits 0 and ln 3 give 3/4 for man; glasses: ln 2, 0, 0 give 1/2 for none."""
    network = make_network()
    set_head(network, [0, math.log(3), math.log(2), 0, 0] + [0] * 10)
    predicted = network.tags(np.zeros((40, 30, 3), np.uint8))
    assert predicted == {"sex": Tag("man", pytest.approx(0.75)), "glasses": Tag("none", pytest.approx(0.5))}


def test_landmarks_are_pixels_of_the_image():
    """A fraction of .25 of an image of 40 x 80 pixels is x = 10, or y = 20."""
    network = make_network()
    set_head(network, [0] * 5 + [0.25] * 10)
    assert network.landmarks(Image.new("RGB", (40, 80))) == pytest.approx(np.array([[10, 20]] * 5))


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (20, 70)])
def test_images_of_any_size(size):
    network, pixels = make_network(), torch.rand(2, 3, *size) * 2 - 1
    assert network(pixels).shape == (2, 15)
    assert network.features(pixels).shape == (2, 16)
    assert [layer.shape for layer in network.patch_features(pixels)] == [(2, 16, 4, 4)] * 3
    with pytest.raises(ValueError, match=r"`pixel_values` has to be \(B, 3, H, W\) but is \(1, 20, 20\)"):
        network.features(torch.zeros(1, 20, 20))


def test_features_are_what_the_head_reads():
    network, pixels = make_network(), images()
    torch.testing.assert_close(network.model.classifier(network.features(pixels)), network(pixels))


def test_patch_features_lie_where_the_picture_is():
    """Before attention mixes the patches, a change in one patch changes that place of the grid alone."""
    network, pixels = make_network(layers=1), images(1)
    with torch.no_grad():
        network.model.vit.layers[0].attention.o_proj.weight.zero_()
    changed = pixels.clone()
    changed[:, :, 8:16, 24:32] = 0.5
    moved = (network.patch_features(changed)[0] - network.patch_features(pixels)[0]).abs().sum(dim=1)[0]
    assert moved[1, 3] > 0.01
    moved[1, 3] = 0
    assert moved.max() < 1e-5


def test_pixels_are_normalised_by_mean_and_deviation():
    """Black (0 of 1) with mean .4 and deviation .3 is (0 - .4) / .3 = -4/3."""
    seen = []
    model = ViTModel(ViTConfig(**CONFIG), add_pooling_layer=False)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    FeatureNetwork(model, (0.4,) * 3, (0.3,) * 3).features(-torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.full((1, 3, 32, 32), -4 / 3))


# --- distances ---


def test_distance_by_hand():
    """|x / |x| - y / |y||^2 = 2 - 2 cos(x, y), averaged over the patches and the layers."""
    network, a, b = make_network(), images(), images(seed=1)
    layers = zip(network.patch_features(a), network.patch_features(b), strict=True)
    expected = torch.stack([2 - 2 * F.cosine_similarity(x, y, dim=1).mean(dim=(1, 2)) for x, y in layers]).mean(dim=0)
    torch.testing.assert_close(network.perceptual_distance(a, b), expected)
    torch.testing.assert_close(network.perceptual_distance(b, a), expected)
    assert network.perceptual_distance(a, a).tolist() == [0, 0]


def test_distance_under_a_mask():
    """A mask over one patch of 8 px gives that patch's distance; a half covered patch counts half."""
    network, a, b = make_network(), images(1), images(1, seed=1)
    layers = zip(network.patch_features(a), network.patch_features(b), strict=True)
    grid = torch.stack([2 - 2 * F.cosine_similarity(x, y, dim=1)[0] for x, y in layers]).mean(dim=0)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:16, 16:24] = 1
    assert network.perceptual_distance(a, b, mask).item() == pytest.approx(grid[1, 2].item(), rel=1e-4)
    mask[..., 8:16, 24:28] = 1
    expected = (grid[1, 2] + 0.5 * grid[1, 3]) / 1.5
    assert network.perceptual_distance(a, b, mask).item() == pytest.approx(expected.item(), rel=1e-4)
    full = network.perceptual_distance(a, b, torch.ones(1, 1, 64, 64))
    torch.testing.assert_close(full, network.perceptual_distance(a, b))


def test_distance_refuses_what_cannot_be_compared():
    network = make_network()
    with pytest.raises(ValueError, match="same number of images but have 2 and 1"):
        network.perceptual_distance(images(2), images(1))
    with pytest.raises(ValueError, match="`mask` is empty"):
        network.perceptual_distance(images(1), images(1), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"`mask` has to be \(1, 1, H, W\) but is \(1, 3, 8, 8\)"):
        network.perceptual_distance(images(1), images(1), torch.ones(1, 3, 8, 8))


def test_gradients_reach_the_pixels():
    """A step against the gradient brings an image nearer; a second size, so that the resizing takes part."""
    network, a = make_network(), images(1, 48)
    b = images(1, 48, seed=1).requires_grad_()
    distance = network.perceptual_distance(a, b).sum()
    distance.backward()
    nearer = b - 1e-2 * b.grad / b.grad.norm()
    assert network.perceptual_distance(a, nearer).item() < distance.item()


def test_tiny_fid(tmp_path):
    """The extractor sees 0..255 as [-1, 1]; a folder is at 0 from itself and further from a darker one."""
    network = make_network()
    pixels = images(2)
    torch.testing.assert_close(tiny_fid_extractor(network)((pixels + 1) * 127.5), network.features(pixels))
    folders = [tmp_path / name for name in "ab"]
    for folder, factor in zip(folders, (1.0, 0.5), strict=True):
        folder.mkdir()
        for seed in range(4):
            values = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)) * factor
            Image.fromarray(values.astype(np.uint8)).save(folder / f"{seed}.png")
    extractor = tiny_fid_extractor(network)
    assert fid(folders[0], folders[0], extractor) == pytest.approx(0, abs=1e-4)
    assert fid(*folders, extractor) > 0.01


# --- files ---


def test_a_saved_network_is_a_stock_folder(tmp_path):
    """float16 on the disk, float32 in memory; transformers' own class gives the same outputs."""
    network, pixels = make_network(), images()
    network.save_pretrained(tmp_path)
    assert next(network.parameters()).dtype == torch.float32
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 2 * sum(p.numel() for p in network.parameters()) + 10_000
    loaded = FeatureNetwork.from_pretrained(tmp_path)
    assert next(loaded.parameters()).dtype == torch.float32 and not loaded.training
    assert loaded.groups == network.groups and loaded.landmark_outputs == network.landmark_outputs
    torch.testing.assert_close(loaded(pixels), network(pixels), atol=2e-3, rtol=1e-2)
    stock = ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(stock(pixels).logits, loaded(pixels))
    assert stock.config.id2label[1] == "sex=man" and stock.config.label2id["landmark_4_y"] == 14
    assert (
        stock.config.dtype == torch.float32 and json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    )


def test_a_bare_vit_has_features_only(tmp_path):
    """As DINO is published: ViTModel, with the pixels' mean and deviation beside it."""
    model = ViTModel(ViTConfig(**CONFIG), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": 32})
    )
    network, pixels = FeatureNetwork.from_pretrained(tmp_path), images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = model((pixels / 2 + 0.5 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(network.features(pixels), expected)
    assert network.groups == {}
    with pytest.raises(ValueError, match="no head"):
        network(pixels)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="make_tiny --only features"):
        FeatureNetwork.from_pretrained(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no feature network at checkpoints/nothing: the path does not exist"):
        FeatureNetwork.from_pretrained("checkpoints/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="`model_type` has to be vit but is 'clip'"):
        FeatureNetwork.from_pretrained(tmp_path)
    make_network().save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="torn cannot be loaded"):
        FeatureNetwork.from_pretrained(tmp_path / "torn")


def test_weights_that_lack_a_layer(tmp_path):
    network = make_network()
    weights = {key: value for key, value in network.model.state_dict().items() if "layers.1" not in key}
    network.model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="its weights lack .*layers.1"):
        FeatureNetwork.from_pretrained(tmp_path)


# --- the training of the tiny network ---


@pytest.fixture(scope="module")
def sample():
    """A portrait that is lit from the left and looks to one side."""
    drawing = draw_portrait(3, 128, yaw=15, light_side="left", hair_style="short")
    return {"image": drawing.image, "landmarks": drawing.landmarks, "tags": drawing.tags}


def test_the_tags_are_all_that_a_drawing_can_have():
    for seed in range(30):
        from faceprior.procedural.people import sample_person

        person = sample_person(seed)
        assert all(getattr(person, name) in values for name, values in tiny_features.TAGS.items())


def test_a_flip_mirrors_landmarks_and_light(sample):
    """The left eye of the mirror image is the right one at W - x, and twice is nothing."""
    mirrored = tiny_features.flip(sample)
    assert mirrored["tags"]["light_side"] == "right" and sample["tags"]["light_side"] == "left"
    assert mirrored["landmarks"][0].tolist() == pytest.approx(
        [128 - sample["landmarks"][1, 0], sample["landmarks"][1, 1]]
    )
    assert mirrored["landmarks"][3, 0] < mirrored["landmarks"][4, 0]
    twice = tiny_features.flip(mirrored)
    assert (twice["image"] == sample["image"]).all() and twice["tags"] == sample["tags"]
    assert twice["landmarks"] == pytest.approx(sample["landmarks"])


@pytest.mark.parametrize(("zoom", "shift"), [(1.0, (0.05, -0.03)), (1.5, (0.0, 0.0)), (0.95, (0.02, 0.02))])
def test_landmarks_move_with_the_image(zoom, shift):
    """Five bright spots on black: their centres of mass (in pixels from the corner) are where the landmarks go."""
    landmarks = np.array([[50, 50], [78, 52], [64, 66], [54, 80], [74, 82]], np.float32)
    image = np.zeros((128, 128, 3), np.uint8)
    for x, y in landmarks.astype(int):
        image[y - 2 : y + 2, x - 2 : x + 2] = 255  # around the corner (x, y) of four pixels
    moved = tiny_features.move({"image": image, "landmarks": landmarks, "tags": {}}, zoom, np.array(shift))
    for x, y in moved["landmarks"]:
        column, row = int(x) - 5, int(y) - 5
        patch = moved["image"][row : row + 11, column : column + 11, 0].astype(float)
        rows, columns = np.mgrid[row : row + 11, column : column + 11] + 0.5
        centre = (patch * columns).sum() / patch.sum(), (patch * rows).sum() / patch.sum()
        assert centre == pytest.approx((x, y), abs=0.15)


def test_augmentation_depends_on_its_generator_only(sample):
    one, again, other = (tiny_features.augment(sample, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    for seed in range(40):
        made = tiny_features.augment(sample, np.random.default_rng(seed))
        assert made["landmarks"].min() > 0.1 and made["landmarks"].max() < 0.9
        assert made["pixel_values"].abs().max() <= 1


@pytest.mark.parametrize(
    ("style", "seen"), [("bob", True), ("bald", False), ("knit cap", False), ("head scarf", False)]
)
def test_the_colour_of_hidden_hair_is_no_target(sample, style, seen):
    tensors = tiny_features.to_tensors({**sample, "tags": {**sample["tags"], "hair_style": style}})
    targets = dict(zip(tiny_features.PREDICTED, tensors["targets"].tolist(), strict=True))
    assert (targets["hair_color"] != tiny_features.IGNORED) is seen
    assert tiny_features.TAGS["hair_style"][targets["hair_style"]] == style


def test_loss_by_hand():
    """Equal logits cost ln(number of values); a batch without visible hair leaves that tag out; landmarks at .02 of
    the truth cost |d| - beta / 2 = .015."""
    network = FeatureNetwork.from_tags(tiny_features.TAGS, **SMALL)
    targets = torch.zeros(2, len(tiny_features.PREDICTED), dtype=torch.int64)
    outputs = torch.zeros(2, network.model.config.num_labels)
    outputs[:, network.landmark_outputs] = 0.52
    batch = {"targets": targets, "landmarks": torch.full((2, 5, 2), 0.5)}
    costs = {name: math.log(len(values)) for name, values in tiny_features.TAGS.items()}
    tags, landmarks = tiny_features.features_loss(network, outputs, batch)
    assert tags.item() == pytest.approx(np.mean(list(costs.values())))
    assert landmarks.item() == pytest.approx(0.015, rel=1e-3)
    targets[:, tiny_features.PREDICTED.index("hair_color")] = tiny_features.IGNORED
    del costs["hair_color"]
    assert tiny_features.features_loss(network, outputs, batch)[0].item() == pytest.approx(
        np.mean(list(costs.values()))
    )


def test_landmark_maps_by_hand():
    """A landmark at (.6, .3) of a 4 x 4 grid lies in column 2 and row 1: patch 6."""
    maps = tiny_features.LandmarkMaps(16)
    with torch.no_grad():
        maps.linear.weight.copy_(torch.eye(5, 16))
        maps.linear.bias.zero_()
    tokens = torch.zeros(1, 17, 16)
    tokens[:, 1 + 6, :5] = math.log(15)  # against 15 patches of weight 1: half of the softmax
    assert maps.loss(tokens, torch.tensor([[[0.6, 0.3]] * 5])).item() == pytest.approx(math.log(2))


def test_training_from_drawings_to_a_folder(tmp_path, monkeypatch):
    """A few steps on a handful of drawings, with a scene among them; the same call again does nothing."""
    for split in ("train", "validation"):
        drawings = [tiny_data.draw_one(64, split, index) for index in range(3)]  # number 0 of train is a scene
        tiny_data.save_arrays(
            tmp_path / "work" / split / "000000.npz",
            images=np.stack([drawing.image for drawing in drawings]),
            captions=np.array([drawing.caption() for drawing in drawings]),
            records=np.array([json.dumps(tiny_data.describe(drawing)) for drawing in drawings]),
        )
    portraits = tiny_features.Portraits(tiny_data.Drawings(tmp_path / "work", "train"))
    assert len(portraits) == 2
    one, other = (tiny_features.to_tensors(portraits[i])["landmarks"] for i in range(2))
    torch.testing.assert_close(tiny_features.mean_landmarks(portraits), (one + other) / 2)
    monkeypatch.setattr(tiny_features.tiny, "tiny_folder", lambda: tmp_path / "tiny")
    monkeypatch.setattr(tiny_features, "BATCH", 2)
    config = SimpleNamespace(feature_steps=2, feature_learning_rate=1e-3, mixed_precision="no", device="cpu")
    tiny_features.train_features(config, tmp_path / "work")
    info = json.loads((tmp_path / "tiny/features/tiny.json").read_text())
    assert info == {"kind": "features", "seed": 0, "trained": True, "steps": 2}
    report = json.loads((tmp_path / "work/features/done.json").read_text())
    assert {*tiny_features.PREDICTED, "landmark_error"} <= report.keys()
    network = FeatureNetwork.from_pretrained(tmp_path / "tiny/features")
    assert network.tags(draw_portrait(1, 64).image).keys() == tiny_features.TAGS.keys()
    stamp = (tmp_path / "tiny/features/model.safetensors").stat().st_mtime_ns
    tiny_features.train_features(config, tmp_path / "work")
    assert (tmp_path / "tiny/features/model.safetensors").stat().st_mtime_ns == stamp


def test_measure_by_hand(sample):
    """A head that always predicts the same: correct where the image has that value, all landmarks in the middle."""
    network = FeatureNetwork.from_tags(tiny_features.TAGS, **SMALL).eval()
    outputs = [0.0] * network.model.config.num_labels
    outputs[network.groups["light_side"]["left"]] = 1.0
    outputs[network.groups["sex"]["man" if sample["tags"]["sex"] == "woman" else "woman"]] = 1.0
    for number in network.landmark_outputs:
        outputs[number] = 0.5
    set_head(network, outputs)
    report = tiny_features.measure(network, [sample])
    assert report["light_side"] == 1 and report["sex"] == 0
    marks = sample["landmarks"]
    expected = np.hypot(*(marks - 64).T).mean() / np.hypot(*(marks[1] - marks[0]))
    assert report["landmark_error"] == pytest.approx(expected, rel=1e-4)
