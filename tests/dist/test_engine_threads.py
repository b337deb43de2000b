"""A run has the same bits again on several threads too, which the other tests do not use."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.dist


def test_threads_do_not_change_a_gradient(tmp_path):
    assert run_ranks(1, "engine_threads:gradients", tmp_path, 40, True) == [1]
