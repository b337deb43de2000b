"""A unit: one step from named inputs to named outputs, with the models that it needs."""

import inspect
from typing import Any


class Unit:
    """Turns some values of a batch into others. Every value is a list with one entry a sample.

    A subclass declares three tuples of names and computes in `__call__(self, pipeline, <its inputs by name>)`,
    which returns {output: list} for exactly its outputs. A mistake in the declaration is a TypeError when the class
    is made, so that the graph and the split for pre-encoding can rely on it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    models: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for attribute in ("inputs", "outputs", "models"):
            check_names(f"{cls.__name__}.{attribute}", getattr(cls, attribute, None))
        taken = tuple(inspect.signature(cls.__call__).parameters)[2:]
        if set(taken) != set(cls.inputs):
            raise TypeError(f"{cls.__name__}.__call__ takes {taken}, but its inputs are {cls.inputs}")

    def __call__(self, *args: Any, **inputs: Any) -> dict[str, list[Any]]:
        """Compute the outputs for a batch."""
        raise NotImplementedError


def check_names(what: str, names: object) -> None:
    """Raise TypeError unless `names` is a tuple of strings; a lone string would be read as its letters."""
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} must be a tuple of names such as ('image',), got {names!r}")
