"""The user's DeepSpeed JSON: read, checked, and completed with what only the run knows.

DeepSpeed refuses unknown keys inside its sections but ignores them at the top level, where a misspelt
`gradient_clipping` trains another algorithm in silence. Here both are refused, by name, before anything is built.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.config import OptimizerConfig, Recipe
from dstrain.errors import ConfigError, did_you_mean

# Every top-level key that DeepSpeed 0.19 reads (deepspeed/runtime/config.py and the sections' own modules).
TOP_LEVEL = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    optimizer scheduler fp16 bf16 bfloat16 fp32 amp torch_autocast data_types gradient_clipping prescale_gradients
    gradient_predivide_factor gradient_allreduce_op sparse_gradients communication_data_type
    seq_parallel_communication_data_type disable_allgather zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc
    log_level activation_checkpointing aio checkpoint flops_profiler comms_logger tensorboard wandb csv_monitor comet
    monitor_config elasticity autotuning compile timers tensor_parallel expert_parallel hybrid_engine pipeline
    data_efficiency curriculum_learning compression_training weight_quantization sparse_attention nebula datastates
    dataloader_drop_last use_data_before_expert_parallelism zenflow sequence_parallel_size vocabulary_size
    """.split()
)
# Accepted by DeepSpeed, but they would change what is computed behind the trainer's back.
UNSUPPORTED = frozenset(
    """
    amp torch_autocast gradient_allreduce_op gradient_predivide_factor prescale_gradients sparse_gradients
    seq_parallel_communication_data_type sequence_parallel_size tensor_parallel expert_parallel hybrid_engine pipeline
    data_efficiency curriculum_learning compression_training weight_quantization sparse_attention elasticity autotuning
    zenflow
    """.split()
)
# Keys of the sections that DeepSpeed reads without a schema, or too late.
SECTIONS = {
    "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    "activation_checkpointing": "partition_activations contiguous_memory_optimization cpu_checkpointing"
    " number_checkpoints synchronize_checkpoint_boundary profile",
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds thread_count",
}
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON; ConfigError for what is not JSON, unknown top-level keys and values out of range."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: a ds_config is a JSON file, this is none")
        config = json.loads(path.read_text(), object_pairs_hook=_unique(path))
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.json"))) if path.parent.is_dir() else ""
        raise ConfigError(f"{path}: no such ds_config{near}") from None
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}: not JSON: {e.msg} at line {e.lineno}, column {e.colno}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(f"{path}: not readable: {e}") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a ds_config is a JSON object, not {type(config).__name__}")
    for key in config:
        if key not in TOP_LEVEL:
            raise ConfigError(f"{path}: unknown key {key!r}{did_you_mean(key, TOP_LEVEL)}")
        if key in UNSUPPORTED:
            raise ConfigError(f"{path}: {key!r} is not supported by this trainer; remove it")
    if "bfloat16" in config:  # DeepSpeed's older name for the section
        old = config.pop("bfloat16")
        config["bf16"] = config.get("bf16") or old
    _check_values(config, path)
    return config


def stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage, 0 to 3."""
    return config.get("zero_optimization", {}).get("stage", 0)


def offload(config: Mapping[str, Any], what: str) -> str:
    """Return where "param" or "optimizer" state is kept: "none", "cpu" or "nvme"."""
    section = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return section.get("device", "none")


def uses_bf16(config: Mapping[str, Any], hardware_bf16: bool) -> bool:
    """Whether weights are bf16; `"auto"` means: where the hardware multiplies bf16."""
    enabled = config.get("bf16", {}).get("enabled", False)
    return hardware_bf16 if enabled == "auto" else enabled


def complete(config: Mapping[str, Any], recipe: Recipe, *, world_size: int, bf16: bool, path: Path) -> dict[str, Any]:
    """Return the JSON that DeepSpeed is given: the user's, with batch sizes, optimizer and precision filled in.

    Raises ConfigError where the JSON and the recipe state different things.
    """
    _check_agreement(config, recipe, world_size, path)
    done = dict(config)
    # Packs differ in size and number from step to step: the trainer scales the loss by the global batch itself and
    # tells the engine where each accumulation ends, so to DeepSpeed a step is one micro-batch of one.
    done.update(dict.fromkeys(BATCH_KEYS, 1), train_batch_size=world_size)
    done["bf16"] = {**config.get("bf16", {}), "enabled": bf16}
    done.setdefault("gradient_clipping", 1.0)  # DeepSpeed's own default; written out, so that ds_config.json says it
    done.setdefault("steps_per_print", 1 << 40)
    done["zero_optimization"] = dict(config.get("zero_optimization", {}))
    if bf16 and stage(config) > 0:
        # DeepSpeed would add the gradients of micro-steps up in bf16, losing the small ones of a large batch.
        done["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    done["optimizer"] = _optimizer(recipe.optimizer, offload(config, "optimizer") != "none")
    return done


def _optimizer(o: OptimizerConfig, offloaded: bool) -> dict[str, Any]:
    params: dict[str, Any] = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if not offloaded:  # DeepSpeed's own FusedAdam would have to be compiled; PyTorch's is as fast
        params |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": params}


def _check_values(config: Mapping[str, Any], path: Path) -> None:
    for section in ("zero_optimization", "fp16", *SECTIONS):
        if not isinstance(config.get(section, {}), dict):
            raise ConfigError(f"{path}: {section} must be an object, not {config[section]!r}")
        known = SECTIONS.get(section, "").split()
        for key in config.get(section, {}):
            if known and key not in known:
                raise ConfigError(f"{path}: unknown key {section}.{key}{did_you_mean(key, known)}")
    for what in ("param", "optimizer"):
        if not isinstance(value := config.get("zero_optimization", {}).get(f"offload_{what}", {}), (dict, type(None))):
            raise ConfigError(
                f'{path}: zero_optimization.offload_{what} must be an object such as {{"device": "cpu"}}, not {value!r}'
            )
    if config.get("fp16", {}).get("enabled"):
        raise ConfigError(f'{path}: fp16 overflows in these models; use "bf16": {{"enabled": true}}')
    if config.get("zero_optimization", {}).get("compute_grad_norm") is False:
        raise ConfigError(f"{path}: zero_optimization.compute_grad_norm must be true; the norm is logged and guarded")
    level = stage(config)
    if isinstance(level, bool) or level not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {level!r}")
    clip = config.get("gradient_clipping", 0.0)
    if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 <= clip < float("inf"):
        raise ConfigError(f"{path}: gradient_clipping must be a number >= 0 (0 = off), not {clip!r}")
    enabled = config.get("bf16", {}).get("enabled", False)
    if enabled not in (True, False, "auto"):
        raise ConfigError(f'{path}: bf16.enabled must be true, false or "auto", not {enabled!r}')
    if offload(config, "param") != "none" and level != 3:
        raise ConfigError(f"{path}: zero_optimization.offload_param needs stage 3, not {level}")
    if offload(config, "optimizer") != "none" and level == 0:
        raise ConfigError(f"{path}: zero_optimization.offload_optimizer needs stage 1, 2 or 3, not 0")
    _check_nvme(config, path)
    for what in ("param", "optimizer"):
        if offload(config, what) not in ("none", "cpu", "nvme"):
            raise ConfigError(
                f"{path}: zero_optimization.offload_{what}.device must be none, cpu or nvme,"
                f" not {offload(config, what)!r}"
            )


def _check_nvme(config: Mapping[str, Any], path: Path) -> None:
    for what in ("param", "optimizer"):
        if offload(config, what) == "nvme":
            folder = config["zero_optimization"][f"offload_{what}"].get("nvme_path")
            if not folder or not Path(folder).is_dir():
                raise ConfigError(
                    f"{path}: zero_optimization.offload_{what}.nvme_path must be a folder on a fast local disk,"
                    f" not {folder!r}"
                )


def check_sections(config: Mapping[str, Any], path: Path) -> None:
    """Let DeepSpeed's own schema read the zero_optimization section; ConfigError names the key and the nearest."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _schema_names(DeepSpeedZeroConfig, first["loc"][:-1])
            raise ConfigError(
                f"{path}: unknown key zero_optimization.{key}{did_you_mean(str(first['loc'][-1]), known)}"
            ) from None
        raise ConfigError(f"{path}: zero_optimization.{key} = {first['input']!r}: {first['msg'].lower()}") from None


def _schema_names(model: Any, loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = next(
            (t for t in (annotation, *getattr(annotation, "__args__", ())) if hasattr(t, "model_fields")), model
        )
    return [name for key, f in model.model_fields.items() for name in (key, f.alias) if name]


def _check_agreement(config: Mapping[str, Any], recipe: Recipe, world_size: int, path: Path) -> None:
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(f"{path}: {key!r} belongs to the recipe (optimizer.*); remove it from the ds_config")
    if not config.get("managed_gradient_accumulation", True):
        raise ConfigError(
            f"{path}: managed_gradient_accumulation must be true; the trainer marks the boundaries itself"
        )
    given = {key: config[key] for key in BATCH_KEYS if config.get(key, "auto") != "auto"}
    want = recipe.batch.global_batch_size
    for key, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f'{path}: {key} must be a positive whole number or "auto", not {value!r}')
    total, micro, accumulation = (given.get(key) for key in BATCH_KEYS)
    if total is not None and total != want:
        raise ConfigError(
            f"{path}: train_batch_size {total} contradicts the recipe's batch.global_batch_size {want};"
            ' remove it or write "auto"'
        )
    if want % ((micro or 1) * (accumulation or 1) * world_size) or (
        micro is not None and accumulation is not None and micro * accumulation * world_size != want
    ):
        if micro is None and accumulation is None:
            return
        raise ConfigError(
            f"{path}: train_micro_batch_size_per_gpu {micro or 'auto'} x gradient_accumulation_steps"
            f" {accumulation or 'auto'} x"
            f" {world_size} ranks contradicts the recipe's batch.global_batch_size {want}; micro-batches are packed by"
            ' batch.tokens_per_pack, so remove them or write "auto"'
        )


def _unique(path: Path) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{path}: key {name!r} stands twice; keep one")
        return dict(items)

    return pairs
