"""Which family a model folder belongs to."""

from dstrain.errors import CheckpointError
from dstrain.pipelines import PIPELINES, Pipeline
from dstrain.pipelines.components import INDEX, ModelSource, read_json, resolve


def family_of(model: str) -> type[Pipeline]:
    """Return the pipeline class that reads `model` (a folder or a hub id), by the class its model_index.json names."""
    path = resolve(ModelSource.parse(model).within(INDEX)) / INDEX
    found = read_json(path).get("_class_name")
    families = [PIPELINES.get(name) for name in PIPELINES]
    for family in families:
        if family.class_name == found:
            return family
    known = ", ".join(family.class_name for family in families)
    raise CheckpointError(f"{path}: _class_name is {found!r}, which no family reads (known: {known})")
