"""The recipe: what YAML and the command line may say."""

import pytest
import yaml

from dstrain.config import Recipe, load_recipe, to_dict
from dstrain.engine.lr import lr_factor
from dstrain.errors import ConfigError
from dstrain.knobs import build, describe

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


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("train", "lr", "optimizer.lr"),
        (None, "lr", "optimizer.lr"),
        ("model", "rank", "lora.rank"),
        ("train", "stepz", "steps"),
        ("train", "max_pixel", "data.max_pixels"),
        ("data", "global_batch_sizes", "batch.global_batch_size"),
    ],
)
def test_a_key_in_the_wrong_section_is_found_in_the_right_one(section, key, meant):
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in LEAST.items()}
    (tree[section] if section else tree)[key] = 1
    with pytest.raises(ConfigError, match=f"unknown key .*did you mean '{meant}'"):
        build(Recipe, tree, "recipe.yaml")


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
        ({"data": {"shards": []}}, "data.shards"),
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
    rows = describe(Recipe)
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


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_learning_rate(schedule):
    settings = {"lr": 1.0, "warmup_steps": 4, "schedule": schedule, "min_lr_ratio": 0.1, "decay_steps": 3}
    o = recipe(optimizer=settings).optimizer
    factors = [lr_factor(o, s, 10) for s in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert lr_factor(o, 10, 10) == pytest.approx(1.0 if schedule == "constant" else 0.1)  # the step after the last
    assert factors[-1] > 0.1
    if schedule == "cosine":
        assert factors[7] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    if schedule == "wsd":
        assert factors[3:8] == [1.0] * 5
        assert factors[8:] == pytest.approx([0.7, 0.4])


def test_a_decay_longer_than_the_run_starts_after_the_warm_up():
    o = recipe(optimizer={"warmup_steps": 2, "schedule": "wsd", "decay_steps": 100}).optimizer
    assert [lr_factor(o, s, 6) for s in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert lr_factor(recipe().optimizer, 0, 1) == 1.0  # a run of one step trains


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"model": {"path": "x", "activations": "ful"}}, "did you mean 'full'"),
        ({"model": {"path": "x", "activations": ["full", 3]}}, "model.activations"),
        ({"lora": {"alpha": 4}}, "lora.rank is 0"),
        ({"lora": {"rank": 4, "dora": True, "base": "nf4"}}, "lora.dora"),
        ({"lora": {"rank": 4}, "train": {"steps": 1, "parameters": ["img_in.*"]}}, "exclude each other"),
        ({"optimizer": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        ({"ema": {"decay": 1.0}}, "ema.decay"),
    ],
)
def test_settings_that_do_not_go_together(tree, says):
    with pytest.raises(ConfigError, match=says):
        build(Recipe, {**LEAST, **tree}, "r")


def test_what_was_written_down_is_known(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "optimizer": {"lr": 1e-5}}))
    assert {"optimizer.lr", "optimizer.eps"} & load_recipe(path).stated == {"optimizer.lr"}
    assert "optimizer.eps" in load_recipe(path, ["optimizer.eps=1e-8"]).stated
