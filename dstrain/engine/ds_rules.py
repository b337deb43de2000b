"""What of a ds_config does not go together, what needs a GPU, and what has no effect.

Values are taken to be of their kinds (see ds_schema). The rules are those of DeepSpeed 0.19.8, most of which it
asserts only when the model is loaded, and this trainer's own.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dstrain.config import Recipe
from dstrain.errors import did_you_mean

FP16 = ("fp16", "float16")


def stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage, 0 to 3."""
    return config.get("zero_optimization", {}).get("stage", 0)


def offload(config: Mapping[str, Any], what: str) -> str:
    """Return where "param" or "optimizer" state is kept: "none", "cpu" or "nvme"."""
    section = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return section.get("device", "none")


def contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each setting that cannot be together with another, or with this trainer."""
    zero, level = config.get("zero_optimization", {}), stage(config)
    if config.get("fp16", {}).get("enabled") is True:
        yield 'fp16 overflows in these models; use "bf16": {"enabled": true}'
    if not config.get("managed_gradient_accumulation", True):
        yield "managed_gradient_accumulation must be true; the trainer marks the boundaries itself"
    if zero.get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm must be true; the norm is logged and guarded"
    if zero.get("legacy_stage1"):
        yield "zero_optimization.legacy_stage1 is no longer in DeepSpeed; remove it"
    if zero.get("round_robin_gradients") and level in (1, 2):
        yield (
            f"zero_optimization.round_robin_gradients = true reorders the weights of stage {level} under the names that"
            " checkpoints give them; remove it"
        )
    if offload(config, "param") != "none" and level != 3:
        yield f"zero_optimization.offload_param needs stage 3, not {level}"
    if offload(config, "optimizer") != "none" and level == 0:
        yield "zero_optimization.offload_optimizer needs stage 1, 2 or 3, not 0"
    for what in ("param", "optimizer"):
        if offload(config, what) == "nvme":
            yield from _nvme(f"zero_optimization.offload_{what}.nvme_path", zero[f"offload_{what}"].get("nvme_path"))
    yield from _optimizer_offload(config)
    yield from _refused(config)
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key) and level != 3:
            yield f"zero_optimization.{key} needs stage 3, not {level}"
    if (size := zero.get("zero_hpz_partition_size", 1)) > 1 and level != 3:
        yield f"zero_optimization.zero_hpz_partition_size = {size} needs stage 3, not {level}"
    yield from _bf16(config)


def _nvme(key: str, folder: str | None) -> Iterator[str]:
    if not folder or not Path(folder).is_dir():
        yield f"{key} must be a folder on a fast local disk, not {folder!r}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield f"{key} = {folder!r} cannot be written to; choose another folder, or change its owner"


def _optimizer_offload(config: Mapping[str, Any]) -> Iterator[str]:
    key, level, device = "zero_optimization.offload_optimizer", stage(config), offload(config, "optimizer")
    section = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if (ratio := section.get("ratio", 1)) < 1:
        if level != 3:
            yield f"{key}.ratio = {ratio:g} (Twin-Flow) needs stage 3, not {level}"
        elif device != "cpu":
            yield f'{key}.ratio = {ratio:g} (Twin-Flow) needs "device": "cpu" beside it, not {device!r}'


def _refused(config: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed has, and what does not work with checkpoints, accumulation or blocks as they are here."""
    zero = config.get("zero_optimization", {})
    if (zero.get("offload_optimizer") or {}).get("super_offload"):
        yield (
            "zero_optimization.offload_optimizer.super_offload keeps the moments in a process of its own, where no"
            " checkpoint can reach them; remove it"
        )
    if zero.get("zenflow") is not None:
        yield (
            "zero_optimization.zenflow moves most weights late and counts on equally many micro-steps in every step;"
            " remove it"
        )
    if config.get("compile", {}).get("deepcompile"):
        yield "compile.deepcompile cannot see into blocks that are gathered as one (leaf modules); remove it"
    if (dtype := config.get("communication_data_type")) in FP16:
        yield f'communication_data_type = {dtype!r} overflows in these models; use "bf16" or "fp32"'
    if (dtype := config.get("data_types", {}).get("grad_accum_dtype")) in FP16:
        yield f'data_types.grad_accum_dtype = {dtype!r} overflows in these models; use "fp32" or "bf16"'
    for monitor in ("wandb", "comet"):
        if config.get(monitor, {}).get("enabled"):
            yield f"{monitor}.enabled must be false, as the trainer logs itself; use the recipe's tracking.wandb"


def _bf16(config: Mapping[str, Any]) -> Iterator[str]:
    section = config.get("bf16", {})
    if section.get("check_grad_overflow") is False:
        yield "bf16.check_grad_overflow must be true; a NaN in the gradients would reach the weights"
    if section.get("bf16_optimizer_states") and not section.get("bf16_master_weights_and_grads"):
        yield "bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads: true"
    if section.get("bf16_master_weights_and_grads"):
        if section.get("enabled", False) is False:
            yield "bf16.bf16_master_weights_and_grads needs bf16.enabled: true"
        if stage(config) == 0:
            yield "bf16.bf16_master_weights_and_grads needs zero_optimization.stage 1, 2 or 3, not 0"
        elif (
            section.get("enabled")
            and offload(config, "optimizer") == "none"
            and not section.get("bf16_optimizer_states")
        ):
            yield (
                "bf16.bf16_master_weights_and_grads = true needs bf16.bf16_optimizer_states: true beside it, or"
                ' zero_optimization.offload_optimizer: {"device": "cpu"}'
            )


def conflicts(config: Mapping[str, Any], recipe: Recipe, *, bf16: bool, classes: Collection[str] = ()) -> Iterator[str]:
    """Yield a sentence for each setting that does not go with the recipe, the weights' dtype or the model.

    Args:
        config: without contradictions of its own.
        recipe: settled with it.
        bf16: whether weights are bf16, otherwise fp32.
        classes: module.qualname of the model's modules' classes; empty = not known, nothing is said of them.
    """
    zero, weights = config.get("zero_optimization", {}), "bf16" if bf16 else "fp32"
    where, name = offload(config, "optimizer"), recipe.optimizer.name
    if name != "adamw" and (ratio := (zero.get("offload_optimizer") or {}).get("ratio", 1)) < 1:
        yield (
            f"zero_optimization.offload_optimizer.ratio = {ratio:g} (Twin-Flow) needs DeepSpeedCPUAdam, which"
            f" optimizer.name {name} is not; set it to 1, or optimizer.name to adamw"
        )
    if name != "adamw" and where != "none" and config.get("bf16", {}).get("bf16_master_weights_and_grads"):
        yield (
            "bf16.bf16_master_weights_and_grads = true with zero_optimization.offload_optimizer needs DeepSpeedCPUAdam,"
            f" which optimizer.name {name} is not; remove it, or set optimizer.name to adamw"
        )
    dtype = config.get("data_types", {}).get("grad_accum_dtype")
    if (
        stage(config) == 0
        and dtype is not None
        and {"float32": "fp32", "bfloat16": "bf16"}.get(dtype, dtype) != weights
    ):
        yield (
            f"data_types.grad_accum_dtype = {dtype!r} beside {weights} weights needs zero_optimization.stage 1, 2 or 3,"
            " not 0; remove it, or set the stage to 1"
        )
    if offload(config, "param") == "nvme":
        wishes = {"ema.decay": recipe.ema.decay, "sample.every": recipe.sample.every}
        for key, value in wishes.items():
            if value:
                yield (
                    f"{key} = {value:g}: ema and sample.every do not go with zero_optimization.offload_param nvme; set"
                    f' {key} to 0, or offload_param.device to "cpu"'
                )
    if where == "nvme" and recipe.ema.decay:
        yield (
            f"ema.decay = {recipe.ema.decay:g}: ema does not go with zero_optimization.offload_optimizer nvme; set it"
            ' to 0, or offload_optimizer.device to "cpu"'
        )
    given = zero.get("leaf_module", {}).get("classes", [])
    known = {*classes, *(name.rpartition(".")[2] for name in classes)}  # DeepSpeed takes both spellings
    for leaf in [given] if isinstance(given, str) else given:
        if known and leaf not in known:
            yield (
                f"zero_optimization.leaf_module.classes has {leaf!r:.120}, and the model has no such"
                f" module{did_you_mean(leaf, known)}; correct or remove it"
            )


def gpu_only(config: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of what is switched on and runs on NVIDIA GPUs only."""
    zero = config.get("zero_optimization", {})
    switched = {
        "aio.use_gds": (config.get("aio") or {}).get("use_gds"),
    }
    quantized = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    switched |= {f"zero_optimization.{key}": zero.get(key) for key in quantized}
    return [key for key, on in switched.items() if on]


# Keys that only these stages look at.
STAGES = {
    "sub_group_size": (3,),
    "memory_efficient_linear": (3,),
    "leaf_module": (3,),
    "pipeline_loading_checkpoint": (3,),
    "round_robin_gradients": (1, 2),
    "parameter_alignment": (1, 2),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "allgather_bucket_size": (1, 2),
    "allgather_partitions": (1, 2),
    "overlap_comm": (1, 2, 3),
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
}


def idle(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each setting that has no effect beside the others."""
    zero, level = config.get("zero_optimization", {}), stage(config)
    for key in zero:
        stages = (3,) if key.startswith("stage3_") else STAGES.get(key, (0, 1, 2, 3))
        if level not in stages:
            yield f"zero_optimization.{key} has no effect at stage {level}"
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.get(key, "auto") != "auto":
            yield f"{key} = {config[key]} has no effect here; the recipe's batch.tokens_per_pack decides"
    if "activation_checkpointing" in config:
        yield "activation_checkpointing has no effect here; the recipe's model.activations says what blocks keep"
    if "compile" in config:
        yield "compile has no effect here; kernels are compiled, not the blocks"
    if "checkpoint" in config:
        yield "checkpoint has no effect here; this trainer writes its own checkpoints"
    for what in ("param", "optimizer"):
        section = zero.get(f"offload_{what}") or {}
        if section.get("nvme_path") and section.get("device") != "nvme":
            yield f'zero_optimization.offload_{what}.nvme_path has no effect without "device": "nvme"'
    if "aio" in config and "nvme" not in (offload(config, "param"), offload(config, "optimizer")):
        yield 'aio has no effect without an offload to "device": "nvme"'
