"""Encoded samples kept in memory: the same as encoding, once a sample."""

import pytest
import torch
from tiny_models import tiny_model_folder

from dstrain.pipelines import PIPELINES
from dstrain.pipelines.cache import EncodedCache

ENCODERS = ("vae", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"))
    family = PIPELINES.get("qwen_image")
    return family.from_pretrained(folder, dtype=torch.float32, load=ENCODERS, caption_dropout=0.5, seed=1)


def batch(rows, draws):
    return {
        "image": [torch.full((3, 16 * (1 + r % 2), 32), 20 * r, dtype=torch.uint8) for r in rows],
        "prompt": [f"cat {r}" for r in rows],
        "draw": draws,
    }


@pytest.mark.parametrize("limit", [0, 6_000, 1 << 30])
def test_same_as_encoding(pipeline, limit, monkeypatch):
    cache = EncodedCache(pipeline, limit)
    encoded = 0
    encode = pipeline.vae.encode

    def counted(x):
        nonlocal encoded
        encoded += 1
        return encode(x)

    for rows, draws in (([0, 1, 2], [0, 1, 2]), ([2, 3, 0], [3, 4, 5]), ([3, 3], [6, 7])):
        want = pipeline.encode(batch(rows, draws))
        monkeypatch.setattr(pipeline.vae, "encode", counted)
        got = cache.encode(rows, batch(rows, draws))
        monkeypatch.undo()
        assert got.keys() == want.keys()
        for key, values in want.items():
            for a, b in zip(got[key], values, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key
    if limit == 0:
        assert encoded == 8
    elif limit > 1 << 20:
        assert encoded == 4  # rows 0 to 3, each once
    else:
        assert 4 < encoded < 8  # full after some


def test_dropout_is_drawn_anew_for_a_kept_sample(pipeline):
    cache = EncodedCache(pipeline, 1 << 30)
    lengths = {len(cache.encode([0], batch([0], [d]))["condition_embeds"][0]) for d in range(20)}
    assert len(lengths) == 2  # with its prompt, and without
