"""metrics.jsonl, and what is masked before a config is shown."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dstrain.errors import DataError
from dstrain.tracking.jsonl import JsonlTracker, read_metrics
from dstrain.tracking.redact import redact


def strict_lines(path: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(path: Path, steps: range, first_step: int = 0) -> None:
    tracker = JsonlTracker(path, first_step=first_step)
    for step in steps:
        tracker.log(step, {"loss": 1 / (step + 1)})
    tracker.finish()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, first_step=0)
    tracker.log(7, {"loss": value, "lr": 1e-4})
    tracker.finish()
    tracker.finish()
    assert strict_lines(path) == [{"step": 7, "loss": str(value), "lr": 1e-4}]
    assert np.array_equal(read_metrics(path)[0]["loss"], value, equal_nan=True)


def test_numbers_of_other_libraries_keep_every_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": np.float32(0.1), "b": np.int64(2**60 + 1), "c": torch.tensor(0.3), "d": 0.1 + 0.2}
    tracker = JsonlTracker(path, first_step=0)
    tracker.log(0, values)
    tracker.finish()
    assert read_metrics(tmp_path) == [{"step": 0} | {k: v.item() if k != "d" else v for k, v in values.items()}]
    assert isinstance(read_metrics(path)[0]["b"], int)


@pytest.mark.parametrize("first_step", [0, 1, 4, 9, 10, 99])
@pytest.mark.parametrize(
    "torn", [b"", b"{", b'{"step": 10, "loss"', b'{"step": 2, "loss": 1.0}', b"\xff\xfe\x00", b"[10]\n", b"\n\n"]
)
def test_resume_cuts_back_to_the_first_step(tmp_path, first_step, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(10))
    kept = path.read_bytes().splitlines(keepends=True)[:first_step]
    path.write_bytes(path.read_bytes() + torn)
    write_steps(path, range(first_step, first_step + 3), first_step=first_step)
    steps = [line["step"] for line in strict_lines(path)]
    assert steps == [*range(min(first_step, 10)), *range(first_step, first_step + 3)]
    assert path.read_bytes().startswith(b"".join(kept)), "kept lines are the same bytes"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_killed_process_leaves_every_logged_line(tmp_path):
    pid = os.fork()
    if pid == 0:
        tracker = JsonlTracker(tmp_path / "metrics.jsonl", first_step=0)
        for step in range(50):
            tracker.log(step, {"loss": 1.0})
        os._exit(137)
    os.waitpid(pid, 0)
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(50))


def test_reading_passes_over_the_line_that_is_being_written(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", range(3))
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(b'{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        (b"", "no step"),
        (b"\n", "no step"),
        (b'{"step": 1, "lo', "no step"),
        (b'{"step": 1, "loss": 2}\nloss: 3\n{"step": 3, "loss": 2}\n', "metrics.jsonl:2"),
        (b'{"loss": 2}\n{"step": 3, "loss": 2}\n', "metrics.jsonl:1"),
        (b'{"step": true}\n', "metrics.jsonl:1"),
        (b'{"step": 1, "loss": "low"}\n', "metrics.jsonl:1: loss is 'low'"),
        (b'{"step": 1, "loss": [1]}\n', "metrics.jsonl:1: loss"),
    ],
)
def test_damaged_metrics_are_refused_by_name_and_line(tmp_path, content, says):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_metrics(path)


def test_secrets_are_masked_and_the_rest_is_not():
    config = {
        "hub": {"hf_token": "hf_abc", "repo": "me/model"},
        "api_key": 12345678,
        "clientSecret": ["a", "b"],
        "PASSWORD": "x",
        "credentials": {"user": "u"},
        "note": "sent with s3cr3t-value inside",
        "mirrors": ["https://me:pw@host/x", "https://host/y"],
        "tokens_per_pack": 4096,
        "tokenizer": "Qwen/Qwen2.5-VL-7B",
        "access_tokens": "abc",
        "lr": 1e-4,
        "resume": None,
        "flag": True,
        "path": Path("/data/x"),
    }
    clean = redact(config, environ={"SOME_API_KEY": "s3cr3t-value", "SHORT_TOKEN": "me", "HOME": "/data/x"})
    assert clean == {
        "hub": {"hf_token": "***", "repo": "me/model"},
        "api_key": "***",
        "clientSecret": "***",
        "PASSWORD": "***",
        "credentials": "***",
        "note": "sent with *** inside",
        "mirrors": ["https://***@host/x", "https://host/y"],
        "tokens_per_pack": 4096,
        "tokenizer": "Qwen/Qwen2.5-VL-7B",
        "access_tokens": "***",
        "lr": 1e-4,
        "resume": None,
        "flag": True,
        "path": "/data/x",
    }
