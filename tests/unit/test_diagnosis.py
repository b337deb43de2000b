"""Who is behind a spoilt step: the cheap look at the losses, and the sentence that a user reads."""

import math

import numpy as np
import pytest
import torch

from dstrain.data.sample import Sample
from dstrain.diagnosis import MOST, Suspect, report, suspects
from dstrain.guards import Spikes

NAN = float("nan")


def samples(n):
    return [Sample(f"key{i}", f"/data/{i // 4}.tar", i, i, {}, "") for i in range(n)]


def test_losses_that_are_not_finite_come_alone():
    losses = torch.tensor([1.0, NAN, 900.0, math.inf, 2.0, -math.inf])
    found = suspects(3, samples(6), losses, torch.rand(6))
    assert [(s.rank, s.shard, s.key, s.what) for s in found] == [
        (3, "/data/0.tar", "key1", "loss"),
        (3, "/data/0.tar", "key3", "loss"),
        (3, "/data/1.tar", "key5", "loss"),
    ]
    assert math.isnan(found[0].value)
    assert found[1].value == math.inf


def test_losses_are_compared_with_what_is_usual_at_their_noise():
    losses = torch.tensor([4.0, 4.0, 4.0, 0.5])
    sigmas = torch.tensor([0.1, 0.3, 0.6, 1.0])
    found = suspects(0, samples(4), losses, sigmas, [8.0, 2.0, 0.5, NAN])
    assert [(s.key, s.value) for s in found] == [("key2", 4.0), ("key1", 4.0)]
    assert [s.key for s in suspects(0, samples(4), losses, sigmas)] == ["key0", "key1", "key2", "key3"]
    assert suspects(0, [], torch.zeros(0), torch.zeros(0)) == []


def test_the_usual_is_that_of_the_guard():
    spikes = Spikes(5.0)
    for _ in range(60):
        spikes.judge(np.array([[8.0, 4.0, 2.0, 0.0], [2.0, 2.0, 2.0, 0.0]]))
    assert spikes.usual()[:3] == pytest.approx([4.0, 2.0, 1.0], rel=1e-3)
    losses = torch.tensor([5.0, 5.0, 5.0, 0.9])
    found = suspects(0, samples(4), losses, torch.tensor([0.0, 0.25, 0.5, 0.75]), spikes.usual())
    assert [s.key for s in found] == ["key2", "key1", "key0"]


def test_no_more_are_given_than_can_be_named():
    assert len(suspects(0, samples(30), torch.arange(30.0), torch.rand(30))) == MOST
    assert len(suspects(0, samples(30), torch.full((30,), NAN), torch.rand(30))) == 30, "how many says a lot"


def test_the_sentence_names_samples():
    found = [Suspect(1, "/d/a.tar", "k\x1b[2J", "loss", NAN), Suspect(0, "/d/b.tar", "other", "gradient", math.inf)]
    text = report(12, "the loss is nan", found, 16)
    assert text.startswith(
        "step 12: the loss is nan, on ranks 0, 1, most by the samples 'k\\x1b[2J' of a.tar (loss nan)"
    )
    assert "'other' of b.tar (gradient inf)" in text
    assert "run the same command again" in text
    assert "\x1b" not in text


def test_the_sentence_names_eight_at_most_the_worst_first():
    found = [Suspect(i % 40, "a.tar", f"k{i}", "loss", float(i)) for i in range(50)]
    text = report(1, "a spike", [*found, Suspect(0, "a.tar", "bad", "loss", NAN)], 512)
    assert "samples 'bad' of a.tar (loss nan), 'k49' of a.tar (loss 49), 'k48'" in text
    assert text.count("a.tar") == MOST
    assert "and 43 more" in text
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7, ..., most" in text


def test_the_sentence_for_weights():
    found = [Suspect(r, "", "blocks.0.w", "weight", 3.0) for r in (0, 1)]
    text = report(4, "the loss is nan", [*found, Suspect(0, "a.tar", "k", "loss", NAN)], 1)
    assert "since weights on ranks 0, 1 are not finite: blocks.0.w;" in text
    assert "--resume PATH" in text
    assert "a.tar" not in text


def test_the_sentence_when_it_did_not_come_again():
    text = report(4, "the gradient norm is inf", [], 8)
    assert text.startswith("step 4: the gradient norm is inf, but not when it was computed a second time")
    assert "in doubt" in text


def test_the_sentence_when_it_is_all_of_them():
    found = [Suspect(i % 2, "a.tar", f"k{i}", "gradient", NAN) for i in range(8)]
    assert "for all 8 samples of all ranks" in report(4, "the gradient norm is nan", found, 8)
    assert "'k7'" in report(4, "the gradient norm is nan", found, 16)
    assert "'k0'" in report(4, "the gradient norm is nan", found[:1], 1), "one of one says nothing of the weights"
