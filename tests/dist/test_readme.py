"""The README's commands: every one is taken from its text, and the walk-through is walked."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import ROOT, environment, metrics, picture_folder

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
BIN = Path(sys.executable).parent


def run(command: str, cwd: Path) -> str:
    env = environment() | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(shlex.split(command), cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_files_that_the_readme_names_exist():
    names = set(re.findall(r"(?:launch|ds_configs|benchmarks|tests|dstrain)/[\w./-]*\w", README))
    missing = [n for n in names if not (ROOT / n).exists()]
    assert not missing
    table = re.findall(r"`(zero\w+\.json)`", README)
    assert {p.name for p in (ROOT / "ds_configs").glob("*.json")} == set(table)


def test_every_subcommand_of_the_readme_is_known():
    from dstrain.cli import COMMANDS as known

    used = {shlex.split(c)[1] for c in COMMANDS if c.startswith("dstrain ")}
    assert {"pack", "index", "sample", "report"} <= used <= set(known)


@pytest.mark.dist
def test_train_on_your_own_pictures(tmp_path):
    """The README's own lines, with its placeholders filled in, in a folder that looks like the checkout."""
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    picture_folder(tmp_path / "my_pictures")
    demo = yaml.safe_load((ROOT / "launch/recipes/demo.yaml").read_text())
    demo |= {"run_dir": "runs/NAME", "tracking": {"wandb": "off"}}
    demo["data"]["shards"] = ["shards/my_pictures"]
    demo["batch"]["global_batch_size"] = 8
    demo["train"] = {"steps": 2}
    demo["optimizer"]["warmup_steps"] = 1
    (tmp_path / "my_recipe.yaml").write_text(yaml.safe_dump(demo))
    walk = [c for c in COMMANDS if "my_pictures" in c or "my_recipe" in c or "runs/NAME" in c]
    walk = [c for c in walk if not c.startswith("sbatch")]
    assert len(walk) == 9
    output = {}
    for command in walk:
        if command.startswith("dstrain sample"):
            command += " --height 32 --width 32 --steps 2"
        output[command.split()[-1]] = run(command, tmp_path)
    assert "24 samples" in output["shards/my_pictures"]
    assert "9,798,336" in output["--dry_run"]
    assert len(metrics(tmp_path / "runs/NAME")) == 2
    assert (tmp_path / "preview.png").stat().st_size > 10_000
    assert (tmp_path / "cat.png").stat().st_size > 500
    assert (tmp_path / "runs/NAME/export/model_index.json").is_file()
    assert (tmp_path / "my_model/transformer/config.json").is_file()
