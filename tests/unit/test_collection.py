"""No test file is passed over: pytest leaves folders with some names out unless told."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_file_is_collected():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q"], cwd=TESTS.parent, capture_output=True, text=True
    )
    collected = {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    assert collected == {str(p.relative_to(TESTS.parent)) for p in TESTS.rglob("test_*.py")}
