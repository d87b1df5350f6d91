"""AuthFaceRestorer: sampling by hand, the photograph around the faces, and the folders that it reads."""

import io
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from skimage import data

from faceprior import tiny
from faceprior.align import align_face, alignment_quad
from faceprior.detect import Face
from faceprior.models import quiet_libraries
from faceprior.procedural import draw_portrait
from faceprior.restorer import NEGATIVE_PROMPT, PROMPT, AuthFaceRestorer, RestorerSettings

FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def restorer():
    """A restorer of 64 pixels whose ControlNet has an effect: its zero-initialised outputs are changed."""
    made = tiny.tiny_restorer()
    generator = torch.Generator().manual_seed(0)
    controlnet = made.pipeline.controlnet
    with torch.no_grad():
        for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            layer.weight.add_(0.5 * torch.randn(layer.weight.shape, generator=generator))
        last = controlnet.controlnet_cond_embedding.conv_out
        last.weight.add_(torch.randn(last.weight.shape, generator=generator))
    settings = RestorerSettings(resolution=64, guidance_scale=1.0, prompt="", negative_prompt="")
    return AuthFaceRestorer(made.pipeline, settings)


@pytest.fixture(scope="module")
def folder(restorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("restorer")
    restorer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def crops():
    return [Image.fromarray(draw_portrait(seed, 64).image) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def group():
    """A photograph of 200 x 128 pixels with two drawn people, and their faces, largest first."""
    image, faces = Image.new("RGB", (200, 128), "gray"), []
    for seed, size, x in ((4, 128, 0), (5, 64, 132)):
        drawing = draw_portrait(seed, size)
        image.paste(Image.fromarray(drawing.image), (x, 0))
        x0, y0, x1, y1 = drawing.box
        faces.append(Face((x0 + x, y0, x1 + x, y1), drawing.landmarks + [x, 0], 1.0))
    return image, faces


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int))


def inside_of(face, size):
    """(H, W) bool: the pixels whose centres lie in the square that is cut out around a face, or next to it."""
    corner, below, _, right = alignment_quad(face.landmarks)
    y, x = np.mgrid[: size[1], : size[0]]
    offset = np.stack([x, y], axis=2) - corner
    across, down = right - corner, below - corner
    fractions = [(offset @ side) / (side @ side) for side in (across, down)]
    margin = 1.5 / np.hypot(*across)
    return np.all([(f >= -margin) & (f <= 1 + margin) for f in fractions], axis=0)


# ------------------------------------------------------------------------------------------ photographs


def test_only_the_faces_of_a_photograph_change(restorer, group):
    photograph, faces = group
    result = restorer.restore(photograph, faces=faces, **FAST)
    assert result.image.size == photograph.size and result.image.mode == "RGB"
    inside = [inside_of(face, photograph.size) for face in faces]
    changed = difference(result.image, photograph).max(axis=2) > 0
    assert not (changed & ~inside[0] & ~inside[1]).any()
    for region in inside:
        assert changed[region].mean() > 0.5
    assert [found.face for found in result.faces] == faces
    for found, face in zip(result.faces, faces, strict=True):
        assert found.before.tobytes() == align_face(photograph, face.landmarks, 64).crop.tobytes()
        assert found.after.size == (64, 64) and difference(found.before, found.after).max() > 1


def in_mode(image, mode):
    """The photograph as a grey or toned one: file's mode, or the way that it came to its colours."""
    grey = image.convert("L")
    if mode == "sepia":
        return Image.fromarray((np.asarray(grey)[..., None] / 255 * [255, 232, 195]).astype(np.uint8))
    if mode == "JPEG":
        buffer = io.BytesIO()
        grey.convert("RGB").save(buffer, "JPEG", quality=60)
        return Image.open(buffer)
    if mode == "LA":
        grey.putalpha(200)
    return grey.convert(mode)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "I", "JPEG", "sepia"])
@pytest.mark.parametrize("color_fix", ["wavelet", "none"])
def test_a_grey_or_toned_photograph_stays_so(restorer, group, mode, color_fix):
    """Whatever the network draws, which here is coloured noise."""
    photograph = in_mode(group[0], mode)
    if mode == "I":
        photograph = Image.fromarray(np.asarray(photograph, np.int32) * 257)
    result = restorer.restore(photograph, faces=group[1], color_fix=color_fix, num_inference_steps=1)
    pixels = np.asarray(result.image.convert("RGB")).astype(int)
    assert result.image.mode == ("RGBA" if mode == "LA" else "RGB") and len(result.faces) == 2
    assert difference(pixels, np.asarray(result.source.rgb)).max() > 5
    if mode == "sepia":
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        off = np.maximum(np.abs(green - red * 232 / 255), np.abs(blue - red * 195 / 255))
        assert (off < 2.5).mean() > 0.98  # but where the resampling of the noise overshoots white
        assert (red >= green).all() and (green >= blue).all()
    else:
        assert not np.ptp(pixels, axis=2).any()


def test_a_photograph_in_colours_is_not_toned(restorer, group, monkeypatch):
    """A pale one, too: as if the tone was never looked at."""
    pale = ImageEnhance.Color(group[0]).enhance(0.3)
    found = restorer.restore(pale, faces=group[1], num_inference_steps=1).image
    monkeypatch.setattr("faceprior.restorer.restorer.keep_tone", lambda content, style: content)
    assert restorer.restore(pale, faces=group[1], num_inference_steps=1).image.tobytes() == found.tobytes()


def test_transparency_stays(restorer, group):
    photograph, faces = group
    alpha = Image.new("L", photograph.size, 255)
    alpha.paste(0, (0, 0, 20, 128))
    alpha.paste(100, (20, 0, 50, 128))
    cut = photograph.copy()
    cut.putalpha(alpha)
    result = restorer.restore(cut, faces=faces[:1], num_inference_steps=1)
    before, after = np.asarray(cut).astype(int), np.asarray(result.image).astype(int)
    assert result.image.mode == "RGBA" and (after[..., 3] == before[..., 3]).all()
    outside = ~inside_of(faces[0], photograph.size) | (before[..., 3] == 0)
    assert (after[outside] == before[outside]).all() and (after != before).any()


def test_several_faces_do_not_depend_on_the_batch(restorer, group):
    photograph, faces = group
    results = [restorer.restore(photograph, faces=faces, batch_size=size, **FAST) for size in (1, 2)]
    assert difference(results[0].image, results[1].image).max() <= 1


def test_the_larger_face_goes_on_top(restorer, group):
    """A second face of the same place, listed after the first, does not show in the middle of the first."""
    photograph, (face, _) = group
    moved = Face(face.box, face.landmarks + [6, 0], 1.0)
    alone = restorer.restore(photograph, faces=[face], **FAST).image
    both = restorer.restore(photograph, faces=[face, moved], **FAST).image
    middle = align_face(photograph, face.landmarks, 64)
    x, y = (np.linalg.inv(np.vstack([middle.matrix, [0, 0, 1]])) @ [32, 32, 1])[:2].astype(int)
    area = (x - 10, y - 10, x + 10, y + 10)
    assert difference(alone.crop(area), both.crop(area)).max() <= 1
    assert difference(alone, both).max() > 1


def test_a_detected_face(restorer):
    photograph = data.astronaut()
    result = restorer.restore(photograph, detector="mtcnn", num_inference_steps=1)
    (found,) = result.faces
    inside = inside_of(found.face, (512, 512))
    assert (np.asarray(result.image)[~inside] == photograph[~inside]).all()
    assert difference(result.image, photograph)[inside].mean() > 1


def test_a_photograph_without_a_face_comes_back(restorer):
    photograph = Image.fromarray(data.coffee()).resize((120, 80))
    result = restorer.restore(photograph, detector="mtcnn")
    assert result.faces == [] and result.image.tobytes() == photograph.tobytes()
    assert restorer.restore(photograph, detector=lambda rgb: []).faces == []


def test_a_face_that_cannot_be_aligned_is_left_with_a_warning(restorer, group, caplog):
    photograph, (face, other) = group
    swapped = Face(other.box, other.landmarks[[1, 0, 2, 3, 4]], 1.0)
    with caplog.at_level(logging.WARNING):
        result = restorer.restore(photograph, faces=[Face(other.box, None, 1.0), swapped, face], **FAST)
    assert [found.face for found in result.faces] == [face]
    assert [left.face.landmarks is None for left in result.left] == [True, False]
    assert result.left[0].reason == "it has no landmarks" and "contradict each other" in result.left[1].reason
    assert "has no landmarks" in caplog.text and "contradict each other" in caplog.text
    assert f"the face at ({other.box[0]:.0f}, " in caplog.text


def test_another_resolution_for_one_call(restorer, group):
    """The crop is aligned at the size that it is restored at, so that it fits back into its place."""
    photograph, faces = group
    result = restorer.restore(photograph, faces=faces[:1], resolution=32, **FAST)
    assert result.faces[0].before.size == result.faces[0].after.size == (32, 32)
    expected = restorer.restore(photograph, faces=faces[:1], resolution=32, **FAST, color_fix="none")
    changed = difference(expected.image, photograph).max(axis=2) > 0
    inside = inside_of(faces[0], photograph.size)
    assert not changed[~inside].any() and changed[inside].mean() > 0.5


# ------------------------------------------------------------------------------------------------ files


def test_saving_and_loading(restorer, folder, crops):
    loaded = AuthFaceRestorer.from_pretrained(folder)
    assert loaded.settings == restorer.settings
    images = [r.restore_crops(crops[:1], **FAST)[0] for r in (restorer, loaded)]
    assert difference(*images).max() <= 1  # the place of weights in memory decides how sums round


def write_official_layout(folder, target):
    """As it is published: no index, one key more and one less in the ControlNet's config, CLIP's vocab.json."""
    shutil.copytree(folder, target)
    for name in ("model_index.json", "restorer_config.json"):
        (target / name).unlink()
    path = target / "controlnet/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "mid_block_type"}
    path.write_text(json.dumps({**config, "use_pre_img_encoder": False}))
    for name in ("tokenizer", "tokenizer_2"):
        model = json.loads((target / name / "tokenizer.json").read_text())["model"]
        (target / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (target / name / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (target / name / "tokenizer.json").unlink()


def test_the_official_layout(restorer, folder, tmp_path, crops):
    write_official_layout(folder, tmp_path / "official")
    loaded = AuthFaceRestorer.from_pretrained(str(tmp_path / "official"))
    assert loaded.settings == RestorerSettings()  # the official code's
    assert (loaded.settings.num_inference_steps, loaded.settings.guidance_scale, loaded.settings.seed) == (50, 8.0, 123)
    options = {"resolution": 64, "guidance_scale": 3.0, "prompt": "a man", "negative_prompt": "bad face", **FAST}
    images = [r.restore_crops(crops[:1], **options)[0] for r in (restorer, loaded)]
    assert difference(*images).max() <= 1


def test_the_official_prompts():
    """As published, with the spaces that are missing there."""
    assert PROMPT.startswith("hyper-realistic portrait, face close-up,") and PROMPT.endswith("without deformations")
    assert (
        "R camera,hyper detailed photo - realistic" in PROMPT
        and "ultra HD,extreme meticulous detailing, skin" in PROMPT
    )
    assert "sketch,cartoon, CG Style" in NEGATIVE_PROMPT and NEGATIVE_PROMPT.endswith(
        "hands/fingers, ugly, easy negative"
    )
    assert "  " not in PROMPT + NEGATIVE_PROMPT


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("controlnet", "config.json"),
        ("vae", "config.json"),
        ("text_encoder_2", "config.json"),
        ("tokenizer", "tokenizer.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
def test_a_missing_part_is_named(folder, tmp_path, part, file):
    """Also where only its main file is missing: a tokenizer without words would load silently."""
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / part / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {part} in .*copy: there is no .*{part}/{file}"):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / part)
    with pytest.raises(FileNotFoundError, match=f"no {part} in "):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no restorer at .*06_train_restorer.py"):
        AuthFaceRestorer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"resolution": 64, "stepz": 3}', "unknown keys: stepz; it knows resolution, num_inference_steps"),
        ('{"steps": "50"}', "`num_inference_steps` has to be"),
        ('{"seed": true}', "`seed` has to be"),
        ('{"start": "lq"}', "`start` has to be one of noise, degraded"),
        ('{"resolution": 64', "line 1 column 18"),
        ("[1, 2]", "sequence"),
    ],
)
def test_bad_settings_are_named(folder, tmp_path, text, reason):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/restorer_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"restorer_config.json does not hold a restorer's settings: .*{reason}"):
        AuthFaceRestorer.from_pretrained(tmp_path / "copy")


def test_settings_may_be_given_in_part(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/restorer_config.json").write_text('{"resolution": 64, "guidance_scale": 2}')
    loaded = AuthFaceRestorer.from_pretrained(tmp_path / "copy")
    assert loaded.settings == RestorerSettings(resolution=64, guidance_scale=2)


def test_parts_in_bfloat16_beside_a_vae_in_float32(restorer, folder, crops):
    loaded = AuthFaceRestorer.from_pretrained(folder, torch.bfloat16)
    assert {loaded.pipeline.unet.dtype, loaded.pipeline.controlnet.dtype} == {torch.bfloat16}
    assert loaded.pipeline.vae.dtype == torch.float32
    options = {"guidance_scale": 2.0, "prompt": "a man", "color_fix": "none", "start": "degraded", **FAST}
    images = [r.restore_crops(crops[:1], **options)[0] for r in (restorer, loaded)]
    assert difference(*images).mean() < 3


def test_a_prior_of_another_type():
    prior = tiny.tiny_sd15()
    with pytest.raises(ValueError, match="SDXL type, with two text encoders, but is a StableDiffusionPipeline"):
        AuthFaceRestorer.from_prior(prior, tiny.tiny_controlnet(prior.unet))
