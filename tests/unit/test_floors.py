"""Who may import whom: a floor imports only from itself and from the floors below."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dstrain"
FLOORS = {
    "config": 0, "knobs": 0, "faults": 0, "launched": 0, "errors": 0, "registry": 0, "rng": 0, "storage": 0,
    "kernels": 1, "models": 1, "objectives": 1,
    "pipelines": 2, "data": 2,
    "engine": 3, "tracking": 3,
    "trainer": 4, "diagnosis": 4, "guards": 4, "saves": 4, "starting": 4, "incidents": 4, "agreement": 4,
    "job": 4, "continuation": 4, "painting": 4, "announce": 4, "checks": 4, "encoding": 4,
    "cli": 5, "commands": 5,
}  # fmt: skip
ONLY_UNDER = {
    "deepspeed": ("engine/",),
    "torch.distributed": ("engine/",),
    "wandb": ("tracking/wandb.py",),
    "triton": ("kernels/",),
    "diffusers": ("pipelines/components.py",),
    "peft": ("models/lora.py",),
    "bitsandbytes": ("models/storage.py", "engine/moments.py"),
    "webdataset": (),
    "pickle": (),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    relative = path.relative_to(PACKAGE)
    here = relative.parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for name in imports(path):
        if name.startswith("dstrain."):
            target = name.split(".")[1]
            if target in FLOORS:
                assert FLOORS[target] <= FLOORS[here], f"{relative} imports {name}, which is on a floor above"
        for library, places in ONLY_UNDER.items():
            if name == library or name.startswith(library + "."):
                assert str(relative).startswith(places or ("nowhere",)), f"{relative} imports {name}"


def test_every_part_has_a_floor():
    parts = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert parts <= set(FLOORS)


def test_the_check_sees_a_breach(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from dstrain.engine import engine\nimport deepspeed.zero\n")
    assert imports(bad) == ["dstrain.engine", "dstrain.engine.engine", "deepspeed.zero"]


def test_no_file_is_a_heap():
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long
