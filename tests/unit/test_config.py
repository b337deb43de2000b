"""The recipe: what YAML and the command line may say."""

import pytest
import yaml

from dstrain.config import Recipe, build, describe, load_recipe, to_dict
from dstrain.engine.lr import learning_rate
from dstrain.errors import ConfigError

LEAST = {
    "run_dir": "runs/x",
    "model": {"path": "m"},
    "data": {"shards": ["s"]},
    "batch": {"global_batch_size": 4},
    "train": {"steps": 10},
}


def recipe(**sections):
    return build(Recipe, {**LEAST, **sections}, "recipe.yaml")


def test_defaults_and_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    r = load_recipe(path, ["optimizer.lr=1e-4", "data.shards=[a, b]", "tracking.wandb=off", "model.components.vae=x:y"])
    assert r.optimizer.lr == 1e-4  # YAML 1.1 alone would make it a string
    assert r.data.shards == ["a", "b"]
    assert r.tracking.wandb == "off"  # YAML alone would make it False
    assert r.model.components == {"vae": "x:y"}
    assert r.objective.mu == 0.8
    assert build(Recipe, to_dict(r), "again") == r


def test_one_shard_need_not_be_a_list():
    assert recipe(data={"shards": "folder"}).data.shards == ["folder"]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"sede": 1}, "did you mean 'seed'"),
        ({"seed": True}, "whole number"),
        ({"seed": -1}, "between 0 and"),
        ({"model": {"path": ""}}, "empty"),
        ({"model": {}}, "model.path must be given"),
        ({"model": "m"}, "must be a mapping"),
        ({"data": {"shards": []}}, "list"),
        ({"data": {"shards": ["s"], "caption_dropout": 1.5}}, "between 0 and 1"),
        ({"model": {"path": "m", "components": ["vae"]}}, "mapping"),
        ({"train": {"steps": 10, "keep_checkpoints": 1}}, "at least 2"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas"),
    ],
)
def test_refusals_name_the_key(sections, says):
    with pytest.raises(ConfigError, match=says):
        recipe(**sections)


def test_every_knob_is_described():
    rows = describe()
    assert len(rows) == len({key for key, *_ in rows})
    assert all(about for *_, about in rows)
    assert len(rows) > 40


def test_every_one_letter_slip_of_a_section_is_named():
    for key in LEAST:
        for i in range(len(key)):
            slip = key[:i] + key[i + 1 :]
            if slip not in LEAST:
                with pytest.raises(ConfigError, match=f"did you mean '{key}'"):
                    build(Recipe, {**{k: v for k, v in LEAST.items() if k != key}, slip: LEAST[key]}, "r")


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_learning_rate(decay):
    o = recipe(optimizer={"lr": 1.0, "warmup_steps": 4, "decay": decay, "min_lr_ratio": 0.1}).optimizer
    rates = [learning_rate(o, s, 10) for s in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(1.0 if decay == "constant" else 0.1)
    if decay == "cosine":
        assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
