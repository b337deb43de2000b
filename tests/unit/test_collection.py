"""No test file is passed over: pytest leaves folders with some names out unless told."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
NAMES_ONLY = """
import pytest

class Unread(pytest.Module):
    def collect(self):
        print("found", self.path)
        return []

def pytest_pycollect_makemodule(module_path, parent):
    return Unread.from_parent(parent, path=module_path)
"""


def test_every_test_file_is_collected(tmp_path):
    (tmp_path / "names_only.py").write_text(NAMES_ONLY)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-s", "-p", "names_only"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
    found = {Path(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")}
    assert found == set(TESTS.rglob("test_*.py"))
