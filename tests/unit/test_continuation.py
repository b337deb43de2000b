"""A changed setting, file or version meets its verdict when a checkpoint is continued."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import prepare_run

from dstrain import continuation
from dstrain.config import Recipe, load_recipe
from dstrain.continuation import KEYS, RULES, compare, parse_accepted, record, verdict, versions
from dstrain.engine import checkpoint
from dstrain.engine.ds_config import read_ds_config
from dstrain.errors import CheckpointError, ConfigError
from dstrain.job import Job, prepare
from dstrain.knobs import describe
from dstrain.models.weights import Entry

PATH = Path("run/checkpoints/step-00000002")
ZERO = {f"zero{n}": {"zero_optimization": {"stage": n}} for n in (2, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("run")
    prepare_run(tmp, lora={"rank": 4, "targets": ["attn.to_q"]}, ema={"decay": 0.9})
    for name, config in ZERO.items():
        (tmp / f"{name}.json").write_text(json.dumps(config))
    return tmp


def job_of(folder: Path, *overrides: str, ds: str = "zero2", world_size: int = 2) -> Job:
    path = folder / f"{ds}.json"
    return prepare(load_recipe(folder / "recipe.yaml", overrides), path, read_ds_config(path), world_size)


@pytest.fixture(scope="module")
def saved(folder) -> dict[str, Any]:
    """The manifest of the run as it was, out of JSON."""
    return json.loads(json.dumps({**record(job_of(folder), 2), "step": 2, "format": 2, "files": {}}))


@pytest.fixture
def now(saved) -> dict[str, Any]:
    """The record of the same run today, to be changed."""
    return json.loads(json.dumps({k: v for k, v in saved.items() if k not in ("step", "format", "files")}))


def refusal(saved: dict, now: dict, *accepted: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        compare(saved, now, accepted, PATH)
    return str(caught.value)


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, "another"]
    return {**value, "another": "one"} if isinstance(value, dict) else value + "-another"


def at(tree: dict, key: str) -> tuple[dict, str]:
    """The section that holds a dotted key, and its name there."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    return tree, name


# --- the table


def test_every_key_is_in_one_class_and_every_pattern_has_a_key():
    for key, _, _ in describe(Recipe):
        assert verdict(key) in RULES  # it asserts that there is exactly one
    unused = [p for ps in RULES.values() for p in ps if not any(continuation.fnmatchcase(k, p) for k in KEYS)]
    assert not unused


def test_a_new_key_without_a_class_is_noticed():
    with pytest.raises(AssertionError, match=r"optimizer\.nesterov is in 0 classes"):
        verdict("optimizer.nesterov")


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_meets_the_verdict_of_its_class(saved, now, key):
    section, name = at(now["recipe"], key)
    section[name] = changed(section[name])
    if verdict(key) == "may":
        [line] = compare(saved, now, (), PATH)
        assert line.startswith(f"changed since the checkpoint: {key} was ")
        return
    text = refusal(saved, now)
    assert f"{key} was " in text
    assert str(PATH) in text
    if verdict(key) == "refused":
        assert refusal(saved, now, key) == text, "consent does not help"
        assert "--accept" not in text
    else:
        assert f"--accept {key}" in text
        [line] = compare(saved, now, {key}, PATH)
        assert line.startswith(f"accepted since the checkpoint: {key} was ")


# --- the verdicts on real runs: what is meant by the table, written down once more

MAY = (
    "run_dir={tmp}/elsewhere", "tracking.project=other", "tracking.name=n", "sample.steps=3", "guard.spikes=off",
    "train.steps=9", "train.save_every=1", "train.keep_checkpoints=3", "train.export=false", "train.max_minutes=5",
    "optimizer.lr=0.5", "optimizer.weight_decay=0", "optimizer.schedule=cosine", "optimizer.warmup_steps=0",
    "model.activations=[none,full]", "model.encoders=offload", "batch.tokens_per_pack=96", "objective.kernel=reference",
    "data.workers=0", "data.bad_samples=error", "data.max_bad_samples=1", "lora.init=gaussian", "ema.device=cpu",
    "data.shards=[{tmp}/shards/*.tar]",
)  # fmt: skip
CONSENT = (
    "objective.mu=1", "objective.density=logit_normal", "objective.weighting=none", "optimizer.betas=[0.9,0.99]",
    "optimizer.eps=1e-5", "data.max_pixels=2048", "data.crop=random", "data.flip=0.5", "data.caption_dropout=0",
    "data.shuffle_tags=true", "model.gelu=sigmoid", "model.encoder_dtype=bf16", "lora.dropout=0.1", "ema.decay=0",
    "data.background=grey",
)  # fmt: skip
REFUSED = (
    "seed=6", "batch.global_batch_size=16", "data.shuffle_window=7", "lora.rank=2", "lora.alpha=2", "lora.rslora=true",
    "lora.dora=true", "lora.targets=[attn.to_k]", "optimizer.name=adamw_8bit", "model.init=random",
    "data.max_pixels=1024",  # with which some of the pictures are left out
    "data.shards=[{tmp}/shards/*0.tar]", "data.min_pixels=2000", "data.sources={{a: {{shards: [{tmp}/shards]}}}}",
)  # fmt: skip


@pytest.mark.parametrize("override", MAY)
def test_what_may_change(folder, saved, override):
    found = compare(saved, record(job_of(folder, override.format(tmp=folder)), 2), (), PATH)
    assert len(found) == 1
    assert override.partition("=")[0] in found[0]


@pytest.mark.parametrize("override", CONSENT)
def test_what_needs_consent(folder, saved, override):
    key, mine = override.partition("=")[0], record(job_of(folder, override), 2)
    text = refusal(saved, mine)
    assert "needs consent" in text
    assert "refused" not in text
    assert f"or pass --accept {key}" in text.replace("back, pass", "back, or pass")
    assert compare(saved, mine, parse_accepted(key), PATH)


@pytest.mark.parametrize("override", REFUSED[:-1])
def test_what_is_refused(folder, saved, override):
    text = refusal(saved, record(job_of(folder, override.format(tmp=folder)), 2), *KEYS)
    assert "refused: " in text
    assert "choose another run_dir" in text


def test_the_same_samples_by_another_name_are_the_same(folder, saved):
    recipe = load_recipe(folder / "recipe.yaml", ["data.shards=[]", REFUSED[-1].format(tmp=folder)])
    job = prepare(recipe, folder / "zero2.json", ZERO["zero2"], 2)
    assert {line.split()[4] for line in compare(saved, record(job, 2), (), PATH)} == {"data.shards", "data.sources"}


@pytest.mark.parametrize(("ds", "ranks"), [("zero3", 2), ("zero2", 1), ("zero3", 4)])
def test_another_ds_config_and_world_size_may(folder, saved, ds, ranks):
    lines = compare(saved, record(job_of(folder, ds=ds, world_size=ranks), ranks), (), PATH)
    assert any("ds_config zero_optimization.stage was 2, is 3" in line for line in lines) == (ds == "zero3")
    assert any(f"world size was 2, is {ranks}" in line for line in lines) == (ranks != 2)


def test_another_precision_is_refused(folder, saved):
    (folder / "bf16.json").write_text(json.dumps({**ZERO["zero2"], "bf16": {"enabled": True}}))
    text = refusal(saved, record(job_of(folder, ds="bf16"), 2), *KEYS)
    assert "dtype was 'torch.float32', is 'torch.bfloat16'" in text


def test_nothing_has_changed(folder, saved):
    assert compare(saved, record(job_of(folder), 2), (), PATH) == []
    assert compare(saved, record(job_of(folder), 2), ("objective.mu",), PATH) == [], "consent for nothing is no harm"


# --- what a comparison bears


def test_all_changes_stand_in_one_message(saved, now):
    now["seed"] = 0
    now["recipe"]["seed"], now["recipe"]["lora"]["alpha"] = 6, 3.0
    now["recipe"]["objective"]["mu"], now["recipe"]["ema"]["decay"] = 1.0, 0.5
    now["data"] = "ab" * 32
    text = refusal(saved, now, "ema.decay")
    for part in ("seed was 5, is 6", "lora.alpha was 0.0, is 3.0", "objective.mu was 0.8, is 1.0"):
        assert part in text
    assert f"data was {saved['data'][:12]}, is abababababab;" in text or "is abababababab" in text
    assert "abab" * 4 not in text
    assert "accepted: ema.decay was" in text, "it may be the cause of another"
    assert "--accept" not in text, "it would not help"


def test_what_an_older_checkpoint_lacks_is_no_change(saved, now):
    assert compare({"step": 2, "format": 2, "files": {}}, now, (), PATH) == []
    older = json.loads(json.dumps(saved))
    del older["recipe"]["guard"], older["recipe"]["train"]["max_minutes"], older["vae"], older["versions"]
    older["recipe"]["train"]["gone"] = 1
    assert compare(older, now, (), PATH) == []


def test_tuples_and_whole_numbers_are_what_json_makes_of_them(saved, now):
    now["recipe"]["optimizer"]["betas"] = tuple(now["recipe"]["optimizer"]["betas"])
    now["recipe"]["lora"]["alpha"] = 0
    assert compare(saved, now, (), PATH) == []
    now["recipe"]["lora"]["rslora"] = 0
    assert "lora.rslora was False, is 0" in refusal(saved, now)


@pytest.mark.parametrize("name", [*continuation.PACKAGES, "dstrain", "python", "commit"])
def test_another_version_may_and_is_said(saved, now, name):
    now["versions"][name] = "9.9"
    [line] = compare(saved, now, (), PATH)
    assert f"versions {name} was {saved['versions'][name]!r}, is '9.9'" in line


@pytest.mark.parametrize("section", ["recipe", "ds_config", "versions"])
@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_a_manifest_that_is_none_is_refused_by_name(saved, now, section, value):
    assert f"{PATH}: {section} of its manifest" in refusal({**saved, section: value}, now)


def test_long_values_are_cut(saved, now):
    now["recipe"]["lora"]["targets"] = [f"layer.{i}" for i in range(1000)]
    assert len(refusal(saved, now)) < 600


# --- secrets


def test_masked_values_are_no_change_and_never_shown(folder, monkeypatch):
    secret = "planted-secret-value"
    prompts = f"sample.prompts=[a cat with {secret}, 'https://me:{secret}@host/x?token={secret}']"
    monkeypatch.setenv("SOME_TOKEN", secret)
    masked = json.loads(json.dumps(record(job_of(folder, prompts), 2)))
    assert secret not in json.dumps(masked)
    assert compare(masked, record(job_of(folder, prompts), 2), (), PATH) == []
    monkeypatch.delenv("SOME_TOKEN")
    plain = record(job_of(folder, prompts), 2)
    assert secret in json.dumps(plain), "nothing tells that it is one in the first prompt"
    assert compare(masked, plain, (), PATH) == []
    assert compare(json.loads(json.dumps(plain)), masked, (), PATH) == []
    other = record(job_of(folder, prompts.replace("cat", "dog")), 2)
    assert len(compare(masked, other, (), PATH)) == 1
    monkeypatch.setenv("SOME_TOKEN", secret)
    [line] = compare(json.loads(json.dumps(plain)), record(job_of(folder, "sample.prompts=[a dog]"), 2), (), PATH)
    assert secret not in line, "an older checkpoint that holds it does not bring it into the log"


def test_many_masks_take_no_time(saved, now):
    saved = json.loads(json.dumps(saved))
    saved["recipe"]["tracking"]["name"] = "a***" * 3000 + "b"
    now["recipe"]["tracking"]["name"] = "a" * 3000
    assert len(compare(saved, now, (), PATH)) == 1


# --- consent on the command line


def test_keys_of_consent_are_read():
    assert parse_accepted("") == frozenset()
    assert parse_accepted(" objective.mu,ema.decay, ") == {"objective.mu", "ema.decay"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("objective.mue", "did you mean 'objective.mu'?"),
        ("ema.decay,objectiv.mu", "did you mean 'objective.mu'?"),
        ("objective", "no key of a recipe"),
        ("objective.*", "no key of a recipe"),
        ("seed", "cannot change within a run"),
        ("lora.rank", "cannot change within a run"),
        ("train.steps", "may change without consent"),
        ("data", "no key of a recipe"),
    ],
)
def test_consent_that_makes_no_sense_is_refused(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_accepted(text)
    assert says in str(caught.value)


# --- tokenizer, VAE, text encoder: files that change behind an unchanged recipe


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swap_tokens(model: Path) -> None:
    path = model / "tokenizer/tokenizer.json"
    tree = json.loads(path.read_text())
    vocab = tree["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(tree))


def swap_merges(model: Path) -> None:
    path = model / "tokenizer/tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["merges"][-2:] = tree["model"]["merges"][:-3:-1]
    path.write_text(json.dumps(tree))


def flip_bit(part: str):
    def change(model: Path) -> None:
        path = next((model / part).glob("*.safetensors"))
        tensors = load_file(path)
        name = sorted(n for n in tensors if not n.startswith(("visual", "lm_head", "model.visual")))[0]
        values = tensors[name].contiguous()
        values.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        save_file({**tensors, name: values}, path, {"format": "pt"})

    return change


OTHERS = {
    "one token swapped": ("tokenizer", swap_tokens),
    "merges changed": ("tokenizer", swap_merges),
    "template added": ("tokenizer", lambda m: (m / "tokenizer/chat_template.jinja").write_text("{{ messages }}")),
    "template changed": (
        "tokenizer",
        lambda m: edit_json(m / "tokenizer/tokenizer_config.json", chat_template="{{ messages }}"),
    ),
    "pad side": ("tokenizer", lambda m: edit_json(m / "tokenizer/tokenizer_config.json", padding_side="left")),
    "VAE shift": ("vae", lambda m: edit_json(m / "vae/config.json", latents_mean=[0.5] * 16)),
    "VAE scale": ("vae", lambda m: edit_json(m / "vae/config.json", latents_std=[2.5] * 16)),
    "VAE weights, one bit": ("vae", flip_bit("vae")),
    "text encoder, one bit": ("text_encoder", flip_bit("text_encoder")),
    "text encoder's config": ("text_encoder", lambda m: edit_json(m / "text_encoder/config.json", rms_norm_eps=1e-4)),
    "base weights, one bit": ("base", flip_bit("transformer")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_component_is_refused_with_both_digests(folder, saved, tmp_path, what):
    fact, change = OTHERS[what]
    shutil.copytree(folder / "model", tmp_path / "model")
    change(tmp_path / "model")
    mine = record(job_of(folder, f"model.path={tmp_path / 'model'}"), 2)
    text = refusal(saved, mine, *KEYS)
    assert f"{fact} was " in text
    assert saved[fact][:12] in text
    assert mine[fact][:12] in text
    assert text.count(" was ") == 1, "nothing else has changed"


def test_a_component_moved_is_the_same_and_the_scheduler_is_for_pictures_only(folder, saved, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    edit_json(tmp_path / "model/scheduler/scheduler_config.json", shift_terminal=0.05)
    (tmp_path / "model/tokenizer/README.md").write_text("of no account")
    edit_json(tmp_path / "model/text_encoder/config.json", transformers_version="99", _name_or_path="elsewhere")
    [line] = compare(saved, record(job_of(folder, f"model.path={tmp_path / 'model'}"), 2), (), PATH)
    assert "model.path was " in line


def test_facts_read_little_of_the_weights_and_once(folder, monkeypatch):
    job = job_of(folder)
    read = []
    original = Entry.read

    def counting(self, start=0, stop=None):
        values = original(self, start, stop)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(Entry, "read", counting)
    first = job.facts
    tensors = len(read)
    assert tensors > 50
    assert max(read) <= 64
    assert job.facts is first
    assert len(read) == tensors


# --- versions, and a job's own check


def test_versions_name_what_computes():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["deepspeed"]
    assert set(found) == {"dstrain", "python", "commit", *continuation.PACKAGES}


def test_a_package_that_is_absent_has_no_version(monkeypatch):
    monkeypatch.setattr(continuation, "PACKAGES", ("no-such-package-here",))
    assert versions.__wrapped__()["no-such-package-here"] == ""


def test_the_commit_is_that_of_the_code_itself(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)

    def git(*args: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        run = subprocess.run(["git", *identity, *args], cwd=tmp_path, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    assert continuation._commit(package) == ""
    git("init", "-q")
    (package / "a.py").write_text("")
    assert continuation._commit(package) == "", "installed into a checkout of something else"
    git("add", "."), git("commit", "-qm", "a")
    first = git("rev-parse", "HEAD")
    (tmp_path / "README").write_text("")
    git("add", "."), git("commit", "-qm", "b")
    assert continuation._commit(package) == first
    monkeypatch.setenv("PATH", str(tmp_path))
    assert continuation._commit(package) == "", "no git"


def test_a_job_is_checked_against_the_newest_checkpoint(folder, saved, tmp_path):
    job = job_of(folder, f"run_dir={tmp_path}")
    assert job.check_continuation() == []
    newest = tmp_path / "checkpoints/step-00000002"
    newest.mkdir(parents=True)
    (newest / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.sealed(saved)))
    [line] = job.check_continuation()
    assert "run_dir was " in line
    other = job_of(folder, f"run_dir={tmp_path}", "objective.mu=1", "train.steps=7")
    with pytest.raises(CheckpointError, match=r"needs consent: objective\.mu was 0\.8, is 1\.0"):
        other.check_continuation()
    assert len(other.check_continuation(parse_accepted("objective.mu"))) == 3
