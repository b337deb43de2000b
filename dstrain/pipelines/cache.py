"""Encoded samples kept in host memory: a small dataset goes through the encoders once, not once an epoch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dstrain.pipelines.base import Pipeline
from dstrain.pipelines.graph import PER_DRAW, UnitGraph


class EncodedCache:
    """Runs a pipeline's units, keeping the outputs that do not change from draw to draw.

    Args:
        pipeline: whose units run.
        limit_bytes: samples are kept until this many bytes are full; the rest is encoded each time. 0 keeps nothing.
        varying: what is new in the batch for every draw of a row, such as "image" where pictures are cropped at random.
    """

    def __init__(self, pipeline: Pipeline, limit_bytes: int, varying: Iterable[str] = ()) -> None:
        stored, live = pipeline.graph.depends_on(set(), PER_DRAW.union(varying))
        if not any(unit.models for unit in stored):  # nothing that takes long: samples come encoded, say
            stored, live = [], list(pipeline.graph.units)
        self._pipeline = pipeline
        self._left = limit_bytes
        self._kept: dict[int, dict[str, Any]] = {}
        self._stored = UnitGraph(stored, pipeline.graph.given)
        self._names = tuple(name for unit in stored for name in unit.outputs)
        self._live = UnitGraph(live, (*pipeline.graph.given, *self._names))

    @torch.no_grad()
    def encode(self, rows: list[int], batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return what `Pipeline.encode(batch)` would; `rows` says which row of the dataset each sample is."""
        run, using = self._live.run, self._pipeline.using
        if not self._names:
            return run(self._pipeline, batch, using)
        missing = [i for i, row in enumerate(rows) if row not in self._kept]
        entries = [self._kept.get(row, {}) for row in rows]
        if missing:
            encoded = self._stored.run(self._pipeline, {k: [v[i] for i in missing] for k, v in batch.items()}, using)
            for place, i in enumerate(missing):
                entries[i] = {name: encoded[name][place] for name in self._names}
                self._keep(rows[i], entries[i])
        return run(self._pipeline, {**batch, **{n: [e[n] for e in entries] for n in self._names}}, using)

    def _keep(self, row: int, entry: dict[str, Any]) -> None:
        size = sum(v.numel() * v.element_size() for v in entry.values() if isinstance(v, Tensor))
        if size <= self._left and row not in self._kept:
            self._left -= size
            self._kept[row] = {k: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in entry.items()}
