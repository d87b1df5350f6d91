"""Kept outputs of frozen layers: made once, gone on with, and never stale."""

import pytest
import torch
from safetensors.torch import load_file
from test_scorer import make_scorer

from faceprior.prefix_cache import PrefixCache, prefix_key


class Crops:
    """Six pairs of crops as the scorer takes them."""

    def __init__(self):
        self.names = [f"pair {i}" for i in range(6)]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {side: torch.randn(3, 32, 32, generator=generator) for side in ("good", "bad")}

    def name(self, index):
        return self.names[index]


class Encoder:
    """The scorer's frozen layers; counts the crops, and may fail after some."""

    def __init__(self, scorer, last=100):
        self.scorer, self.count, self.last = scorer, 0, last

    def __call__(self, pixel_values):
        if self.count >= self.last:
            raise KeyboardInterrupt
        self.count += len(pixel_values)
        return self.scorer.encode_prefix(pixel_values)


@pytest.fixture(scope="module")
def scorer():
    model = make_scorer()
    model.freeze(0.7)
    return model


def as_it_is(sample):
    return sample


def filled(folder, scorer, crops=None, key="key", **options):
    cache, encoder = PrefixCache(crops or Crops(), key, folder), Encoder(scorer, **options)
    cache.fill(as_it_is, encoder, batch_size=2)
    return cache, encoder


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_every_crop_is_encoded_once(scorer, tmp_path, where):
    folder = None if where == "memory" else tmp_path
    cache, encoder = filled(folder, scorer)
    assert len(cache) == 6 and encoder.count == 12
    for index in range(6):
        for side, pixels in Crops()[index].items():
            torch.testing.assert_close(cache[index][side], scorer.encode_prefix(pixels[None])[0])
    cache.fill(as_it_is, encoder, batch_size=2)
    assert encoder.count == 12
    assert filled(folder, scorer)[1].count == (12 if where == "memory" else 0)  # another run


def test_a_killed_run_goes_on_where_it_was(scorer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, scorer, last=8)
    cache, encoder = filled(tmp_path, scorer)
    assert encoder.count == 4
    again = PrefixCache(Crops(), "key", tmp_path)
    assert torch.equal(again[5]["bad"], cache[5]["bad"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_processes_share_the_work_in_a_folder(scorer, tmp_path):
    """Three pairs each, whoever starts first; without a folder nothing is shared, so each makes all."""
    for folder, counts in ((tmp_path, (6, 6, 0)), (None, (12, 12, 12))):
        for rank, count in enumerate(counts):
            encoder = Encoder(scorer)
            PrefixCache(Crops(), "key", folder).fill(as_it_is, encoder, 2, share=(rank % 2, 2))
            assert encoder.count == count


def test_changed_files_and_weights_are_encoded_anew(scorer, tmp_path):
    filled(tmp_path, scorer)
    crops = Crops()
    crops.names[2] = "pair 2, written later"
    assert filled(tmp_path, scorer, crops)[1].count == 2
    assert filled(tmp_path, scorer, crops, key="other weights")[1].count == 12


def test_a_damaged_file_is_named(scorer, tmp_path):
    cache, _ = filled(tmp_path, scorer)
    path = sorted(tmp_path.rglob("*.safetensors"))[0]
    assert load_file(path).keys() == {"good", "bad"}
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged.*delete it"):
        [cache[index] for index in range(6)]


def test_the_key_tells_what_a_prefix_depends_on():
    """Frozen weights, their number, the sizes, the preprocessing and the dtype count; trained weights do not."""
    scorer, keys = make_scorer(), []

    def key(dtype=torch.float32):
        return prefix_key(scorer, dtype)

    scorer.freeze(0.7)
    keys += [key(), key(torch.bfloat16)]
    torch.nn.init.ones_(scorer.mlp[7].bias)
    torch.nn.init.ones_(scorer.vision_model.encoder.layers[2].mlp.fc2.bias)
    assert key() == keys[0]
    scorer.freeze(0.4)
    keys.append(key())
    scorer.freeze(0.7)
    torch.nn.init.ones_(scorer.vision_model.encoder.layers[1].mlp.fc2.bias)
    keys.append(key())
    keys.append(prefix_key(scorer.bfloat16(), torch.float32))
    assert len(set(keys)) == len(keys)


def test_the_key_tells_another_preprocessing(monkeypatch):
    scorer = make_scorer()
    scorer.freeze(0.7)
    key, preprocess = prefix_key(scorer, torch.float32), scorer.preprocess
    monkeypatch.setattr(scorer, "preprocess", lambda picture: preprocess(picture) + 1e-6)
    assert prefix_key(scorer, torch.float32) != key
