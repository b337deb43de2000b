"""Every key of a ds_config at every level, and what its value may be.

DeepSpeed checks some sections with pydantic when the ranks have started, coerces what it can ("3" is a stage, 1 is
true), and reads others key by key, so that a misspelt one is ignored. This table needs no DeepSpeed, names the full
key, and is held against the installed DeepSpeed's own models by a test.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.errors import did_you_mean


@dataclass(frozen=True)
class Kind:
    """What a value may be, in words and as a test."""

    says: str
    fits: Callable[[Any], bool]

    def or_auto(self) -> "Kind":
        """Return the same, or the word "auto"."""
        return Kind(f'{self.says}, or "auto"', lambda v: v == "auto" or self.fits(v))

    def or_null(self) -> "Kind":
        """Return the same, or null."""
        return Kind(f"{self.says}, or null", lambda v: v is None or self.fits(v))


Schema = Mapping[str, "Kind | Schema"]
MOST = 1 << 62  # of a size


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, and no boolean."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def whole(low: int, says: str) -> Kind:
    """Whole numbers from `low`."""
    return Kind(says, lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v < MOST)


def between(low: float, high: float) -> Kind:
    """Numbers in [low, high]."""
    return Kind(f"a number from {low:g} to {high:g}", lambda v: is_number(v) and low <= v <= high)


def one_of(*choices: Any) -> Kind:
    """One of `choices`, of the same type."""
    words = ", ".join(map(str, choices[:-1])) + f" or {choices[-1]}"
    return Kind(words, lambda v: any(type(v) is type(c) and v == c for c in choices))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


BOOL = Kind("true or false", lambda v: isinstance(v, bool))
COUNT = whole(0, "a whole number >= 0")
POSITIVE = whole(1, "a positive whole number")
SHARE = between(0, 1)
TEXT = Kind("text", _is_text)
TEXTS = Kind("a list of texts", lambda v: isinstance(v, list) and all(map(_is_text, v)))
DTYPE = one_of("fp32", "bf16", "fp16", "float32", "bfloat16", "float16").or_null()
INTERVAL = Kind('a positive whole number or "auto"', lambda v: v == "auto" or POSITIVE.fits(v))
ANY = Kind("anything", lambda v: True)
POLICY = one_of("Warn", "Ignore", "Fail", "WARN", "IGNORE", "FAIL", "warn", "ignore", "fail")


def _each(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


# Set from the size of the model's blocks where they are left out or "auto" (see ds_sizes).
SIZES = (
    "stage3_prefetch_bucket_size stage3_max_live_parameters stage3_max_reuse_distance"
    " stage3_param_persistence_threshold reduce_bucket_size sub_group_size"
)

OFFLOAD: Schema = {
    "device": one_of("none", "cpu", "nvme"),
    "nvme_path": TEXT.or_null(),
    "buffer_count": COUNT,
    "pin_memory": BOOL,
}
ZERO: Schema = {
    "stage": one_of(0, 1, 2, 3),
    **_each(COUNT.or_auto(), SIZES),
    "reduce_bucket_size": POSITIVE.or_auto(),
    **_each(COUNT, "allgather_bucket_size stage3_model_persistence_threshold stage3_module_granularity_threshold"),
    **_each(COUNT, "zero_hpz_partition_size"),
    "overlap_comm": BOOL.or_null(),
    **_each(
        BOOL,
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions compute_grad_norm"
        " load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save"
        " stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters legacy_stage1"
        " round_robin_gradients parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights"
        " zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply"
        " log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
    ),
    "offload_param": {**OFFLOAD, **_each(COUNT, "buffer_size max_in_cpu")},
    "offload_optimizer": {
        **OFFLOAD,
        **_each(BOOL, "pipeline_read pipeline_write fast_init super_offload"),
        **_each(SHARE, "ratio cpuadam_cores_perc"),
    },
    "zenflow": {
        "topk_ratio": Kind("a number between 0 and 1", lambda v: is_number(v) and 0 < v < 1),
        "select_strategy": one_of("auto", "step", "epoch"),
        **_each(INTERVAL, "select_interval update_interval"),
        **_each(BOOL, "overlap_step offload"),
        **_each(SHARE, "auto_ratio pt_reserved_cores_perc"),
        "full_warm_up_rounds": COUNT,
    },
    "leaf_module": _each(
        Kind("a name, or a list of names", lambda v: TEXT.fits(v) or TEXTS.fits(v)), "classes names name_suffixes"
    ),
}
_LOG_FILES = {"enabled": BOOL, **_each(TEXT, "output_path job_name")}
# Every top-level key of DeepSpeed 0.19 that this trainer can honour.
SCHEMA: Schema = {
    **_each(POSITIVE.or_auto(), "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    "gradient_clipping": Kind('a number >= 0 (0 = off), or "auto"', lambda v: v == "auto" or (is_number(v) and v >= 0)),
    **_each(
        BOOL,
        "managed_gradient_accumulation disable_allgather zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
        " wall_clock_breakdown memory_breakdown dump_state disable_python_gc dataloader_drop_last",
    ),
    "steps_per_print": POSITIVE.or_null(),
    "vocabulary_size": POSITIVE.or_null(),
    "communication_data_type": one_of("fp32", "bf16", "fp16").or_null(),
    "log_level": TEXT,
    "zero_optimization": ZERO,
    "optimizer": {"type": TEXT, "params": ANY, "legacy_fusion": BOOL},
    "scheduler": {"type": TEXT, "params": ANY},
    "bf16": {
        "enabled": Kind('true, false or "auto"', lambda v: isinstance(v, bool) or v == "auto"),
        **_each(BOOL, "immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"),
    },
    "fp16": {
        "enabled": Kind('true, false or "auto"', lambda v: isinstance(v, bool) or v == "auto"),
        **_each(BOOL, "auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        "loss_scale": between(0, 2.0**31),
        **_each(COUNT, "initial_scale_power loss_scale_window hysteresis min_loss_scale"),
    },
    "data_types": {
        **_each(DTYPE, "grad_accum_dtype param_dtype buffer_dtype"),
        "keep_in_fp32_modules": TEXTS.or_auto(),
    },
    "activation_checkpointing": {
        **_each(
            BOOL,
            "partition_activations contiguous_memory_optimization cpu_checkpointing synchronize_checkpoint_boundary"
            " profile",
        ),
        "number_checkpoints": COUNT.or_null(),
    },
    "aio": {
        **_each(POSITIVE, "block_size queue_depth intra_op_parallelism"),
        **_each(BOOL, "single_submit overlap_events use_gds"),
    },
    "checkpoint": {
        "tag_validation": POLICY,
        **_each(BOOL, "checkpoint_serialization load_universal use_node_local_storage"),
        "parallel_write": {"pipeline_stage": BOOL},
        "writer": {
            "type": one_of("fast", "python", "mock", "FAST", "PYTHON", "MOCK"),
            **_each(BOOL, "decoupled io_buffer_double show_statistics"),
            **_each(POSITIVE, "io_buffer_size io_multiplier"),
            "data_parallel": one_of("replica", "socket", "machine", "REPLICA", "SOCKET", "MACHINE").or_null(),
        },
    },
    "flops_profiler": {
        **_each(BOOL, "enabled detailed"),
        "recompute_fwd_factor": between(0, 100),
        **_each(POSITIVE, "profile_step top_modules"),
        "module_depth": whole(-1, "a whole number >= -1 (-1 = the innermost)"),
        "output_file": TEXT.or_null(),
    },
    "comms_logger": {**_each(BOOL, "enabled prof_all verbose debug"), "prof_ops": TEXTS},
    "tensorboard": _LOG_FILES,
    "csv_monitor": _LOG_FILES,
    "wandb": {"enabled": BOOL, "project": TEXT, **_each(TEXT.or_null(), "group team")},
    "comet": {
        "enabled": BOOL,
        "samples_log_interval": POSITIVE,
        **_each(TEXT.or_null(), "project workspace api_key experiment_name experiment_key mode"),
        "online": BOOL.or_null(),
    },
    "timers": {"throughput": _each(BOOL, "enabled synchronized")},
    "compile": {
        **_each(
            BOOL,
            "deepcompile autoep_non_moe free_activation offload_activation offload_activation_pin_memory"
            " offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce"
            " sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors"
            " keep_all_input_tensors",
        ),
        "free_activation_threshold": COUNT,
        "passes": Kind(
            "a list of z1, z3, autosp and autotp, or null",
            lambda v: v is None or (TEXTS.fits(v) and {*v} <= {"z1", "z3", "autosp", "autotp"}),
        ),
    },
}
# DeepSpeed knows them, or once did; they would change what is computed behind the trainer's back, or do nothing.
UNSUPPORTED = frozenset(
    """
    amp torch_autocast gradient_allreduce_op gradient_predivide_factor prescale_gradients sparse_gradients
    seq_parallel_communication_data_type sequence_parallel_size tensor_parallel expert_parallel hybrid_engine pipeline
    data_efficiency curriculum_learning compression_training weight_quantization sparse_attention elasticity autotuning
    use_data_before_expert_parallelism nebula datastates_ckpt eigenvalue graph_harvesting progressive_layer_drop
    quantize_training
    """.split()
)
# Older names that DeepSpeed still takes with a warning, and what to write instead.
RENAMED = {
    "zero_optimization.cpu_offload": 'zero_optimization.offload_optimizer: {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'zero_optimization.offload_param: {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory in offload_optimizer or offload_param",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
NULLABLE = ("offload_param", "offload_optimizer", "zenflow", "aio", "writer")


def faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each unknown key and each value that is not of its kind, at every level."""
    for key in config:
        if key in UNSUPPORTED:
            yield f"{key!r} is not supported by this trainer; remove it"
    yield from _faults({key: value for key, value in config.items() if key not in UNSUPPORTED}, SCHEMA, "")


def _faults(values: Mapping[str, Any], schema: Schema, prefix: str) -> Iterator[str]:
    for key, value in values.items():
        dotted = prefix + key
        kind = schema.get(key)
        if kind is None:
            yield _unknown(key, schema, dotted)
        elif isinstance(kind, Kind):
            if not kind.fits(value):
                yield f"{dotted} must be {kind.says}, not {value!r:.80}"
        elif isinstance(value, dict):
            yield from _faults(value, kind, dotted + ".")
        elif value is not None or key not in NULLABLE:
            example = ' such as {"device": "cpu"}' if key.startswith("offload_") else ""
            yield f"{dotted} must be an object{example}, not {value!r:.80}"


def _unknown(key: str, schema: Schema, dotted: str) -> str:
    if instead := RENAMED.get(dotted):
        return f"{dotted} is an old name; write {instead}"
    near = did_you_mean(key, [*schema, *(UNSUPPORTED if schema is SCHEMA else ())])
    if places := [place for place in _places(SCHEMA, "") if place.endswith(f".{key}") or place == key]:
        near = f"; it belongs at {places[0]}" if len(places) == 1 else near
    return f"unknown key {dotted!r:.120}{near}"


def _places(schema: Schema, prefix: str) -> Iterator[str]:
    for key, kind in schema.items():
        yield prefix + key
        if not isinstance(kind, Kind):
            yield from _places(kind, f"{prefix}{key}.")
