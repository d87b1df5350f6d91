"""The cache: equal to computing anew, what a change invalidates, kills, damage, several processes, memory."""

import copy
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import load_stage
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from faceprior import tiny
from faceprior.cache import CachedDataset, _require_space, cache_dataset, cached_prompts, fingerprint
from faceprior.detect import box_mask
from faceprior.diffusion import encode_prompts
from faceprior.guidance import GuidanceTuner
from faceprior.images import save_image
from faceprior.models import quiet_libraries
from faceprior.pairs import FacePair, PairDataset, gather_pairs
from faceprior.procedural import draw_portrait
from faceprior.training import collate, make_accelerator, sample_generators

SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quiet_libraries()


@pytest.fixture(scope="module")
def bases():
    return {"sd15": tiny.tiny_sd15(), "sdxl": tiny.tiny_sdxl()}


@pytest.fixture(scope="module")
def drawn_pairs(tmp_path_factory):
    """Four drawn pairs, the last two of one photograph's prompt."""
    folder = tmp_path_factory.mktemp("drawn") / "pairs"
    rows = []
    for number, prompt in enumerate(["a man", "portrait photo, a woman", "two people", "two people"]):
        drawing = draw_portrait(number, 64)
        good = Image.fromarray(drawing.image)
        mask = box_mask((64, 64), drawing.box)
        files = {side: f"{number}_{side}.png" for side in ("good", "bad", "mask")}
        for file, image in zip(files.values(), (good, good.filter(ImageFilter.BoxBlur(3)), mask), strict=True):
            save_image(image, folder / file)
        pair = FacePair(
            id=str(number), photograph="a.png", **files, box=[float(edge) for edge in drawing.box], landmarks=None,
            confidence=1.0, area_ratio=0.2, strength=0.4, prompt=prompt, seed=0, base="tiny", difference=9.0,
        )  # fmt: skip
        rows.append(pair.to_row())
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def pairs(drawn_pairs, tmp_path):
    return Path(shutil.copytree(drawn_pairs, tmp_path / "pairs"))


@pytest.fixture
def tuner(bases):
    return GuidanceTuner(copy.deepcopy(bases["sd15"]), "lora", rank=2, prompt_drop=0.5)


def dataset(folder, size=SIZE):
    return PairDataset(gather_pairs(folder)[0], size)


def encoded(tuner):
    """Count the images and the prompts that the tuner's models encode from now on."""
    counts = {"images": 0, "prompts": 0}

    def count(name):
        def hook(module, args, kwargs):
            counts[name] += len(args[0] if args else kwargs["input_ids"])

        return hook

    pipeline = tuner._pipeline
    pipeline.vae.encoder.register_forward_pre_hook(count("images"), with_kwargs=True)
    pipeline.text_encoder.register_forward_pre_hook(count("prompts"), with_kwargs=True)
    return counts


def cached(tuner, folder, data, accelerator=None, **options):
    return tuner.cached(data, folder, accelerator or make_accelerator("cpu"), **options)


def entries(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, msg=key) if torch.is_tensor(value) else value == other[key]


# ------------------------------------------------------------------------- equal to computing anew


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_losses_equal_those_of_pixels_and_texts(bases, pairs, tmp_path, kind):
    """Both objectives, with none, half and all of the prompts dropped; both draw the same random numbers."""
    tuner = GuidanceTuner(copy.deepcopy(bases[kind]), "lora", rank=2)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    plain = dataset(pairs)
    stored = cached(tuner, tmp_path / "cache", plain, batch_size=3)
    one, other = (collate([samples[i] for i in range(4)]) for samples in (plain, stored))
    assert not other.keys() & {"good", "bad", "mask"}
    for tuner.prompt_drop in (0.0, 0.5, 1.0):
        for loss in (tuner.loss, tuner.denoising_loss):
            losses = [loss(batch, sample_generators(3, range(4))) for batch in (one, other)]
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-8)
            assert losses[0] > 1e-4


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_dropped_prompts_equal_encoded_ones(bases, pairs, tmp_path, kind):
    """An empty prompt that was not dropped is not the dropped one, which is zeros for SDXL."""
    base = copy.deepcopy(bases[kind])
    if kind == "sdxl":
        base.register_to_config(force_zeros_for_empty_prompt=True)
    plain = dataset(pairs)
    plain.pairs[0] = type(plain.pairs[0])(**{**plain.pairs[0].to_row(), "prompt": ""})
    stored = cached(GuidanceTuner(base), tmp_path / "cache", plain)
    batch = collate([stored[i] for i in range(4)])
    for prompts in (["", *batch["prompt"][1:]], [None, "portrait photo, a woman", None, "two people"], [None] * 4):
        same(vars(encode_prompts(base, prompts)), vars(cached_prompts(batch, prompts)))


@pytest.mark.parametrize(("kind", "train"), [("sd15", "self_attention"), ("sdxl", "lora")])
def test_training_equals_that_without_cache(bases, pairs, tmp_path, kind, train):
    """Three steps; those with the cache were broken off after the first, and it is filled a second time by nobody."""
    tuners, options = [], {"learning_rate": 1e-3, "device": "cpu", "seed": 3, "resolution": SIZE}
    for name, cache, counts in (("plain", None, [3]), ("cached", tmp_path / "cache", [1, 3])):
        for steps in counts:
            tuner = GuidanceTuner(copy.deepcopy(bases[kind]), train, prompt_drop=0.5)
            seen = encoded(tuner)
            tuner.fit(pairs, steps=steps, output=tmp_path / name, cache=cache, **options)
        tuners.append(tuner)
    assert seen == {"images": 0, "prompts": 0}
    untrained = GuidanceTuner(copy.deepcopy(bases[kind]), train)
    plain, other, start = (t.trainable_parameters() for t in (*tuners, untrained))
    for one, two in zip(plain, other, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=2e-5)  # Adam's steps are of 1e-3
    assert max((one - first).abs().max() for one, first in zip(plain, start, strict=True)) > 1e-3
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("plain", "cached")]
    losses = [[json.loads(row)["loss"] for row in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 3


def test_another_kind_of_samples(bases, tmp_path):
    """Portraits with captions, whose posterior is sampled anew in every epoch: a dataset without `source`."""
    base, generator = bases["sdxl"], torch.Generator().manual_seed(0)
    samples = [
        {"pixel_values": torch.rand(3, 16, 16, generator=generator) * 2 - 1, "caption": caption, "id": number}
        for number, caption in enumerate(["soft light", "hard light"])
    ]

    def encode(batch):
        posterior = base.vae.encode(batch["pixel_values"]).latent_dist
        return {"mean": posterior.mean, "std": posterior.std}

    arguments = (tmp_path, "portraits", base, encode, make_accelerator("cpu"))
    stored = cache_dataset(samples, *arguments, prompt="caption")
    assert [(stored[i]["caption"], stored[i]["id"]) for i in range(2)] == [("soft light", 0), ("hard light", 1)]
    posterior = base.vae.encode(samples[1]["pixel_values"][None]).latent_dist
    torch.testing.assert_close(stored[1]["mean"], posterior.mean[0])
    torch.testing.assert_close(stored[1]["std"], posterior.std[0])
    pooled = encode_prompts(base, ["hard light"]).pooled_prompt_embeds[0]
    torch.testing.assert_close(stored[1]["pooled_prompt_embeds"], pooled)

    before = set(entries(tmp_path))
    samples[0] = {**samples[0], "pixel_values": -samples[0]["pixel_values"]}
    cache_dataset(samples, *arguments, prompt="caption")
    assert len(set(entries(tmp_path)) - before) == 1


# -------------------------------------------------------------------- what a change invalidates


def edit_row(folder, **values):
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows[1] |= values
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_image(folder, side):
    """One pixel, and the file is as old as before."""
    file = folder / f"1_{side}.png"
    times = file.stat()
    image = Image.open(file).convert("RGB" if side != "mask" else "L")
    image.putpixel((32, 32), 0 if side == "mask" else (1, 2, 3))
    image.save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@torch.no_grad()
def change_weight(model):
    list(model.parameters())[-1].flatten()[-1] += 1e-3


def change_tokenizer(pipeline):
    """It reads "woman" as "man"; the other prompts keep their tokens."""
    pipeline.tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("woman", "man")


@pytest.mark.parametrize(
    ("change", "images", "prompts"),
    [
        ("nothing", 0, 0),
        ("newer files", 0, 0),
        ("folder", 0, 0),
        ("good", 2, 0),
        ("bad", 2, 0),
        ("mask", 2, 0),
        ("box", 2, 0),
        ("prompt", 0, 1),
        ("resolution", 8, 0),
        ("vae", 8, 0),
        ("vae config", 8, 0),
        ("text encoder", 0, 4),
        ("tokenizer", 0, 1),
        ("unet", 0, 0),
    ],
)
def test_what_a_change_invalidates(tuner, pairs, tmp_path, change, images, prompts):
    """Of 4 pairs, 2 images each, with 3 prompts and the dropped one: what is computed again, and no more."""
    cached(tuner, tmp_path / "cache", dataset(pairs))
    pipeline, size = tuner._pipeline, SIZE
    match change:
        case "newer files":
            for file in pairs.iterdir():
                os.utime(file)
        case "folder":
            pairs = pairs.rename(tmp_path / "moved")
        case "good" | "bad" | "mask":
            change_image(pairs, change)
        case "box":
            edit_row(pairs, box=[20.0, 20.0, 40.0, 40.0])
        case "prompt":
            edit_row(pairs, prompt="a girl")
        case "resolution":
            size = 48
        case "vae":
            change_weight(pipeline.vae)
        case "vae config":
            pipeline.vae.register_to_config(scaling_factor=0.5)
        case "text encoder":
            change_weight(pipeline.text_encoder)
        case "tokenizer":
            change_tokenizer(pipeline)
        case "unet":
            change_weight(pipeline.unet)
    counts = encoded(tuner)
    data = dataset(pairs, size)
    stored = cached(tuner, tmp_path / "cache", data)
    assert counts == {"images": images, "prompts": prompts}
    sample = data[1]
    good = tuner.encode(sample["good"][None])[0]
    torch.testing.assert_close(stored[1]["good_latents"], good)
    torch.testing.assert_close(
        stored[1]["prompt_embeds"], encode_prompts(pipeline, [sample["prompt"]]).prompt_embeds[0]
    )


def test_a_fingerprint_is_that_of_the_weights_and_not_of_their_place(bases, tmp_path):
    """Saved and loaded it stays; another dtype is another model, since it gives other latents."""
    vae = bases["sd15"].vae
    vae.save_pretrained(tmp_path)
    loaded = type(vae).from_pretrained(tmp_path)
    assert fingerprint(loaded) == fingerprint(vae)
    assert len({fingerprint(vae), fingerprint(loaded.to(torch.bfloat16)), fingerprint(vae, settings=1)}) == 3


# ------------------------------------------------------------------------ kills, damage, full disks


def in_child(*functions):
    """Run functions in forked processes at the same time; return their exit codes."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=function) for function in functions]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def test_a_killed_process_is_resumed(tuner, pairs, tmp_path):
    """Killed at the third pair, of which the VAE encodes each side: two are there, and the other two are computed."""

    def fill_and_die():
        calls = []

        def hook(*_):
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        tuner._pipeline.vae.encoder.register_forward_pre_hook(hook)
        cached(tuner, tmp_path / "cache", dataset(pairs))

    assert in_child(fill_and_die) == [-signal.SIGKILL]
    assert len(entries(tmp_path / "cache")) == 4 + 2
    counts = encoded(tuner)
    stored = cached(tuner, tmp_path / "cache", dataset(pairs))
    assert counts == {"images": 4, "prompts": 0}
    fresh = cached(tuner, tmp_path / "other", dataset(pairs))
    for index in range(4):
        same(fresh[index], stored[index])


def test_a_spoilt_entry_of_the_right_length_ends_the_run_and_is_made_again(tuner, pairs, tmp_path):
    """One bit of a latent, and of an embedding; entries of versions without a checksum are taken as they are."""
    stored = cached(tuner, tmp_path / "cache", dataset(pairs))
    expected = {key: value.clone() for key, value in stored[0].items() if torch.is_tensor(value)}
    for file in stored.files[0][:2]:
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        with pytest.raises(OSError, match=f"{file.name} is gone or damaged .*not those that were written.*makes it"):
            CachedDataset(stored.values, stored.files)[0]
        stored = cached(tuner, tmp_path / "cache", dataset(pairs))
        same(expected, {key: value for key, value in stored[0].items() if key in expected})
    save_file({key: value + 1 for key, value in load_file(stored.files[0][0]).items()}, stored.files[0][0])
    assert (CachedDataset(stored.values, stored.files)[0]["good_latents"] == expected["good_latents"] + 1).all()


def test_damaged_entries_are_made_again(tuner, pairs, tmp_path, caplog):
    """A truncated one, an empty one, one of zeros: each is named."""
    before = cached(tuner, tmp_path / "cache", dataset(pairs))
    expected = [{k: v.clone() if torch.is_tensor(v) else v for k, v in before[i].items()} for i in range(4)]
    latents = sorted(file for files in before.files for file in files[:1])
    latents[0].write_bytes(latents[0].read_bytes()[:-7])
    latents[1].write_bytes(b"")
    prompt = before.files[0][1]
    prompt.write_bytes(bytes(prompt.stat().st_size))
    with pytest.raises(OSError, match="is gone or damaged .*: the same command makes it"):
        [before[i] for i in range(4)]
    counts = encoded(tuner)
    after = cached(tuner, tmp_path / "cache", dataset(pairs))
    assert counts == {"images": 4, "prompts": 1}
    named = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(named) == 3 and all(any(str(file) in line for line in named) for file in (*latents[:2], prompt))
    for index in range(4):
        same(expected[index], after[index])


def test_a_disk_that_fills_up_is_said_and_what_was_written_stays(tuner, pairs, tmp_path):
    """No file may be as large as a pair's, 9 x 24 x 24 floats; those of the prompts, 77 x 64 floats, are smaller."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20300, limit[1]))
    try:
        with pytest.raises(OSError, match="the cache .*pairs-.* cannot be written .*File too large.*: free space"):
            cached(tuner, tmp_path / "cache", dataset(pairs, 96))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(entries(tmp_path / "cache")) == 4 and not list((tmp_path / "cache").rglob("*.tmp"))
    counts = encoded(tuner)
    cached(tuner, tmp_path / "cache", dataset(pairs, 96))
    assert counts == {"images": 8, "prompts": 0}


def test_more_than_the_disk_has_is_refused_before_the_work(tmp_path):
    with pytest.raises(OSError, match=r"about 1000000000.0 GB are needed, .* are free"):
        _require_space(tmp_path / "cache", 10**18)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_folder_that_may_not_be_written(tuner, pairs):
    """It is named; a complete cache may be read-only."""
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(pairs)
        cache = Path(folder, "cache")
        samples = [data[i] for i in range(4)]  # the pairs' own folder is root's
        cached(tuner, cache, samples)
        Path(folder).chmod(0o755)
        counts = encoded(tuner)
        os.seteuid(65534)
        try:
            assert cached(tuner, cache, samples)[0]["prompt"] == "a man" and counts["images"] == 0
            with pytest.raises(
                OSError, match="the cache .*pairs-.* cannot be written .*Permission denied.* another fo"
            ):
                cached(tuner, cache, [{**samples[0], "good": -samples[0]["good"]}])
        finally:
            os.seteuid(0)


def test_a_pair_that_does_not_fit_is_an_error_as_without_cache(tuner, pairs, tmp_path):
    data = dataset(pairs)
    Image.new("L", (80, 80)).save(pairs / "2_mask.png")  # after the pairs were looked at
    for use in (lambda: data[2], lambda: cached(tuner, tmp_path / "cache", data)):
        with pytest.raises(ValueError, match="pair 2: .* must be of one size"):
            use()
    assert len(list((tmp_path / "cache").glob("pairs-*/*/*"))) == 2  # those before it


# ------------------------------------------------------------------------------- several processes


def process(rank, count, wait):
    return SimpleNamespace(
        process_index=rank,
        num_processes=count,
        is_main_process=rank == 0,
        device=torch.device("cpu"),
        wait_for_everyone=wait,
    )


def test_two_processes_share_the_work(tuner, pairs, tmp_path):
    """Each encodes two of the four pairs and two of the four prompts, and reads all of them."""
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def fill(rank):
        counts = encoded(tuner)
        stored = cached(tuner, tmp_path / "cache", dataset(pairs), process(rank, 2, lambda: barrier.wait(600)))
        assert [stored[i]["good_latents"].shape for i in range(4)] == [(4, 8, 8)] * 4
        assert counts == {"images": 4, "prompts": 2}

    assert in_child(lambda: fill(0), lambda: fill(1)) == [0, 0]


def test_processes_without_a_common_disk_have_all_entries(tuner, pairs, tmp_path):
    for rank in (0, 1):
        stored = cached(tuner, tmp_path / str(rank), dataset(pairs), process(rank, 2, lambda: None))
        assert len(entries(tmp_path / str(rank))) == 8 and stored[3]["prompt"] == "two people"


def test_two_runs_may_fill_one_cache_at_once(tuner, pairs, tmp_path):
    def fill():
        stored = cached(tuner, tmp_path / "cache", dataset(pairs))
        collate([stored[i] for i in range(4)])

    assert in_child(fill, fill) == [0, 0]
    counts = encoded(tuner)
    cached(tuner, tmp_path / "cache", dataset(pairs))
    assert counts == {"images": 0, "prompts": 0}


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loading_processes(tuner, pairs, tmp_path, context):
    """They fill and read the cache as one process does."""
    stored = cached(tuner, tmp_path / "cache", dataset(pairs), num_workers=2, batch_size=2)
    loader = DataLoader(stored, 2, num_workers=2, collate_fn=collate, multiprocessing_context=context)
    found = [batch["good_latents"] for batch in loader]
    torch.testing.assert_close(torch.cat(found), torch.stack([stored[i]["good_latents"] for i in range(4)]))
    same(pickle.loads(pickle.dumps(stored))[2], stored[2])


# ------------------------------------------------------------------------------------------ memory


def resident():
    """Return the resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux's")
def test_a_read_cache_takes_no_memory(tmp_path):
    """100 entries of 2 MB, read twice: the process grows by less than a tenth of them."""
    files = [tmp_path / f"{number}.safetensors" for number in range(100)]
    for file in files:
        save_file({"latents": torch.zeros(1_000_000, dtype=torch.float16)}, file)
    stored = CachedDataset([{}] * 100, [(file,) for file in files])
    before = resident()
    assert sum(float(stored[i % 100]["latents"].float().sum()) for i in range(200)) == 0
    assert resident() - before < 20

    # ---- and while they are held, they are pages of the files
    held = [stored[i]["latents"] for i in range(100)]
    assert sum(int(tensor.count_nonzero()) for tensor in held) == 0
    private = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "Anonymous" in line)
    assert resident() - before > 150 and int(private.split()[1]) / 1e3 < before + 20


def test_the_encoders_leave_the_device_and_come_back(tuner):
    """`meta` stands for a GPU: it has places for tensors, without their values."""
    parts = tuner._pipeline
    tuner.to("meta", encoders=False)
    assert tuner.denoiser.device.type == "meta"
    assert parts.vae.device.type == parts.text_encoder.device.type == "cpu"
    assert tuner.pipeline() is parts and parts.vae.device.type == parts.text_encoder.device.type == "meta"


# ------------------------------------------------------------------------------------------- stage 4


def test_stage_4_with_and_without_cache(pairs, tiny_models, tmp_path, caplog):
    """A run may be resumed with a cache, and ends where one without ends; its samples need the VAE again."""
    stage = load_stage("04_guidance_tune")
    settings = {"pairs": str(pairs), "base": str(tiny_models / "sd15"), "train": "lora", "resolution": SIZE}
    settings |= {"num_samples": 1, "sample_steps": 1, "batch_size": 2, "prompt_drop": 0.5, "device": "cpu"}
    caplog.set_level(logging.INFO, "faceprior")
    cache = str(tmp_path / "cache")
    for name, values in {"plain": [{"steps": 2}], "cached": [{"steps": 1}, {"steps": 2, "cache": cache}]}.items():
        for changed in values:
            stage.main(stage.Config(**settings | changed, output=str(tmp_path / name)))
    weights = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("plain", "cached")]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "cached/samples/000_after.png").is_file()
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"{cache}/pairs-") and line.endswith("are free") for line in said)
    assert any(line.startswith(f"{cache} holds ") and line.endswith("may be deleted") for line in said)
