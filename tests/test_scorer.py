"""FaceScorer: its arithmetic, its files, its pixels, and what people call."""

import itertools
import json
import math
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torchvision import transforms

from faceprior.blip import CLIP_MEAN, CLIP_STD, normalise, preprocess, tokenize_prompt
from faceprior.convert import ours_to_official
from faceprior.detect import Face, crop_bounds, resolve_detector
from faceprior.images import ImageError, to_pixel_values
from faceprior.scorer import REFERENCE_FILE, FaceScore, FaceScorer, ScoreReference, ScoreSettings, iter_faces

SIZES = {
    "vision_hidden_size": 128,  # two heads of 64, as width // 64 says
    "vision_layers": 3,
    "vision_heads": 2,
    "vision_intermediate": 160,
    "image_size": 32,
    "patch_size": 8,
    "text_hidden_size": 48,
    "text_layers": 4,
    "text_heads": 4,
    "text_intermediate": 96,
    "vocab_size": 2304,
    "max_positions": 40,
}


def make_scorer(seed=0, **sizes):
    """A small scorer whose weights are large enough for rewards that differ."""
    scorer = FaceScorer(**{**SIZES, **sizes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.2 / math.sqrt(parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return scorer


@pytest.fixture(scope="module")
def scorer():
    return make_scorer()


@pytest.fixture
def pixel_values():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make_image(seed=0, size=(90, 70)):
    """Noise on a gradient: (width, height) pixels."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, size[0])[None, :, None]
    return Image.fromarray((ramp + rng.integers(0, 56, (size[1], size[0], 3))).astype(np.uint8))


def norm(x, weights, name, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(query, key, value, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def official_reward(scorer, pixels, text_heads):
    """The official model's arithmetic under its own names: a pre-norm ViT and a post-norm BERT, by hand."""
    w, sizes, ids = ours_to_official(scorer.state_dict()), scorer.config, list(scorer.config.prompt_token_ids)
    b, text = "blip.visual_encoder", "blip.text_encoder"
    proj = w[f"{b}.patch_embed.proj.weight"]
    patches = F.conv2d(pixels, proj, w[f"{b}.patch_embed.proj.bias"], stride=sizes.patch_size)
    x = torch.cat([w[f"{b}.cls_token"].expand(len(pixels), 1, -1), patches.flatten(2).mT], 1)
    x = x + w[f"{b}.pos_embed"]
    for n in range(sizes.vision_layers):
        block = f"{b}.blocks.{n}"
        q, k, v = linear(norm(x, w, f"{block}.norm1", 1e-6), w, f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, v, sizes.vision_hidden_size // 64), w, f"{block}.attn.proj")
        hidden = gelu(linear(norm(x, w, f"{block}.norm2", 1e-6), w, f"{block}.mlp.fc1"))
        x = x + linear(hidden, w, f"{block}.mlp.fc2")
    image = norm(x, w, f"{b}.norm", 1e-6)
    words = w[f"{text}.embeddings.word_embeddings.weight"][ids]
    words = words + w[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(words, w, f"{text}.embeddings.LayerNorm", 1e-12).expand(len(pixels), -1, -1)
    for n in range(sizes.text_layers):
        layer = f"{text}.encoder.layer.{n}"
        for kind in ("attention", "crossattention"):
            seen = x if kind == "attention" else image
            q, k, v = (
                linear(y, w, f"{layer}.{kind}.self.{part}")
                for y, part in ((x, "query"), (seen, "key"), (seen, "value"))
            )
            x = x + linear(attention(q, k, v, text_heads), w, f"{layer}.{kind}.output.dense")
            x = norm(x, w, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        hidden = linear(gelu(linear(x, w, f"{layer}.intermediate.dense")), w, f"{layer}.output.dense")
        x = norm(x + hidden, w, f"{layer}.output.LayerNorm", 1e-12)
    reward = x[:, 0]
    for n in (0, 2, 4, 6, 7):
        reward = linear(reward, w, f"mlp.layers.{n}")
    return reward[:, 0]


def test_the_reward_by_hand(pixel_values):
    """Agreement with the official arithmetic in double precision, to 1e-9 of the spread of rewards."""
    scorer = make_scorer().double()
    assert scorer.config.prompt_token_ids == (101, 1037, 2227, 1012, 102)
    expected = official_reward(scorer, pixel_values.double(), text_heads=4)
    assert expected.std() > 0.01  # the images do matter
    torch.testing.assert_close(scorer(pixel_values.double()), expected, rtol=1e-9, atol=1e-9)
    wrong_heads = official_reward(scorer, pixel_values.double(), text_heads=8)
    assert (wrong_heads - expected).abs().max() > 1e-3  # the by-hand version tells a trap from the truth


def test_padding_does_not_change_the_reward(scorer, pixel_values):
    """35 ids with a mask of five ones, as in the official code, equal the five ids alone."""
    ids = torch.zeros(1, 35, dtype=torch.int64)
    ids[0, :5] = torch.tensor(scorer.config.prompt_token_ids)
    mask = (torch.arange(35) < 5).long()[None]
    expected = scorer(pixel_values)
    torch.testing.assert_close(scorer(pixel_values, ids, mask), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scorer(pixel_values, ids[0, :5]), expected)
    torch.testing.assert_close(scorer(pixel_values, ids[:, :5].expand(3, -1)), expected)
    assert (scorer(pixel_values, ids) - expected).abs().max() > 1e-3


def test_reward_mean_and_std(pixel_values):
    plain, normalised = make_scorer(), make_scorer(reward_mean=0.1672, reward_std=1.0333)
    torch.testing.assert_close(normalised(pixel_values), (plain(pixel_values) - 0.1672) / 1.0333)


def test_the_gradient_reaches_the_pixels():
    """Against a central difference along the gradient, in double precision."""
    scorer = make_scorer().double()
    image = torch.rand(1, 3, 40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = (image - 0.5).float().requires_grad_()  # `preprocess` works in float32
    reward = scorer(scorer.preprocess(image, boxes=[(5, 5, 40, 36)]).double())
    (gradient,) = torch.autograd.grad(reward.sum(), image)
    assert gradient[..., 5:36, 10:35].abs().min() > 0
    assert gradient[..., :4].abs().max() == 0  # outside of the box
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (
            scorer(scorer.preprocess(x, boxes=[(5, 5, 40, 36)]).double()) for x in (image + step, image - step)
        )
    assert ((ahead - behind) / 2e-3).item() == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_dropout_in_training_only(pixel_values):
    scorer = make_scorer()
    torch.manual_seed(0)
    torch.testing.assert_close(scorer(pixel_values), scorer(pixel_values), rtol=0, atol=0)
    scorer.train()
    assert not torch.equal(scorer(pixel_values), scorer(pixel_values))


@pytest.mark.parametrize("shape", [(3, 3, 24, 32), (3, 32, 32), (3, 1, 32, 32)])
def test_pixels_of_another_shape(scorer, shape):
    """A smaller image would be scored with the first positions of the table."""
    with pytest.raises(ValueError, match=r"has to be \(B, 3, 32, 32\)"):
        scorer(torch.zeros(shape))


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ({"patch_size": 7}, "multiple of `patch_size`"),
        ({"vocab_size": 2000}, "below 2000"),
        ({"max_positions": 4}, "at most 4"),
        ({"prompt_token_ids": ()}, "one at least"),
        ({"reward_std": 0.0}, "positive"),
        ({"vision_heads": 3}, "divisible"),
    ],
)
def test_sizes_that_do_not_fit(sizes, rule):
    with pytest.raises(ValueError, match=rule):
        FaceScorer(**{**SIZES, **sizes})


def test_freezing_whole_layers(pixel_values):
    """Of 3 vision and 4 text layers, int(3 x 0.7) = 2 and int(4 x 0.7) = 2 are frozen."""
    scorer = make_scorer()
    full = make_scorer()
    frozen = scorer.freeze(0.7)
    prefixes = ("embeddings.", "encoder.layers.0.", "encoder.layers.1.")
    expected = tuple(f"vision_model.{prefix}" for prefix in prefixes)
    expected += tuple(f"text_model.{prefix}" for prefix in ("embeddings.", "encoder.layer.0.", "encoder.layer.1."))
    assert frozen == [name for name, _ in scorer.named_parameters() if name.startswith(expected)]
    assert scorer.frozen_vision_parts == 3
    for model in (scorer, full):
        model(pixel_values).sum().backward()
    for (name, ours), whole in zip(scorer.named_parameters(), full.parameters(), strict=True):
        assert (ours.grad is None) == (name in frozen)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, whole.grad)
    assert scorer.freeze(1.0)[-1].startswith("text_model.encoder.layer.3.")
    assert scorer.frozen_vision_parts == 4
    assert scorer.freeze(0) == [] and scorer.frozen_vision_parts == 0
    with pytest.raises(ValueError, match=r"`fraction` has to lie in \[0, 1\] but is 70"):
        scorer.freeze(70)


def test_pixels_get_their_gradient_through_frozen_layers(pixel_values):
    scorer, pixels = make_scorer(), pixel_values.clone().requires_grad_()
    (expected,) = torch.autograd.grad(scorer(pixels).sum(), pixels)
    scorer.freeze(1.0)
    (gradient,) = torch.autograd.grad(scorer(pixels).sum(), pixels)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("fraction", "parts"), [(0, 0), (0.4, 2), (0.7, 3), (1.0, 4)])
def test_frozen_leading_parts_run_without_gradients(pixel_values, fraction, parts):
    """Rewards and gradients equal those with a graph through every part, which pixels with gradients ask for."""
    scorer, seen, results = make_scorer(), [], []
    scorer.freeze(fraction)
    assert scorer.frozen_vision_parts == parts
    for part in scorer.vision_parts:
        part.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    for pixels in (pixel_values, pixel_values.clone().requires_grad_()):
        rewards = scorer(pixels)
        trained = [p for p in scorer.parameters() if p.requires_grad]
        results.append([rewards, *torch.autograd.grad(rewards.sum(), trained)])
    torch.testing.assert_close(*results)
    assert seen == [False] * parts + [True] * (4 - parts) + [True] * 4


def test_frozen_text_layers_depend_on_the_trained_vision_layers(pixel_values):
    """Why they need gradients: their output changes when the last vision layer, which is trained, changes."""
    scorer, seen = make_scorer(), []
    scorer.freeze(0.7)
    layer = scorer.text_model.encoder.layer[1]
    assert not any(p.requires_grad for p in layer.parameters())
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach().clone()))
    scorer(pixel_values)
    torch.nn.init.ones_(scorer.vision_model.encoder.layers[2].mlp.fc2.bias)
    scorer(pixel_values)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_gradient_checkpointing_of_the_vision_tower(pixel_values):
    """The same gradients; a layer's forward pass runs a second time when its gradient is due."""
    gradients, calls = [], []
    for enabled in (False, True):
        scorer = make_scorer(text_dropout=0.0).train()
        scorer.mlp.eval()
        layer = scorer.vision_model.encoder.layers[0]
        layer.layer_norm1.register_forward_hook(lambda *_, enabled=enabled: calls.append(enabled))
        if enabled:
            scorer.enable_gradient_checkpointing()
            assert not any(layer.gradient_checkpointing for layer in scorer.text_model.encoder.layer)
        scorer(pixel_values).sum().backward()
        gradients.append(layer.self_attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)
    assert calls == [False, True, True]


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_rewards_in_bfloat16_are_finer_than_its_eight_bits(pixel_values, way):
    """The head is run in float32, or close faces would tie."""
    scorer = make_scorer()
    if way == "weights":
        scorer = scorer.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        rewards = scorer(pixel_values)
    assert rewards.dtype == torch.float32 and (rewards != rewards.bfloat16().float()).all()


# --------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(50, 40), (300, 200), (200, 260), (1, 1), (7, 3), (32, 33), (310, 20)])
def test_preprocess_equals_torchvision(scorer, size):
    """The official transform; not for tall, much reduced images, where Pillow 13 turns its passes round."""
    image = make_image(size=size)
    reference = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    torch.testing.assert_close(scorer.preprocess(image), reference(image)[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(50, 40), (300, 200), (97, 400), (1, 1), (7, 3), (32, 33), (6, 700)])
@pytest.mark.parametrize("contrast", ["smooth", "extreme"])
def test_preprocess_of_a_tensor_keeps_its_bound(scorer, size, contrast):
    """2/255 before the normalisation, even where every pixel is black or white and bicubic overshoots."""
    image = make_image(size=size)
    if contrast == "extreme":
        noise = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise * 255)
    difference = scorer.preprocess(to_pixel_values(image)) - scorer.preprocess(image)
    pixels = difference.abs() * torch.tensor(CLIP_STD).view(3, 1, 1)
    assert pixels.max() <= 2 / 255
    assert difference.abs().max() <= 0.03


def test_preprocess_with_boxes_equals_cropping_first(scorer):
    images, boxes = [make_image(0), make_image(1)], [(10.4, 5.9, 60.2, 50.0), (-7, 30, 40, 400)]
    crops = [images[0].crop((9, 4, 61, 51)), images[1].crop((0, 29, 41, 70))]
    torch.testing.assert_close(scorer.preprocess(images, boxes), scorer.preprocess(crops))
    tensor = scorer.preprocess(to_pixel_values(images), boxes)
    torch.testing.assert_close(tensor, scorer.preprocess(crops), rtol=0, atol=0.03)
    assert tensor.shape == (2, 3, 32, 32)


def test_an_endless_strip_is_resized_in_its_middle_only(scorer):
    """1 x 60000 pixels at 32 wide would be 2 million rows; of them the middle 32 count."""
    strip = np.zeros((60_000, 1, 3), dtype=np.uint8)
    strip[29_990:30_010] = 255
    pixel_values = scorer.preprocess(strip)
    expected = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixel_values, expected.view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_what_preprocess_refuses(scorer):
    with pytest.raises(ValueError, match="empty"):
        scorer.preprocess([])
    with pytest.raises(ValueError, match="one box per image: 2 for 1"):
        scorer.preprocess(make_image(), boxes=[(0, 0, 9, 9), (0, 0, 9, 9)])
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], but is \(1, 3, 8, 8\) torch.uint8"):
        scorer.preprocess(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_crop_bounds_of_the_published_example():
    """int(104.03 - 1) = 103, int(28.23 - 1) = 27, int(143.57 + 1) = 144, int(78.54 + 1) = 79."""
    assert crop_bounds((104.03, 28.23, 143.57, 78.54), 300, 200) == (103, 27, 144, 79)
    assert crop_bounds((-5, -0.5, 310, 199.9), 300, 200) == (0, 0, 300, 200)


BAD_BOXES = [
    ((10, 10, math.nan, 40), "four finite numbers"),
    ((10, 10, 40), "four finite numbers"),
    ((40, 10, 10, 40), "x0 "),
    ((90, 0, 99, 20), "overlap the image"),
    ((-20, 10, -3, 40), "overlap the image"),
    ((10, 10, 10, 40), "smaller than x1"),
]


@pytest.mark.parametrize(("box", "rule"), BAD_BOXES)
def test_bad_boxes_are_named(scorer, box, rule):
    """In an image of 90 x 70 pixels."""
    numbers = ", ".join(str(edge) for edge in box)
    for call in (
        lambda: scorer.preprocess(make_image(), boxes=[box]),
        lambda: scorer.score(make_image(), faces=[(5, 5, 30, 30), box]),
    ):
        with pytest.raises(ValueError, match=rule) as error:
            call()
        assert numbers.split(", ")[0] in str(error.value)


# --------------------------------------------------------------------------------------------- people


def test_the_image_of_a_bad_box_is_named_in_a_list(scorer):
    with pytest.raises(ValueError, match=r"`images\[1\]`: the box .*90x70 pixels: the box has to overlap"):
        scorer.score([make_image(), make_image()], faces=[[(1, 1, 9, 9)], [(95, 0, 99, 9)]])
    with pytest.raises(ValueError, match=r"`images\[0\]`: the `box` of a face has to be four finite numbers"):
        scorer.score([make_image()], faces=[[(1, 1, math.inf, 9)]])


def test_an_image_of_one_pixel(scorer):
    (score,) = scorer.score(Image.new("RGB", (1, 1), "red"), faces=[(0, 0, 1, 1)])
    expected = scorer(scorer.preprocess(Image.new("RGB", (32, 32), "red")))
    assert score.score == pytest.approx(expected.item(), abs=1e-5)
    assert scorer.score(Image.new("RGB", (1, 1)), detector="mtcnn") == []


def test_images_that_cannot_be_scored(scorer, tmp_path):
    """A decompression bomb (60000 x 60000 pixels in 57 bytes), a torn file, an empty one, none."""
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    make_image().save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:2000])
    (tmp_path / "empty.png").touch()
    for name, rule in (("bomb", "beyond Pillow's own limit.*shrink"), ("torn", "truncated"), ("empty", "is empty")):
        with pytest.raises(ImageError, match=rf"{name}\.png.*{rule}"):
            scorer.score(tmp_path / f"{name}.png", faces=[(0, 0, 9, 9)])
    with pytest.raises(FileNotFoundError, match=r"no image at .*none\.png"):
        scorer.score(tmp_path / "none.png")


BOXES = [(5, 5, 40, 36), (30, 20, 80, 60), (60, 2, 88, 30)]


def find(rgb):
    """A function as the detector: three faces in the wide image, none in the others."""
    landmarks = np.arange(10.0).reshape(5, 2)
    return [Face(box, landmarks, 0.95) for box in BOXES] if rgb.shape[1] == 90 else []


def test_score_puts_the_best_first(scorer):
    image = make_image()
    scores = scorer.score(image, detector=find)
    assert [type(score) for score in scores] == [FaceScore] * 3
    assert [score.score for score in scores] == sorted((score.score for score in scores), reverse=True)
    assert {score.box for score in scores} == {tuple(map(float, box)) for box in BOXES}
    for score in scores:
        expected = scorer(scorer.preprocess(image, boxes=[score.box]))
        assert score.score == pytest.approx(expected.item(), abs=1e-5)
    assert json.loads(json.dumps(scores[0].to_dict()))["landmarks"] == np.arange(10).reshape(5, 2).tolist()
    assert (scores[0].confidence, scorer.score(image, faces=[BOXES[0]])[0].confidence) == (0.95, 1.0)


def test_score_of_a_list_is_a_list_of_lists(scorer):
    images = [make_image(0), make_image(1, size=(40, 40)), make_image(2)]
    scores = scorer.score(images, detector=find, batch_size=2)
    assert [len(faces) for faces in scores] == [3, 0, 3]
    for image, faces in zip(images, scores, strict=True):
        alone = scorer.score(image, detector=find)
        assert [face.box for face in faces] == [face.box for face in alone]
        torch.testing.assert_close(
            torch.tensor([f.score for f in faces]), torch.tensor([f.score for f in alone]), rtol=0, atol=1e-5
        )
    assert scorer.score([], detector=find) == []


def test_an_image_without_a_face_has_no_scores(scorer):
    assert scorer.score(make_image(size=(40, 40)), detector=find) == []
    assert scorer.score(make_image(), faces=[]) == []
    assert scorer.score(make_image(), detector=find, min_confidence=0.96) == []


def test_a_hundred_faces_in_one_image(scorer):
    """In batches of 32 each scores as it does alone, without landmarks too; all come back, the best first."""
    boxes = [(8 * column, 6 * row, 8 * column + 12, 6 * row + 9) for row in range(10) for column in range(10)]
    faces = [Face(box, None, 0.5) for box in boxes]
    scores = scorer.score(make_image(), faces=faces)
    assert {score.box for score in scores} == {face.box for face in faces} and len(scores) == 100
    values = [score.score for score in scores]
    assert values == sorted(values, reverse=True) and scores[0].landmarks is None
    alone = scorer(scorer.preprocess(make_image(), boxes=[scores[42].box])).item()
    assert values[42] == pytest.approx(alone, abs=1e-5)


def test_a_real_face_is_found_and_scored(scorer):
    (score,) = scorer.score(data.astronaut(), detector="mtcnn")
    assert 180 < score.box[0] < 220 and 50 < score.box[1] < 90
    assert score.landmarks.shape == (5, 2)


def test_a_reward_that_overflowed_is_an_error():
    scorer = make_scorer()
    torch.nn.init.constant_(scorer.mlp[7].bias, math.inf)
    with pytest.raises(ValueError, match="not finite"):
        scorer.score(make_image(), faces=BOXES)


def test_score_crops_keeps_the_order(scorer):
    crops = [make_image().crop(crop_bounds(box, 90, 70)) for box in BOXES]
    rewards = scorer.score_crops(iter(crops), batch_size=2)
    expected = scorer(scorer.preprocess(crops)).tolist()
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert scorer.score_crops([]) == []
    with pytest.raises(ValueError, match="`batch_size` has to be at least 1 but is 0"):
        scorer.score_crops(crops, batch_size=0)
    with pytest.raises(ValueError, match="one list per image: 1 for 2"):
        scorer.score([make_image(), make_image()], faces=[[]])


def test_scoring_leaves_the_modes_as_they_were():
    scorer = make_scorer().train()
    scorer.mlp.eval()
    first, second = (scorer.score(make_image(), faces=BOXES) for _ in range(2))
    assert first == second  # no dropout
    assert scorer.training and scorer.text_model.training and not scorer.mlp[1].training
    assert all(parameter.requires_grad for parameter in scorer.parameters())


def test_another_prompt_needs_a_tokenizer(scorer, tmp_path):
    """A vocabulary of eight words: ids by line, [CLS] and [SEP] around, cut to 35."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "face", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    assert tokenize_prompt("A Face.", tmp_path) == [2, 5, 6, 7, 3]
    long = tokenize_prompt("a " * 100, tmp_path)
    assert (len(long), long[0], long[-1]) == (35, 2, 3)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OSError, match="needs the tokenizer.*hf download"):
        tokenize_prompt("A dog.", empty)


# ------------------------------------------------------------------------------ the faces of many images


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


def noise(number):
    """An image of noise; `number` is its seed and its first pixel."""
    pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    pixels[0, 0, 0] = number
    return pixels


def test_the_order_and_the_errors_stay_in_their_places(four_threads, tmp_path):
    """Given boxes, 0 to 2 per image; every fifth image is missing."""
    images = [tmp_path / "gone.png" if n % 5 == 4 else noise(n) for n in range(23)]
    boxes = [[(5, 5, 30, 35), (0, 10, 20, 39)][: n % 3] for n in range(23)]
    found = list(iter_faces(images, 16, boxes))
    assert [isinstance(one, FileNotFoundError) for one in found] == [n % 5 == 4 for n in range(23)]
    for image, own, one in zip(images, boxes, found, strict=True):
        if isinstance(one, Exception):
            continue
        assert [face.box for face in one.faces] == own and one.pixels.shape == (len(own), 3, 16, 16)
        if own:
            torch.testing.assert_close(normalise(one.pixels), preprocess([image] * len(own), 16, own), rtol=0, atol=0)
    with pytest.raises(ValueError, match="one list per image: 1 for 2"):
        next(iter_faces([noise(0), noise(1)], 16, [[]]))


def test_a_function_as_detector_is_called_by_one_thread_at_a_time(four_threads):
    """The slowest first; none of the calls finds another one running."""
    running, threads = threading.Semaphore(1), set()

    def find(rgb):
        assert running.acquire(blocking=False)
        time.sleep(0.02 if rgb[0, 0, 0] == 0 else 0)
        threads.add(threading.get_ident())
        running.release()
        return [Face((5, 5, 30, 35), None, (rgb[0, 0, 0] + 100) / 200)]

    found = list(iter_faces(map(noise, range(12)), 16, settings=ScoreSettings(find, min_confidence=0)))
    assert [one.faces[0].confidence for one in found] == [(n + 100) / 200 for n in range(12)]
    assert threading.get_ident() not in threads


def test_no_more_is_read_than_is_asked_for(four_threads):
    """Of an endless iterator: three images, and two for each of the four threads ahead."""
    taken = []
    images = (taken.append(n) or noise(n % 200) for n in itertools.count())
    found = iter_faces(images, 16, settings=ScoreSettings(lambda rgb: []))
    for _ in range(3):
        assert next(found).faces == []
    found.close()
    assert len(taken) == 3 + 2 * four_threads


def test_a_detector_serves_several_threads(four_threads, tmp_path):
    """MTCNN has a state; a PIL image that is not decoded yet is listed many times."""
    Image.fromarray(data.astronaut()).save(tmp_path / "astronaut.png")
    with Image.open(tmp_path / "astronaut.png") as astronaut:
        found = list(iter_faces([astronaut] * 4 + [data.coffee()] * 2, 32, settings=ScoreSettings("mtcnn")))
    (expected,) = resolve_detector("mtcnn")(data.astronaut())
    assert [one.faces for one in found] == [[expected]] * 4 + [[]] * 2
    assert all(torch.equal(one.pixels, found[0].pixels) for one in found[:4])


# ---------------------------------------------------------------------------------------------- files


def make_reference(name="drawn"):
    """Good faces score 0, 1 ... 100, so that a score is its own percentile; bad ones a hundred less."""
    return ScoreReference.from_scores(name, list(range(101)), [score - 100.0 for score in range(101)])


def test_percentiles_by_hand():
    reference = make_reference()
    assert (reference.n, reference.good[0], reference.good[50], reference.bad[100]) == (101, 0, 50, 0)
    assert [reference.percentile(score) for score in (-3, 0, 12.5, 99, 100, 1e9)] == [0, 0, 12.5, 99, 100, 100]
    few = ScoreReference.from_scores("two", [1.0, 3.0], [0.0, 0.0])
    assert (few.n, few.percentile(1.5), few.percentile(2.0)) == (2, 25, 50)
    for good, bad in (([], []), ([1.0], [1.0, 2.0]), ([math.nan], [0.0])):
        with pytest.raises(ValueError):
            ScoreReference.from_scores("x", good, bad)


def test_the_reference_goes_with_the_weights(tmp_path):
    scorer = make_scorer()
    image, box = make_image(), BOXES[0]
    assert scorer.score(image, faces=[box])[0].percentile is None
    value = scorer.score(image, faces=[box])[0].score
    scorer.reference = ScoreReference.from_scores("near", [value - 1, value + 1], [value - 2, value - 2])
    scorer.save_pretrained(tmp_path / "a")
    FaceScorer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    loaded = FaceScorer.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert loaded.reference == scorer.reference
    (score,) = loaded.score(image, faces=[box])
    assert score.percentile == pytest.approx(50, abs=0.01) and score.to_dict()["percentile"] == score.percentile
    assert loaded.percentile(value, "Another prompt.") is None
    assert json.loads((tmp_path / "b" / REFERENCE_FILE).read_text()).keys() == {"name", "n", "good", "bad"}
    loaded.reference = None
    loaded.save_pretrained(tmp_path / "b")
    assert FaceScorer.from_pretrained(tmp_path / "b").reference is None


def test_official_weights_may_have_a_reference_beside_them(tmp_path):
    save_official(make_scorer(), tmp_path)
    assert FaceScorer.from_pretrained(tmp_path).reference is None
    make_reference().save(tmp_path)
    assert FaceScorer.from_pretrained(tmp_path).reference == make_reference()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "damaged"),
        ("[1]", "damaged"),
        ('{"name": "x", "n": 1}', "missing.*good"),
        (json.dumps({"name": "x", "n": 1, "good": [0, 1], "bad": [0, 1]}), "`good` has to be 101 finite numbers"),
        (json.dumps({"name": "x", "n": 1, "good": list(range(101, 0, -1)), "bad": [0] * 101}), "rising order"),
        (json.dumps({"name": "x", "n": 0, "good": [0] * 101, "bad": [0] * 101}), "at least one pair"),
    ],
)
def test_a_damaged_reference_is_named(tmp_path, text, rule):
    make_scorer().save_pretrained(tmp_path)
    (tmp_path / REFERENCE_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"reference\.json is damaged.*{rule}|{rule}.*delete it"):
        FaceScorer.from_pretrained(tmp_path)


def test_saving_and_loading(tmp_path, pixel_values):
    scorer = make_scorer(reward_mean=0.5)
    scorer.save_pretrained(tmp_path)
    loaded = FaceScorer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixel_values), scorer(pixel_values))
    assert not loaded.training and loaded.config.reward_mean == 0.5
    half = FaceScorer.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(pixel_values).dtype == torch.float32
    torch.testing.assert_close(half(pixel_values), scorer(pixel_values), rtol=0.1, atol=0.1)


def save_official(scorer, folder, name="FS_model.pt", prefix=""):
    """Write a scorer as the official one is published: with a prefix, unused projections and position ids."""
    state_dict = ours_to_official(scorer.state_dict())
    state_dict["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for part, width in (("vision", 128), ("text", 48)):
        state_dict[f"blip.{part}_proj.weight"] = torch.randn(256, width)
        state_dict[f"blip.{part}_proj.bias"] = torch.randn(256)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    torch.save({prefix + key: tensor.clone() for key, tensor in state_dict.items()}, path)
    med_config = {
        "hidden_act": "gelu",
        "num_attention_heads": 4,
        "layer_norm_eps": 1e-12,
        "vocab_size": 30524,
    }
    path.with_name("med_config.json").write_text(json.dumps(med_config))
    return path


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("FS_model.pt", ""), ("FaceScore_model/FS_model.pt", "module."), ("ImageReward.pt", "")],
)
def test_the_official_layout_gives_equal_rewards(tmp_path, pixel_values, name, prefix):
    scorer = make_scorer()
    save_official(scorer, tmp_path, name, prefix)
    loaded = FaceScorer.from_pretrained(tmp_path)
    expected = scorer(pixel_values)
    if name == "ImageReward.pt":
        expected = (expected - 0.1672) / 1.0333
    torch.testing.assert_close(loaded(pixel_values), expected)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(FaceScorer.from_pretrained(tmp_path / "ours")(pixel_values), expected)


@pytest.mark.slow
def test_the_full_size_in_the_official_layout(tmp_path):
    """ViT-L/16 and BERT base with random weights, 1.8 GB: by hand, and through the official files."""
    sizes = ("vision_hidden_size", "vision_layers", "vision_heads", "vision_intermediate", "image_size")
    sizes += ("patch_size", "text_hidden_size", "text_layers", "text_heads", "text_intermediate")
    with torch.device("meta"):
        config = FaceScorer().config
    scorer = make_scorer(**{name: config[name] for name in sizes}, vocab_size=30524, max_positions=512)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rewards = scorer(pixels)
        torch.testing.assert_close(official_reward(scorer, pixels, text_heads=12), rewards, rtol=0, atol=1e-4)
        torch.save(ours_to_official(scorer.state_dict()), tmp_path / "FS_model.pt")
        (tmp_path / "med_config.json").write_text(json.dumps({"num_attention_heads": 12}))
        torch.testing.assert_close(FaceScorer.from_pretrained(tmp_path)(pixels), rewards)


def test_the_options_of_official_files(tmp_path):
    save_official(make_scorer(), tmp_path, "FaceScore_model/FS_model.pt")
    assert FaceScorer.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    FaceScorer.from_pretrained(tmp_path, subfolder="FaceScore_model")
    with pytest.raises(TypeError, match="device_map: official files"):
        FaceScorer.from_pretrained(tmp_path, device_map="cpu")


def test_an_official_file_of_another_model(tmp_path):
    path = save_official(make_scorer(), tmp_path)
    state_dict = torch.load(path)
    del state_dict["mlp.layers.2.bias"]
    state_dict["mlp.layers.8.bias"] = torch.zeros(1)
    state_dict["blip.visual_encoder.norm.bias"] = torch.zeros(7)
    torch.save(state_dict, path)
    with pytest.raises(ValueError, match=r"FS_model\.pt is not a checkpoint") as error:
        FaceScorer.from_pretrained(tmp_path)
    for line in (
        "missing (1): mlp.layers.2.bias",
        "unexpected (1): mlp.layers.8.bias",
        "misshapen (1): blip.visual_encoder.norm.bias is (7,) instead of (128,)",
    ):
        assert line in str(error.value)


def test_a_truncated_official_file(tmp_path):
    path = save_official(make_scorer(), tmp_path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"FS_model\.pt \(100000 bytes\) is truncated.*download it again"):
        FaceScorer.from_pretrained(tmp_path)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return type(self.target).touch, (self.target,)


def test_an_official_file_with_code_in_it_is_refused(tmp_path):
    path = save_official(make_scorer(), tmp_path)
    torch.save(torch.load(path) | {"extra": Malicious(tmp_path / "was_here")}, path)
    with pytest.raises(ValueError, match=r"FS_model\.pt is refused.*only tensors.*publisher"):
        FaceScorer.from_pretrained(tmp_path)
    assert not (tmp_path / "was_here").exists()


def test_official_files_of_another_network(tmp_path):
    path = save_official(make_scorer(), tmp_path)
    torch.save({f"down_blocks.{n}.weight": torch.zeros(1) for n in range(4)}, path)
    with pytest.raises(ValueError, match=r"FS_model\.pt is not a checkpoint(.|\n)*down_blocks\.{0-3}\.weight"):
        FaceScorer.from_pretrained(tmp_path)


def test_a_folder_of_ours_with_other_weights(tmp_path):
    make_scorer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_layers": 2, "text_intermediate": 100}))
    with pytest.raises(ValueError, match=r"unexpected \(12\): vision_model.encoder.layers.2.*") as error:
        FaceScorer.from_pretrained(tmp_path)
    assert "misshapen (12)" in str(error.value) and "is (96,) instead of (100,)" in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="configuration of UNet2DConditionModel, not of a FaceScorer"):
        FaceScorer.from_pretrained(tmp_path)


def test_a_damaged_folder_of_ours(tmp_path):
    make_scorer().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        FaceScorer.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no weights beside"):
        FaceScorer.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no scorer in .*02_train_scorer\.py"):
        FaceScorer.from_pretrained(tmp_path)
