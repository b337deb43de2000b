"""The units of a pipeline in order: checked once when built, run on batches, split by what is trained."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

from dstrain.errors import DataError, did_you_mean
from dstrain.pipelines.unit import Unit, check_names

Using = Callable[..., AbstractContextManager[None]]  # of the names of models

PER_DRAW = frozenset({"draw"})  # inputs that differ each time a sample is drawn


class UnitGraph:
    """Units in running order.

    Args:
        units: each consumes what is given or what an earlier unit produced.
        given: names that the caller puts in the batch.

    Raises:
        ValueError: a unit needs what nobody gives, or produces what is there already; unit and name are in the text.
    """

    def __init__(self, units: Sequence[Unit], given: tuple[str, ...]) -> None:
        check_names("given", given)
        self.units, self.given = tuple(units), given
        known = dict.fromkeys(given, "the caller")
        for unit in self.units:
            for name in unit.inputs:
                if name not in known:
                    raise ValueError(
                        f"{_name(unit)} needs {name!r}, which is neither given nor produced by an earlier unit"
                        f"{did_you_mean(name, known)} (there is: {', '.join(sorted(known))})"
                    )
            for name in unit.outputs:
                if name in known:
                    raise ValueError(f"{_name(unit)} produces {name!r}, which comes from {known[name]} already")
                known[name] = _name(unit)

    def run(
        self, pipeline: object, batch: Mapping[str, list[Any]], using: Using = lambda *models: nullcontext()
    ) -> dict[str, list[Any]]:
        """Run every unit on a batch; returns the batch with the outputs added.

        `using` is entered around neighbouring units with the same models, which it may bring to the device meanwhile.

        Raises:
            DataError: the batch lacks an input, or its lists differ in length.
            ValueError: a unit does not return what it declares.
        """
        sizes = {name: len(entries) for name, entries in batch.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"a batch needs one entry a sample in every list, got {sizes}")
        self._check_given(batch)
        values = dict(batch)
        for models, units in groupby(self.units, key=lambda unit: unit.models):
            with using(*models):
                for unit in units:
                    results = unit(pipeline, **{name: values[name] for name in unit.inputs})
                    _check_results(unit, results, next(iter(sizes.values()), 0))
                    values |= results
        return values

    def after(self, made: tuple[str, ...]) -> "UnitGraph":
        """Return the graph of what is left to do where `made`, outputs of units, are given instead of their inputs."""
        units = [unit for unit in self.units if not set(unit.outputs) <= set(made)]
        needed = {name for unit in units for name in unit.inputs}
        return UnitGraph(units, (*made, *(name for name in self.given if name in needed)))

    def depends_on(self, trained: set[str], varying: frozenset[str] = PER_DRAW) -> tuple[list[Unit], list[Unit]]:
        """Split into (units that can run once and be stored, units that must run in every training step).

        A unit must run in training if it needs a trained model, takes an input that varies from draw to draw, or
        consumes an output of such a unit.
        """
        stored, live = list[Unit](), list[Unit]()
        moving = set(varying)
        for unit in self.units:
            if trained.intersection(unit.models) or moving.intersection(unit.inputs):
                live.append(unit)
                moving.update(unit.outputs)
            else:
                stored.append(unit)
        return stored, live

    def _check_given(self, batch: Mapping[str, list[Any]]) -> None:
        for unit in self.units:
            for name in unit.inputs:
                if name in self.given and name not in batch:
                    raise DataError(
                        f"the batch has no {name!r}, which {_name(unit)} needs{did_you_mean(name, batch)}"
                        f" (it has: {', '.join(sorted(batch))})"
                    )
            for name in unit.outputs:
                if name in batch:
                    raise DataError(f"the batch brings {name!r}, which {_name(unit)} would overwrite")


def _check_results(unit: Unit, results: dict[str, list[Any]], size: int) -> None:
    if set(results) != set(unit.outputs):
        raise ValueError(f"{_name(unit)} returned {sorted(results)}, but declares {sorted(unit.outputs)}")
    for name, entries in results.items():
        if not isinstance(entries, list) or len(entries) != size:
            got = f"a list of {len(entries)}" if isinstance(entries, list) else type(entries).__name__
            raise ValueError(f"{_name(unit)} returned {got} for {name!r}; it needs a list of {size}, one a sample")


def _name(unit: Unit) -> str:
    return type(unit).__name__
