"""Secrets are masked in trees, in texts, in log lines and tracebacks, and nothing of ours is."""

import io
import json
import logging
import subprocess
import sys
import threading
from urllib.parse import quote

import pytest

from dstrain.config import Recipe, to_dict
from dstrain.engine.ds_schema import SCHEMA
from dstrain.knobs import build, describe, flat
from dstrain.tracking.redact import MASK, mask_output, redact, redact_text

VALUES = {  # planted under a name, and what must never be seen of it
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLz",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEJr==planted",
    "DB_PASSWORD": 'p@ss "quoted" \\ word',
    "PGPASSWORD": "correct-horse-battery",
    "clientSecret": "planted-client-secret",
    "SSH_PRIVATE_KEY": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n-----END",
    "GITHUB_CREDENTIALS": "me:planted-credential",
}
TEXTS = {  # a text with a secret § in it, and what is left of the text
    "fetching https://me:§@host/a.tar": "fetching https://***@host/a.tar",
    "https://me:§@x@host/a": "https://***@host/a",
    "s3 https://b/a.tar?X-Amz-Signature=§&X-Amz-Date=1": "s3 https://b/a.tar?X-Amz-Signature=***&X-Amz-Date=1",
    "https://b/a?X-Amz-Date=1&X-Amz-Credential=§": "https://b/a?X-Amz-Date=1&X-Amz-Credential=***",
    "https://b/a?X-Goog-Signature=§": "https://b/a?X-Goog-Signature=***",
    "https://b/a?sv=2020&sig=§&se=1": "https://b/a?sv=2020&sig=***&se=1",
    "https://b/a?token=§#top": "https://b/a?token=***#top",
    "'https://b/a?api_key=§'": "'https://b/a?api_key=***'",
    "Config(api_key='§', lr=0.1)": "Config(api_key='***', lr=0.1)",
    '{"password": "§", "lr": 1}': '{"password": "***", "lr": 1}',
    "access_token: §": "access_token: ***",
    "MY_SERVICE_KEY=§ python": "MY_SERVICE_KEY=*** python",
    "Authorization: Bearer §": "Authorization: Bearer ***",
}


def recipe(**sections: object) -> Recipe:
    tree = {
        "run_dir": "runs/keys/token",
        "model": {"path": "Qwen/Qwen-Image", "components": {"tokenizer": "org/tokenizer-key"}},
        "data": {"sources": {"key": {"shards": ["s3://bucket/keys/{000..012}.tar"]}}},
        "batch": {"global_batch_size": 8},
        "train": {"steps": 4},
    }
    return build(Recipe, {**tree, **sections}, "test")


def seen(text: str, secret: str) -> bool:
    return any(form in text for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""), repr(secret)[1:-1]))


@pytest.mark.parametrize("name", VALUES)
def test_a_planted_secret_is_masked_under_its_name_and_inside_texts(name):
    secret = VALUES[name]
    config = {
        name: secret,
        "list": [f"a {secret} b", {name.lower(): secret}],
        "url": f"https://host/{quote(secret, safe='')}/x",
        "nested": {"note": f"sent with {secret}.", "json": json.dumps({"x": secret})},
    }
    clean = redact(config, {name: secret})
    assert not seen(json.dumps(clean), secret)
    assert clean["list"][0] == "a *** b"
    assert clean["nested"]["note"] == "sent with ***."
    assert redact_text(f"a {secret} b", {name: secret}) == "a *** b"


@pytest.mark.parametrize("name", VALUES)
def test_a_secret_is_masked_by_its_key_alone(name):
    assert redact({"a": [{name: VALUES[name]}]}, {}) == {"a": [{name: MASK}]}


@pytest.mark.parametrize("text", TEXTS)
def test_what_only_a_text_shows_to_be_secret(text):
    assert redact_text(text.replace("§", "s1e2c3r4e5t6a7b8"), {}) == TEXTS[text]


@pytest.mark.parametrize(
    "text",
    [
        "step 12: loss 0.3, 4096 tokens, sample key: 000012",
        "data.keep_tags was 1, is 2; batch.tokens_per_pack was 64, is 32",
        "unknown key 'trian.steps', did you mean 'train.steps'?",
        "s3://bucket/data/{000..012}.tar and https://host/a.tar?part=3&of=4",
        "git@github.com:me/repo.git at 0123456789abcdef0123456789abcdef01234567",
        "tokenizer was 'a1b2c3d4e5f6', is 'b1b2c3d4e5f6'",
        "Basic checks passed; the bearer of bad news",
    ],
)
def test_other_texts_stay(text):
    assert redact_text(text, {"HOME": "/root", "TOKENIZERS_PARALLELISM": "unknown key", "X_KEY": "short"}) == text


def test_where_a_secret_lies_is_none():
    places = {"GOOGLE_CREDENTIALS_FILE": "/data/run/x", "SSH_KEY_PATH": "/data/run/x", "TOKEN_DIR": "/data/run/x"}
    assert redact({"run_dir": "/data/run/x/1"}, places) == {"run_dir": "/data/run/x/1"}


def test_no_key_of_a_recipe_is_taken_for_a_secret():
    keys = [key for key, _, _ in describe(Recipe)]
    planted = flat(redact({key: f"value of {number}" for number, key in enumerate(keys)}, {}))
    assert [key for key in keys if planted[key] == MASK] == ["batch.tokens_per_pack"], "a number, which stays one:"
    tree = to_dict(recipe())
    assert json.dumps(redact({k: v for k, v in tree.items() if k != "data"}, {})) == json.dumps(
        {k: v for k, v in tree.items() if k != "data"}
    )
    data = {k: v for k, v in tree["data"].items() if k != "sources"}
    assert redact(data, {}) == data


def test_no_key_of_a_ds_config_is_taken_for_a_secret_but_those_of_a_service():
    def names(schema, prefix=""):
        for key, value in schema.items():
            yield from names(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    found = {name for name in names(SCHEMA) if redact({name: "x"}, {}) == {name: MASK}}
    assert found == {"comet.api_key", "comet.experiment_key"}


# --- log lines


@pytest.fixture
def logged():
    """A logger with a handler of its own, as libraries have; gives the logger and what it wrote."""
    factory, hook, thread_hook = logging.getLogRecordFactory(), sys.excepthook, threading.excepthook
    out = io.StringIO()
    logger = logging.Logger("library")
    logger.addHandler(logging.StreamHandler(out))
    mask_output()
    yield logger, out
    logging.setLogRecordFactory(factory)
    sys.excepthook, threading.excepthook = hook, thread_hook


@pytest.mark.parametrize("name", VALUES)
def test_log_lines_and_tracebacks_are_masked(logged, monkeypatch, name):
    logger, out = logged
    secret = VALUES[name]
    monkeypatch.setenv(name, secret)
    logger.warning("plain %s", secret)
    logger.warning(f"ready-made {secret}")
    logger.warning("%(a)s", {"a": secret})
    logger.warning("does not fit %d", secret)
    logger.warning("%s", ValueError(f"bad {secret}"))
    logger.warning("stack", stack_info=True)
    try:
        try:
            raise ValueError(f"inner {secret}")
        except ValueError as e:
            raise RuntimeError(f"outer {secret!r}") from e
    except RuntimeError:
        logger.exception("failed with %s", secret)
    text = out.getvalue()
    assert not seen(text, secret)
    assert "plain ***" in text
    assert "does not fit %d" in text
    assert "ValueError: inner ***" in text
    assert "RuntimeError: outer" in text
    assert "Stack (most recent call last)" in text


@pytest.mark.parametrize("where", ["main", "thread"])
def test_the_traceback_that_ends_a_process_or_a_thread_is_masked(where):
    code = (
        "import os, sys, threading\nfrom dstrain.tracking.redact import mask_output\nmask_output()\n"
        "def fail(): raise OSError('no access with ' + os.environ['HF_TOKEN'])\n"
        "fail() if sys.argv[1] == 'main' else threading.Thread(target=fail).start()"
    )
    env = {"HF_TOKEN": "planted-in-the-environment", "PATH": "/usr/bin"}
    run = subprocess.run([sys.executable, "-c", code, where], env=env, capture_output=True, text=True, timeout=60)
    assert "OSError: no access with ***" in run.stderr
    assert "planted" not in run.stdout + run.stderr
    assert run.returncode == (1 if where == "main" else 0)
