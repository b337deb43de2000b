"""The user's DeepSpeed JSON: read, checked, and completed with what only the run knows.

DeepSpeed refuses unknown keys inside some of its sections but ignores them at the top level, where a misspelt
`gradient_clipping` trains another algorithm in silence. Here all are refused, by name, before anything is built.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from dstrain.config import Recipe
from dstrain.engine import ds_schema
from dstrain.engine.ds_optimizer import optimizer_section, settle
from dstrain.engine.ds_rules import conflicts, contradictions, gpu_only, offload, stage
from dstrain.engine.ds_sizes import sizes
from dstrain.errors import ConfigError, did_you_mean

__all__ = ["check_sections", "complete", "faults", "load", "offload", "read_ds_config", "settle", "stage", "uses_bf16"]

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises ConfigError, naming file, key and value, for what is not JSON, unknown keys and values that cannot be at any
    level, and settings that contradict each other.
    """
    config = load(path)
    for fault in faults(config):
        raise ConfigError(f"{path}: {fault}")
    return config


def load(path: Path) -> dict[str, Any]:
    """Read a JSON object, with older spellings and "auto" resolved where they can be; ConfigError if it is none."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: a ds_config is a JSON file, this is none")
        config = json.loads(
            path.read_text(),
            object_pairs_hook=_unique(path),
            parse_float=_number,
            parse_constant=_no_constant(path),
        )
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.json"))) if path.parent.is_dir() else ""
        raise ConfigError(f"{path}: no such ds_config{near}") from None
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}: not JSON: {e.msg} at line {e.lineno}, column {e.colno}") from None
    except (OSError, ValueError, RecursionError) as e:  # ValueError: not UTF-8, or a number of too many digits
        raise ConfigError(f"{path}: not readable: {e}") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a ds_config is a JSON object, not {type(config).__name__}")
    if "bfloat16" in config:  # DeepSpeed's older name for the section
        old = config.pop("bfloat16")
        config.setdefault("bf16", old)
    if config.get("gradient_clipping") == "auto":
        del config["gradient_clipping"]
    if isinstance(zero := config.get("zero_optimization"), dict):
        for key in ds_schema.SIZES.split():
            if zero.get(key) == "auto":
                del zero[key]
    return config


def faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for everything that is wrong with a loaded ds_config: names and values, else contradictions."""
    found = False
    for fault in ds_schema.faults(config):
        found = True
        yield fault
    if not found:
        yield from contradictions(config)


def uses_bf16(config: Mapping[str, Any], hardware_bf16: bool) -> bool:
    """Whether weights are bf16; `"auto"` means: where the hardware multiplies bf16."""
    enabled = config.get("bf16", {}).get("enabled", False)
    return hardware_bf16 if enabled == "auto" else enabled


def complete(
    config: Mapping[str, Any],
    recipe: Recipe,
    *,
    world_size: int,
    bf16: bool,
    path: Path,
    block: int = 0,
    largest: int = 0,
    classes: Collection[str] = (),
) -> dict[str, Any]:
    """Return the JSON that DeepSpeed is given: the user's, with batch, optimizer, precision and sizes filled in.

    Args:
        config: as `read_ds_config` returns it.
        recipe: settled with it (see `settle`).
        world_size: ranks.
        bf16: whether weights are bf16.
        path: the ds_config's, for messages.
        block: elements of one transformer block, 0 = not known: DeepSpeed's own sizes stay.
        largest: elements of the largest tensor.
        classes: module.qualname of the model's modules' classes, for leaf_module; empty = not known, not checked.

    Raises ConfigError where the JSON and the recipe, the number of ranks or the model do not go together.
    """
    assert settle(recipe, config, path) == recipe, "settle the recipe with the ds_config first"
    _check_batch(config, recipe, world_size, path)
    check_hpz(config, world_size, path)
    _check_dtypes(config, bf16, path)
    for conflict in conflicts(config, recipe, bf16=bf16, classes=classes):
        raise ConfigError(f"{path}: {conflict}")
    done = {key: value for key, value in config.items() if key not in ("fp16", "scheduler")}
    # Packs differ in size and number from step to step: the trainer scales the loss by the global batch itself and
    # tells the engine where each accumulation ends, so to DeepSpeed a step is one micro-batch of one.
    done.update(dict.fromkeys(BATCH_KEYS, 1), train_batch_size=world_size)
    done["bf16"] = {**config.get("bf16", {}), "enabled": bf16}
    done.setdefault("gradient_clipping", 1.0)  # DeepSpeed's own default; written out, so that ds_config.json says it
    done.setdefault("steps_per_print", 1 << 40)
    zero = dict(config.get("zero_optimization", {}))
    done["zero_optimization"] = zero | {key: size.elements for key, size in sizes(config, block, largest).items()}
    if bf16 and stage(config) > 0:
        # DeepSpeed would add the gradients of micro-steps up in bf16, losing the small ones of a large batch.
        done["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    done["optimizer"] = optimizer_section(recipe.optimizer, offloaded=offload(config, "optimizer") != "none")
    if recipe.lora.base != "bf16":
        _check_stored(config, recipe.lora.base, path)
    if recipe.optimizer.name == "muon":
        _check_muon(config, path)
        done["gradient_clipping"] = 0.0
        done["zero_optimization"]["reduce_scatter"] = False
    return done


def check_sections(config: Mapping[str, Any], path: Path, *, gpu: bool | None = None) -> None:
    """Let DeepSpeed's own schema read the zero_optimization section, and refuse what needs a GPU where there is none.

    gpu: whether the run has GPUs; None = whether this machine has. Raises ConfigError that names the key.
    """
    keys = gpu_only(config)
    if keys and not (torch.cuda.is_available() if gpu is None else gpu):
        raise ConfigError(f"{path}: {keys[0]} needs an NVIDIA GPU, and this run has none; remove it")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise ConfigError(f"{path}: {key} = {first['input']!r:.80}: {first['msg'].lower()}") from None


def _check_batch(config: Mapping[str, Any], recipe: Recipe, world_size: int, path: Path) -> None:
    want = recipe.batch.global_batch_size
    given = {key: config[key] for key in BATCH_KEYS if config.get(key, "auto") != "auto"}
    total, micro, accumulation = (given.get(key) for key in BATCH_KEYS)
    if total is not None and total != want:
        raise ConfigError(
            f"{path}: train_batch_size {total} contradicts the recipe's batch.global_batch_size {want};"
            ' remove it or write "auto"'
        )
    if micro is None and accumulation is None:
        return
    stated = (micro or 1) * (accumulation or 1) * world_size
    if want % stated or (micro is not None and accumulation is not None and stated != want):
        raise ConfigError(
            f"{path}: train_micro_batch_size_per_gpu {micro or 'auto'} x gradient_accumulation_steps"
            f" {accumulation or 'auto'} x"
            f" {world_size} ranks contradicts the recipe's batch.global_batch_size {want}; micro-batches are packed by"
            ' batch.tokens_per_pack, so remove them or write "auto"'
        )


def _check_stored(config: Mapping[str, Any], base: str, path: Path) -> None:
    """Refuse what takes the bytes of packed weights for numbers."""
    zero = config.get("zero_optimization", {})
    keys = ("stage3_use_all_reduce_for_fetch_params", "zero_quantized_weights", "zero_quantized_nontrainable_weights")
    wrong = [f"{key} = true" for key in keys if zero.get(key)]
    wrong += ["offload_param.device = 'nvme'"] if offload(config, "param") == "nvme" else []
    if wrong:
        raise ConfigError(f"{path}: zero_optimization.{wrong[0]} does not go with lora.base {base}; remove one of them")


def _check_muon(config: Mapping[str, Any], path: Path) -> None:
    """Refuse what DeepSpeed's Muon does wrongly or not at all."""
    if stage(config) not in (0, 3):
        raise ConfigError(f"{path}: optimizer.name muon needs zero_optimization.stage 0 or 3, not {stage(config)}")
    if clip := config.get("gradient_clipping", 0):
        # At stage 3 the norm that is clipped is the orthogonalised update's, some fifty times the gradient's.
        raise ConfigError(
            f"{path}: gradient_clipping = {clip} would shrink every step of Muon, whose size does not depend on the"
            " gradient's; set it to 0"
        )
    if config.get("zero_optimization", {}).get("reduce_scatter"):
        raise ConfigError(f"{path}: zero_optimization.reduce_scatter does not go with optimizer.name muon; remove it")


def check_hpz(config: Mapping[str, Any], world_size: int, path: Path) -> None:
    """Raise ConfigError if hpZ's groups do not divide the ranks."""
    size = config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if size > 1 and world_size % size:
        raise ConfigError(
            f"{path}: zero_optimization.zero_hpz_partition_size = {size} does not divide the {world_size} ranks; it is"
            " the number of GPUs of a node"
        )


def _check_dtypes(config: Mapping[str, Any], bf16: bool, path: Path) -> None:
    section, master = config.get("data_types", {}), config.get("bf16", {}).get("bf16_master_weights_and_grads")
    dtype, weights = section.get("param_dtype"), "bf16" if bf16 else "fp32"
    if dtype is not None and DTYPES.get(dtype, dtype) != weights:
        raise ConfigError(f"{path}: data_types.param_dtype = {dtype!r}, but weights are {weights} here; remove it")
    if master and not bf16:
        raise ConfigError(f"{path}: bf16.bf16_master_weights_and_grads needs bf16 weights, and they are fp32 here")


def _unique(path: Path) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{path}: key {twice!r} stands twice; keep one")
        return dict(items)

    return pairs


def _number(text: str) -> float | int:
    """Sizes are often written as 2e8, and some of DeepSpeed's sections want whole numbers."""
    value = float(text)
    return int(value) if "e" in text.lower() and value.is_integer() else value


def _no_constant(path: Path) -> Any:
    def refuse(word: str) -> NoReturn:
        raise ConfigError(f"{path}: not JSON: {word} is no number")

    return refuse
