"""Families of models as pipelines; every module in this folder is imported, so a new family only adds its file."""

from importlib import import_module
from pkgutil import iter_modules

from dstrain.pipelines.base import PIPELINES, Condition, Encoded, Pipeline

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["PIPELINES", "Condition", "Encoded", "Pipeline"]
