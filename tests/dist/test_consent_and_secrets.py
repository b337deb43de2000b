"""Real launches: a changed setting that needs consent, and secrets that must be found nowhere."""

from pathlib import Path
from urllib.parse import quote

import pytest
from launches import launch
from small_runs import metrics, prepare_run

PLANTED = {
    "HF_TOKEN": "hf_PLANTEDabcdefghijklmnop",
    "WANDB_API_KEY": "PLANTED0123456789abcdef0123456789abcdef0",
    "AWS_SECRET_ACCESS_KEY": "PLANTED/K7MDENG+bPxRfiCYEXAMPLE",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED7EXAMPLE0",
    "AWS_SESSION_TOKEN": "PLANTED-session==",
    "DB_PASSWORD": 'PLANTED@ss "quoted"',
    "GITHUB_TOKEN": "ghp_PLANTEDabcdefghijklmnopqrst",
    "CLIENT_SECRET": "PLANTED-client-secret",
    "SERVICE_CREDENTIALS": "me:PLANTED-credential",
    "MY_PRIVATE_KEY": "-----BEGIN PRIVATE KEY-----\\nPLANTEDb3BlbnNzaC1rZXk\\n-----END PRIVATE KEY-----",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return prepare_run(tmp_path_factory.mktemp("run"), train={"steps": 2, "save_every": 1, "export": False})


def test_secrets_are_in_no_file_of_the_run_and_in_no_line_of_the_output(recipe, tmp_path, monkeypatch):
    """Planted in the environment, in the recipe, in the ds_config and in an error; W&B runs offline besides."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    ds = tmp_path / "ds.json"
    ds.write_text('{"zero_optimization": {"stage": 2}, "comet": {"enabled": false, "api_key": "PLANTED-in-ds-config"}}')
    prompts = [
        *PLANTED.values(),
        *(quote(value, safe="") for value in PLANTED.values()),
        "https://me:PLANTED-pw@host/x?X-Amz-Signature=PLANTED-signature&part=3",
    ]
    text = ", ".join("'" + prompt.replace("'", "''") + "'" for prompt in prompts)
    overrides = [f"run_dir={run}", f"sample.prompts=[{text}]", f"tracking.name=with {PLANTED['CLIENT_SECRET']}"]
    output = launch(recipe, *overrides, "tracking.wandb=offline", launcher="torchrun", ds=str(ds))
    output += launch(recipe, *overrides, "optimizer.lr=PLANTED-client-secret", ranks=1, ds=str(ds), code=2)
    assert "PLANTED" not in output
    assert "optimizer.lr must be a number" in output
    assert [row["step"] for row in metrics(run)] == [0, 1]
    assert (run / "recipe.json").exists()
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in files)
    leaks = [path for path in files if b"PLANTED" in path.read_bytes() or "PLANTED" in str(path.relative_to(run))]
    assert not leaks


def test_a_change_that_needs_consent_is_refused_then_accepted(recipe, tmp_path):
    run = [f"run_dir={tmp_path / 'run'}"]
    launch(recipe, *run, "train.steps=1", ds="zero2", ranks=1)
    changed = [*run, "train.steps=3", "objective.mu=1.5", "optimizer.lr=0.002"]
    output = launch(recipe, *changed, ds="zero2", ranks=1, code=2)
    assert "needs consent: objective.mu was 0.8, is 1.5" in output
    assert "--accept objective.mu" in output
    assert len(metrics(tmp_path / "run")) == 1, "nothing was trained"
    output = launch(recipe, *changed, "--accept", "objective.nu", ds="zero2", ranks=1, code=2)
    assert "did you mean 'objective.mu'?" in output
    output = launch(recipe, *changed, "--accept", "objective.mu", ds="zero2", ranks=1)
    assert "accepted since the checkpoint: objective.mu was 0.8, is 1.5" in output
    assert "changed since the checkpoint: optimizer.lr was 0.001, is 0.002" in output
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]
    output = launch(recipe, *changed, "train.steps=4", ds="zero2", ranks=1)
    assert "objective.mu" not in output, "the checkpoints since have it; consent is asked for once"
    output = launch(recipe, *changed, "seed=9", "--accept", "objective.mu", ds="zero2", ranks=1, code=2)
    assert "refused: seed was 5, is 9" in output
