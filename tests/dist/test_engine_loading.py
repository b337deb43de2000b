"""Each rank reads its share of a checkpoint and takes the memory of that share."""

from pathlib import Path

import pytest
import torch
from engine_loading import make
from ranks import run_ranks

from dstrain.models.weights import WeightsWriter

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]
MODULES = 8 << 20  # bytes of Python modules that are first used in between


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """About 250 MB in several files."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in make().named_parameters()}
    writer = WeightsWriter(folder, shapes, torch.float32, max_bytes=60_000_000)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.write(name, torch.randn(shape, generator=generator))
    writer.close()
    return folder


@pytest.mark.parametrize(("world", "offload"), [(2, False), (4, True)])
def test_a_rank_reads_and_holds_its_share(tmp_path, checkpoint, world, offload):
    total = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    with torch.device("meta"):
        block = 4 * sum(p.numel() for p in make().transformer_blocks[0].parameters())
    for result in run_ranks(world, "engine_loading:load", tmp_path, str(checkpoint), offload, fresh=True):
        assert result["wrong"] == 0
        assert result["read"] <= 1.02 * total / world
        assert result["read"] >= 0.98 * total / world
        assert result["peak"] <= total / world + block + MODULES
