"""The `dstrain` command, as a user meets it: exit codes, one sentence on stderr, files that others can read."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_samples import picture, sample_members, write_tar
from PIL import Image
from tiny_models import tiny_model_folder

from dstrain import cli
from dstrain.commands.report import summary

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


def dstrain(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "dstrain.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(32, 48, seed=number))
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return folder


def metrics(folder: Path, steps: int) -> Path:
    lines = [
        {"step": s, "loss": 2.0 - s / steps, "lr": 1e-3, "step_s": 0.5, "samples_per_s": 8.0} for s in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dstrain import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: print('HEAVY', sorted({'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.endswith("HEAVY []\n")
    assert all(re.search(rf"\n    {name}\s", done.stdout) for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: dstrain {name}" in capsys.readouterr().out


BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["pakc"], "pakc"),
    "pack: no such source": (["pack", "{tmp}/none", "--out", "{tmp}/out"], "no such source: {tmp}/none"),
    "pack: no pictures": (["pack", "{tmp}", "--out", "{tmp}/out"], "{tmp} has no pictures"),
    "pack: shard of no samples": (["pack", "{tmp}", "--out", "{tmp}/out", "--shard-samples", "0"], "at least 1"),
    "index: no such shard": (["index", "{tmp}/none.tar"], "no such shard: '{tmp}/none.tar'"),
    "index: not a tar": (["index", "{tmp}/file"], "{tmp}/file"),
    "init: no such model": (["init", "{tmp}/none", "--out", "{tmp}/out"], "{tmp}/none: no such folder"),
    "init: not a model": (["init", "{tmp}", "--out", "{tmp}-out"], "{tmp}/model_index.json: no such file"),
    "sample: no prompt": (["sample", "--model", "{tmp}", "--out", "a.png"], "--prompt"),
    "sample: no such model": (
        ["sample", "--model", "{tmp}/none", "--prompt", "a", "--out", "{tmp}/a.png"],
        "no such folder, and not a hub id",
    ),
    "sample: no such prompts": (
        ["sample", "--model", "{tmp}", "--prompts-file", "{tmp}/none", "--out", "{tmp}/a"],
        "{tmp}/none: No such file or directory",
    ),
    "sample: guidance below 1": (["sample", "--model", "x", "--prompt", "a", "--out", "a", "--cfg", "0.5"], "0.5"),
    "sample: guidance is no number": (["sample", "--model", "x", "--prompt", "a", "--out", "a", "--cfg", "nan"], "nan"),
    "sample: two prompts, one picture": (
        ["sample", "--model", "x", "--prompt", "a", "--prompt", "b", "--out", "{tmp}/a.png"],
        "one picture for 2 prompts",
    ),
    "sample: no such device": (
        ["sample", "--model", "x", "--prompt", "a", "--out", "{tmp}/a.png", "--device", "tpx"],
        "--device tpx",
    ),
    "sample: out is a file": (
        ["sample", "--model", "x", "--prompt", "a", "--out", "{tmp}/file"],
        "{tmp}/file: File exists",
    ),
    "report: no such run": (["report", "{tmp}/none"], "{tmp}/none"),
    "report: no metrics": (["report", "{tmp}"], "metrics.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a tar")
    arguments, expected = BAD[case]
    try:
        code = cli.main([a.format(tmp=tmp_path) for a in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    shown = capsys.readouterr()
    assert code == 2
    assert expected.format(tmp=tmp_path) in shown.err
    assert "error: " in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "/nowhere", "--out", "out"],
        ["index", "/nowhere/*.tar"],
        ["init", "/nowhere", "--out", "out"],
        ["sample", "--model", "/nowhere", "--prompt", "a", "--out", "{tmp}/a.png"],
        ["report", "/nowhere"],
    ],
    ids=lambda a: a[0],
)
def test_the_process_ends_with_code_2_and_one_line(arguments: list[str], tmp_path: Path) -> None:
    done = dstrain(*(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("dstrain: error: ") and done.stderr.count("\n") == 1
    assert "/nowhere" in done.stderr


def test_a_bug_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dstrain.tracking.jsonl.read_metrics", lambda source: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", str(metrics(tmp_path, 3))])


def test_pack_reports_refusals_and_index_reads_what_it_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = pictures(tmp_path / "source"), tmp_path / "shards"
    (source / "broken.png").write_bytes(b"not a picture")
    (source / "broken.txt").write_text("a caption")
    (source / "alone.png").write_bytes(picture(32, 32))
    assert cli.main(["pack", str(source), "--out", str(out), "--shard-samples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "3 samples in 2 shards" in shown and "refused 2" in shown
    assert "refused broken.png: image_format" in shown and "refused alone.png: no_caption" in shown
    listed = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert {(r["name"], r["reason"]) for r in listed} == {("broken.png", "image_format"), ("alone.png", "no_caption")}

    assert cli.main(["index", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "3 samples in 2 shards" in shown and "left out" not in shown


def test_pack_goes_on_and_does_not_write_over_other_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = pictures(tmp_path / "source"), tmp_path / "shards"
    assert cli.main(["pack", str(source), "--out", str(out)]) == 0
    assert not (out / "refused.jsonl").exists()
    before = (out / "shard-000000.tar").read_bytes()
    assert cli.main(["pack", str(source), "--out", str(out)]) == 0  # all is done already
    assert cli.main(["pack", str(source), "--out", str(out), "--max-side", "32"]) == 2
    assert str(out) in capsys.readouterr().err
    assert (out / "shard-000000.tar").read_bytes() == before
    (out / "pack.json").unlink()
    assert cli.main(["pack", str(source), "--out", str(out)]) == 2
    assert "already holds shards" in capsys.readouterr().err
    assert (out / "shard-000000.tar").read_bytes() == before


def test_index_names_what_is_left_out_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [*sample_members(2, (64, 64)), ("lonely.txt", b"no picture"), ("bare.png", picture(32, 32))]
    shard = write_tar(tmp_path / "a.tar", members)
    assert cli.main(["index", str(shard), "--max-pixels", "1024"]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "a.tar.index").exists()
    assert f"left out {shard}: lonely: no_image" in shown and f"left out {shard}: bare: no_caption" in shown
    assert "2 samples in 1 shard" in shown and "left out 2" in shown


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_init_writes_a_model_that_diffusers_loads(
    model: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import QwenImagePipeline

    from dstrain.models.init import initialise
    from dstrain.pipelines import PIPELINES

    out = tmp_path / "new" / "model"
    assert cli.main(["init", str(model), "--out", str(out), "--seed", "3", "--dtype", dtype]) == 0
    loaded = QwenImagePipeline.from_pretrained(out, torch_dtype=torch.float32)
    ours = PIPELINES.get("qwen_image").from_pretrained(out, load=()).build_transformer()
    initialise(ours, seed=3)
    stored = torch.bfloat16 if dtype == "bf16" else torch.float32
    theirs = dict(loaded.transformer.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.equal(theirs[name], p.to(stored).float()), name
    count = sum(p.numel() for p in theirs.values())
    assert f"{count:,} random {dtype} parameters" in capsys.readouterr().out
    assert (out / "vae/config.json").read_bytes() == (model / "vae/config.json").read_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["model"], "nothing is left beside it"


def test_init_leaves_no_half_of_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dstrain.models.init.initial_slice", fail)
    assert cli.main(["init", str(model), "--out", str(tmp_path / "new")]) == 130
    assert not list(tmp_path.iterdir())


def test_init_refuses_a_folder_in_use_and_one_inside_the_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("keep")
    assert cli.main(["init", str(model), "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is there already" in capsys.readouterr().err
    assert cli.main(["init", str(model), "--out", str(model / "new")]) == 2
    assert "lies inside the model" in capsys.readouterr().err
    assert not (model / "new").exists() and (tmp_path / "mine").exists()


SMALL = ["--height", "32", "--width", "48", "--steps", "2", "--device", "cpu", "--dtype", "fp32"]


def test_sample_paints_one_file(model: Path, tmp_path: Path) -> None:
    first, again, other = (tmp_path / "new" / name for name in ("a.png", "b.png", "c.PNG"))
    for out, seed in ((first, 1), (again, 1), (other, 2)):
        code = cli.main(
            ["sample", "--model", str(model), "--prompt", "a red cat", "--out", str(out), "--seed", str(seed), *SMALL]
        )
        assert code == 0
    with Image.open(first) as image:
        assert image.format == "PNG" and image.mode == "RGB" and image.size == (48, 32)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_sample_paints_a_folder_with_a_grid(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa red cat\n\n  blue grass \n", encoding="utf-8")
    out = tmp_path / "pictures"
    assert cli.main(["sample", "--model", str(model), "--prompts-file", str(prompts), "--out", str(out), *SMALL]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["0000.png", "0001.png", "grid.png"]
    assert capsys.readouterr().out.strip() == str(out / "grid.png")
    alone = tmp_path / "alone.png"
    assert cli.main(["sample", "--model", str(model), "--prompt", "a red cat", "--out", str(alone), *SMALL]) == 0
    with Image.open(alone) as a, Image.open(out / "0000.png") as b:  # the neighbours change nothing but rounding
        gap = max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes()))
    assert gap <= 1


def test_sample_refuses_a_size_before_it_reads_the_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dstrain.pipelines.base.load_module", lambda *a: pytest.fail("the model was read"))
    sizes = ["--height", "40", "--width", "64"]
    assert cli.main(["sample", "--model", str(model), "--prompt", "a", "--out", str(tmp_path / "a.png"), *sizes]) == 2
    assert "height 40 and width 64 must be positive multiples of 16" in capsys.readouterr().err


def test_sample_refuses_a_model_of_another_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert (
        cli.main(["sample", "--model", str(tmp_path), "--prompt", "a", "--out", str(tmp_path / "a.png"), *SMALL]) == 2
    )
    assert "'FluxPipeline', which no family reads (known: QwenImagePipeline" in capsys.readouterr().err


def test_report_draws_and_sums_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics(tmp_path, 20)
    assert cli.main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG" and image.width >= 1000
    assert "steps   20 (0 to 19)" in shown and "time    0 h 00 min 10 s" in shown
    assert "loss    1.975 at the start, 1.075 at the end" in shown and "speed   8 samples/s" in shown
    assert "memory" not in shown

    other = tmp_path / "curve.png"
    assert cli.main(["report", str(tmp_path / "metrics.jsonl"), "--out", str(other)]) == 0
    assert other.exists()
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "none" / "a.png")]) == 2


def test_a_summary_passes_over_steps_without_a_finite_loss() -> None:
    shown = summary([{"step": 5, "loss": float("nan")}, {"step": 6, "loss": 0.5}])
    assert "loss    0.5 at the start, 0.5 at the end" in shown and "2 (5 to 6)" in shown


def test_the_console_command_is_installed() -> None:
    script = Path(sys.executable).with_name("dstrain")
    if not script.exists():
        pytest.skip("dstrain is not installed here")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("dstrain ")


@pytest.mark.parametrize("report", ["", "nowhere/r.jsonl", "folder", "link", "device"])
def test_a_report_never_replaces_what_is_no_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], report: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", sample_members(2, (64, 64)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "device").symlink_to("/dev/null")
    for command in ("index", "verify"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "a.tar", "--report", report])
        assert stopped.value.code == 2
    assert "error: argument --report" in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "target").exists()


def test_names_from_data_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [*sample_members(2, (64, 64)), ("\033[31mred\nok 5 shards.png", b"no picture"), ("\033[31mred.txt", b"x")]
    shard = write_tar(tmp_path / "a.tar", members)
    for command in ("index", "verify"):
        cli.main([command, str(shard)])
    shown = capsys.readouterr().out
    assert "\033" not in shown and r"\x1b[31mred" in shown
    assert not any(line.startswith("ok 5") for line in shown.splitlines())


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [(KeyboardInterrupt(), 130, "stopped"), (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left")],
)
def test_interrupts_and_full_disks_are_no_tracebacks(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr("dstrain.data.shards.catalog.renew_indexes", fail)
    assert cli.main(["index", str(write_tar(tmp_path / "a.tar", sample_members(1)))]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
