"""Name to class, for what a recipe chooses by name: families and objectives."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from dstrain.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named classes; a name can be taken once, and an unknown name is an error that lists the known."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Decorator that files a class under `name`."""

        def file(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = cls
            return cls

        return file

    def get(self, name: str) -> type[T]:
        """Return the class filed under `name`, or raise ConfigError with the names there are."""
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise ConfigError(f"unknown {self.kind} {name!r}{hint} (known: {', '.join(sorted(self._entries))})")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
