"""ds_configs: every key at every level, what contradicts what, and what is filled in."""

import json
from pathlib import Path

import pytest
import torch

from dstrain.config import Recipe
from dstrain.engine import ds_schema
from dstrain.engine.ds_config import check_sections, complete, faults, load, read_ds_config, settle, uses_bf16
from dstrain.engine.ds_rules import gpu_only, idle
from dstrain.engine.ds_schema import SCHEMA, UNSUPPORTED, ZERO, Kind
from dstrain.engine.ds_sizes import sizes
from dstrain.engine.lr import lr_factor
from dstrain.errors import ConfigError
from dstrain.knobs import build

ROOT = Path(__file__).parents[2]
PATH = Path("ds.json")
CPU = {"device": "cpu"}
LOW = {"enabled": True, "bf16_master_weights_and_grads": True}
TWIN_FLOW = {"stage": 3, "offload_optimizer": {**CPU, "ratio": 0.4}}


def tree(dotted: str, value: object) -> dict:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def recipe(**sections: dict) -> Recipe:
    """A recipe with nothing of the optimizer stated but `stated`."""
    stated = sections.pop("stated", ())
    base = {
        "run_dir": "x",
        "model": {"path": "x"},
        "data": {"shards": ["x"]},
        "batch": {"global_batch_size": 8},
        "train": {"steps": 100},
    }
    made = build(Recipe, base | sections, "test")
    object.__setattr__(made, "stated", frozenset(stated))
    return made


def read(tmp_path: Path, text: str | dict) -> dict:
    path = tmp_path / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return read_ds_config(path)


# bad values as JSON | the keys that must refuse each of them
TABLE = """
"true" 1 null | zero_optimization.contiguous_gradients zero_optimization.reduce_scatter bf16.check_grad_overflow
"true" 0 null | zero_optimization.round_robin_gradients zero_optimization.zero_quantized_weights dump_state
"yes" 2 [] | zero_optimization.offload_param.pin_memory zero_optimization.offload_optimizer.pin_memory
"on" 1 {} | zero_optimization.offload_optimizer.super_offload zero_optimization.zenflow.overlap_step
"false" 0 | wall_clock_breakdown managed_gradient_accumulation bf16.immediate_grad_update compile.deepcompile
"false" 0.0 | aio.single_submit aio.overlap_events aio.use_gds flops_profiler.enabled comms_logger.enabled
"true" 1 null | tensorboard.enabled csv_monitor.enabled wandb.enabled timers.throughput.enabled fp16.auto_cast
"true" 1 null | checkpoint.load_universal checkpoint.parallel_write.pipeline_stage checkpoint.writer.decoupled
"true" 1 | activation_checkpointing.profile activation_checkpointing.cpu_checkpointing
"3" -1 4 2.5 3.0 true null NaN | zero_optimization.stage
-1 "5e8" 1.5 true null [] | zero_optimization.reduce_bucket_size zero_optimization.stage3_prefetch_bucket_size
-5 "many" 0.1 false | zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
-1 1e400 NaN "1e5" | zero_optimization.stage3_param_persistence_threshold zero_optimization.sub_group_size
-1 "4" 0.5 | zero_optimization.offload_param.buffer_count zero_optimization.offload_optimizer.buffer_count
-1 1.5 9223372036854775808 | zero_optimization.offload_param.buffer_size zero_optimization.offload_param.max_in_cpu
-8 "8" 1.5 true | zero_optimization.zero_hpz_partition_size zero_optimization.allgather_bucket_size
-0.1 1.1 NaN Infinity "half" true null | zero_optimization.offload_optimizer.ratio
-0.1 2 "all" | zero_optimization.offload_optimizer.cpuadam_cores_perc zero_optimization.zenflow.auto_ratio
0 1 -0.5 "0.1" | zero_optimization.zenflow.topk_ratio
0 -1 1.5 "often" | zero_optimization.zenflow.update_interval zero_optimization.zenflow.select_interval
"gpu" "CPU" null 1 | zero_optimization.offload_param.device zero_optimization.offload_optimizer.device
"epochs" null 1 | zero_optimization.zenflow.select_strategy
1 [] true | zero_optimization.offload_param.nvme_path
3 {} [1] null | zero_optimization.leaf_module.classes zero_optimization.leaf_module.names
"cpu" true 1 [] | zero_optimization.offload_param zero_optimization.offload_optimizer zero_optimization.zenflow
3 true null "3" | zero_optimization bf16 data_types
[] "on" 1 | activation_checkpointing checkpoint compile timers timers.throughput optimizer scheduler
"yes" 1 null "Auto" | bf16.enabled fp16.enabled
-1 "1.0" null true NaN -Infinity 1e999 | gradient_clipping
0 -1 "8" 1.5 true null | train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
0 -1 "8" 1.5 | steps_per_print aio.block_size aio.queue_depth aio.intra_op_parallelism
"fp8" 32 true | data_types.grad_accum_dtype data_types.param_dtype data_types.buffer_dtype
"int8" 16 | communication_data_type
"rope" [1] null | data_types.keep_in_fp32_modules
-2 "all" 0.5 | flops_profiler.module_depth
["z2"] "z3" 3 | compile.passes
"always" null | checkpoint.tag_validation
"slow" 1 | checkpoint.writer.type
1 null | log_level tensorboard.output_path csv_monitor.job_name
"all" [1] | comms_logger.prof_ops
"""
ROWS = [line.split(" | ") for line in TABLE.strip().splitlines()]
BAD = [(key, value) for values, keys in ROWS for key in keys.split() for value in values.split()]


def test_the_table_is_long_enough():
    assert len(BAD) >= 150


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_value_that_cannot_be_is_refused_by_its_full_key(tmp_path, key, value):
    with pytest.raises(ConfigError) as e:
        read(tmp_path, json.dumps(tree(key, "@")).replace('"@"', value))
    said = str(e.value)
    assert said.startswith(f"{tmp_path / 'ds.json'}: ")
    if value in ("NaN", "Infinity", "-Infinity"):
        assert f"not JSON: {value}" in said
    else:
        assert f": {key} must be " in said
        assert said.count("\n") == 0


def typos(name: str) -> set[str]:
    """At every letter a slip: it is missing, doubled, swapped with the next or mistaken, in turn."""
    found = set()
    for i, letter in enumerate(name):
        slips = ("", letter * 2, name[i + 1 : i + 2] + letter, "j")
        found.add(name[:i] + slips[i % 4] + name[i + 1 + (i % 4 == 2) :])
    return found - {name}


SECTIONS = {
    "": SCHEMA,
    "zero_optimization.": ZERO,
    "zero_optimization.offload_param.": ZERO["offload_param"],
    "zero_optimization.offload_optimizer.": ZERO["offload_optimizer"],
    "zero_optimization.zenflow.": ZERO["zenflow"],
    "zero_optimization.leaf_module.": ZERO["leaf_module"],
    **{f"{name}.": SCHEMA[name] for name in ("bf16", "data_types", "aio", "compile", "flops_profiler", "wandb")},
}
TWINS = {"bf16", "fp16"}  # a letter from each other


@pytest.mark.parametrize("prefix", SECTIONS)
def test_a_slip_of_one_letter_finds_the_name_that_was_meant(prefix):
    known = {*SECTIONS[prefix], *UNSUPPORTED}
    for name in SECTIONS[prefix]:
        for typo in typos(name) - known if name not in TWINS else ():
            (fault,) = faults(tree(prefix + typo, True))
            assert fault.startswith(f"unknown key {prefix + typo!r}, did you mean {name!r}?"), fault


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("offload_optimizer", "it belongs at zero_optimization.offload_optimizer"),
        ("stage3_prefetch_bucket_size", "it belongs at zero_optimization.stage3_prefetch_bucket_size"),
        ("zero_optimization.gradient_clipping", "it belongs at gradient_clipping"),
        ("zero_optimization.super_offload", "it belongs at zero_optimization.offload_optimizer.super_offload"),
        ("zero_optimization.prefetch_bucket_size", "did you mean 'stage3_prefetch_bucket_size'"),
        ("zero_optimization.cpu_offload", 'write zero_optimization.offload_optimizer: {"device": "cpu"}'),
        ("zero_optimization.stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
        ("torch_autocast", "not supported by this trainer"),
        ("elasticity", "not supported by this trainer"),
        ("tensor_paralel", "did you mean 'tensor_parallel'"),
    ],
)
def test_keys_in_another_place_or_of_another_time(key, says):
    (fault,) = faults(tree(key, True))
    assert key.rpartition(".")[2] in fault
    assert says in fault


def test_all_faults_are_found_not_only_the_first():
    config = {"gradient_cliping": 1, "zero_optimization": {"stage": "3", "offload_param": {"devise": "cpu"}}}
    found = list(faults(config))
    assert len(found) == 3
    assert "gradient_cliping" in found[0]
    assert "zero_optimization.stage" in found[1]
    assert "zero_optimization.offload_param.devise" in found[2]


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"stage": 2, "offload_param": CPU}, "offload_param needs stage 3, not 2"),
        ({"offload_optimizer": CPU}, "offload_optimizer needs stage 1, 2 or 3, not 0"),
        ({"stage": 2, "offload_optimizer": {**CPU, "ratio": 0.5}}, "ratio = 0.5 (Twin-Flow) needs stage 3, not 2"),
        ({"stage": 3, "offload_optimizer": {"ratio": 0.5}}, 'ratio = 0.5 (Twin-Flow) needs "device": "cpu"'),
        ({"stage": 3, "offload_optimizer": {**CPU, "super_offload": True}}, "super_offload keeps the moments"),
        ({"stage": 2, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size = 8 needs stage 3"),
        ({"stage": 1, "zero_quantized_weights": True}, "zero_quantized_weights needs stage 3"),
        ({"stage": 2, "zero_quantized_gradients": True}, "zero_quantized_gradients needs stage 3"),
        (
            {"stage": 2, "zero_quantized_nontrainable_weights": True},
            "zero_quantized_nontrainable_weights needs stage 3",
        ),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.nvme_path must be a folder"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/none"}}, "not '/none'"),
        ({"stage": 2, "offload_optimizer": CPU, "zenflow": {"offload": True}}, "zenflow moves most weights late"),
        ({"stage": 1, "compute_grad_norm": False}, "compute_grad_norm must be true"),
        ({"stage": 1, "legacy_stage1": True}, "legacy_stage1"),
        ({"stage": 1, "round_robin_gradients": True}, "round_robin_gradients = true reorders the weights of stage 1"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients = true reorders the weights of stage 2"),
    ],
)
def test_contradictions_in_zero(zero, says):
    (fault,) = faults({"zero_optimization": zero})
    assert says in fault


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"fp16": {"enabled": True}}, '"bf16": {"enabled": true}'),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation must be true"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "needs bf16.bf16_master_weights_and_grads"),
        ({"bf16": {"bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 2}}, "needs bf16.enabled"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "stage 1, 2 or 3, not 0"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 3}},
            "needs bf16.bf16_optimizer_states: true beside it, or zero_optimization.offload_optimizer: ",
        ),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow must be true"),
        ({"communication_data_type": "fp16"}, "communication_data_type = 'fp16' overflows"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "data_types.grad_accum_dtype = 'fp16' overflows"),
        ({"data_types": {"grad_accum_dtype": "float16"}}, "data_types.grad_accum_dtype = 'float16' overflows"),
        ({"wandb": {"enabled": True}}, "wandb.enabled must be false"),
        ({"comet": {"enabled": True}}, "use the recipe's tracking.wandb"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile cannot see into blocks"),
    ],
)
def test_contradictions_elsewhere(config, says):
    (fault,) = faults(config)
    assert says in fault


def test_a_disk_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    (fault,) = faults({"zero_optimization": zero})
    assert f"nvme_path = {str(tmp_path)!r} cannot be written to" in fault


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 3, "offload_param": None, "offload_optimizer": {**CPU, "ratio": 0.4}}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "reduce_bucket_size": "auto"}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8, "leaf_module": {"classes": "Block"}}},
        {"aio": None, "steps_per_print": None, "communication_data_type": None},
        {"fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"},
        {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 4},
        {"wandb": {"enabled": False}, "comet": {}, "communication_data_type": "bf16"},
        {"bf16": {"enabled": True, "check_grad_overflow": True}, "data_types": {"grad_accum_dtype": "bf16"}},
        {"zero_optimization": {"stage": 2, "round_robin_gradients": False}},
        {"bf16": LOW, "zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
        {"bf16": {**LOW, "bf16_optimizer_states": True}, "zero_optimization": {"stage": 3}},
    ],
)
def test_what_is_right_is_taken(tmp_path, config):
    read(tmp_path, config)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_the_shipped_ones_are_right(path, tmp_path, monkeypatch):
    config = load(path)
    for what in ("offload_param", "offload_optimizer"):
        if "nvme_path" in (section := config.get("zero_optimization", {}).get(what) or {}):
            section["nvme_path"] = str(tmp_path)
    assert list(faults(config)) == []
    assert list(idle(config)) == []


def test_sizes_may_be_written_with_an_exponent(tmp_path):
    zero = read(tmp_path, '{"zero_optimization": {"stage": 3, "sub_group_size": 2e8}}')["zero_optimization"]
    assert zero["sub_group_size"] == 200_000_000
    assert isinstance(zero["sub_group_size"], int)


def test_a_number_of_very_many_digits(tmp_path):
    with pytest.raises(ConfigError, match=r"reduce_bucket_size must be|not readable"):
        read(tmp_path, '{"zero_optimization": {"reduce_bucket_size": ' + "9" * 5000 + "}}")


def test_a_key_that_stands_twice_in_a_section(tmp_path):
    with pytest.raises(ConfigError, match="'stage' stands twice"):
        read(tmp_path, '{"zero_optimization": {"stage": 2, "stage": 3}}')


def test_the_older_name_of_bf16(tmp_path):
    assert uses_bf16(read(tmp_path, {"bfloat16": {"enabled": True}}), hardware_bf16=False)
    with pytest.raises(ConfigError, match="bf16"):
        read(tmp_path, {"bfloat16": 3})


# The table against the installed DeepSpeed.


def fields(model: type) -> dict:
    return {f.alias or name: f for name, f in model.model_fields.items()}


def test_the_tables_are_deepspeeds_own():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    pairs = [
        (DeepSpeedZeroConfig, ZERO),
        (DeepSpeedZeroOffloadParamConfig, ZERO["offload_param"]),
        (DeepSpeedZeroOffloadOptimizerConfig, ZERO["offload_optimizer"]),
        (ZenFlowConfig, ZERO["zenflow"]),
        (DeepSpeedZeroLeafModuleConfig, ZERO["leaf_module"]),
        (DeepSpeedBF16Config, SCHEMA["bf16"]),
        (DeepSpeedFP16Config, SCHEMA["fp16"]),
        (CommsLoggerConfig, SCHEMA["comms_logger"]),
        (CompileConfig, SCHEMA["compile"]),
        (TensorBoardConfig, SCHEMA["tensorboard"]),
        (CSVConfig, SCHEMA["csv_monitor"]),
        (WandbConfig, SCHEMA["wandb"]),
        (CometConfig, SCHEMA["comet"]),
        (DeepSpeedThroughputTimerConfig, SCHEMA["timers"]["throughput"]),
    ]
    unbounded = {"stage3_model_persistence_threshold"}  # sys.maxsize: no bound
    hidden = {"steps_per_epoch"} | {key.rpartition(".")[2] for key in ds_schema.RENAMED}
    for model, schema in pairs:
        theirs = fields(model)
        assert set(theirs) - hidden == set(schema), model
        for key, kind in schema.items():
            if isinstance(kind, Kind) and theirs[key].default_factory is None and key not in unbounded:
                # A size of theirs is an int with another repr, and a stage an enum.
                default = theirs[key].default
                default = int(default) if isinstance(default, int) and not isinstance(default, bool) else default
                assert kind.fits(default), (model, key, default)


def test_the_sections_that_deepspeed_reads_key_by_key():
    from deepspeed.profiling import constants as profiler
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.model_checkpointing import constants as checkpoint
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert set(ACT_CHKPT_DEFAULT) == set(SCHEMA["activation_checkpointing"])
    assert set(AIO_DEFAULT_DICT) == set(SCHEMA["aio"])
    suffixes = ("_DEFAULT", "_FORMAT")
    names = {v for k, v in vars(profiler).items() if k.startswith("FLOPS_PROFILER_") and not k.endswith(suffixes)}
    assert names == set(SCHEMA["flops_profiler"])
    writer = "TYPE IO_BUFFER_SIZE IO_BUFFER_DOUBLE IO_MULTIPLIER IO_STATISTICS DATA_PARALLEL WRITER_DECOUPLED"
    names = {getattr(checkpoint, f"CHECKPOINT_{'WRITER_' * (n == 'TYPE')}{n}") for n in writer.split()}
    assert names == set(SCHEMA["checkpoint"]["writer"])
    assert {checkpoint.CHECKPOINT_WRITER, checkpoint.CHECKPOINT_SERIALIZATION} <= set(SCHEMA["checkpoint"])


# What is filled in.


def full(config: dict, recipe_: Recipe | None = None, **more: int) -> dict:
    return complete(config, recipe_ or recipe(), world_size=more.pop("world", 2), bf16=True, path=PATH, **more)


BLOCK, LARGEST = 339_831_296, 56_623_104  # of Qwen-Image


def test_stage_3_works_in_blocks():
    zero = full({"zero_optimization": {"stage": 3}}, block=BLOCK, largest=LARGEST)["zero_optimization"]
    assert zero == {
        "stage": 3,
        "reduce_bucket_size": BLOCK // 2,
        "stage3_prefetch_bucket_size": BLOCK,
        "stage3_max_live_parameters": 3 * BLOCK,
        "stage3_max_reuse_distance": BLOCK + BLOCK // 5,
        "stage3_param_persistence_threshold": 100_000,
        "sub_group_size": BLOCK,
    }
    assert full({"zero_optimization": {"stage": 3}})["zero_optimization"] == {"stage": 3}  # the block is not known


@pytest.mark.parametrize("level", [1, 2])
def test_lower_stages_have_a_bucket_only(level):
    zero = full({"zero_optimization": {"stage": level}}, block=BLOCK, largest=LARGEST)["zero_optimization"]
    assert zero == {"stage": level, "reduce_bucket_size": BLOCK // 2}


def test_stage_0_is_left_alone():
    assert full({}, block=BLOCK, largest=LARGEST)["zero_optimization"] == {}


def test_what_the_user_gives_is_honoured():
    given = {
        "stage": 3,
        "reduce_bucket_size": 7,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 1,
        "stage3_max_reuse_distance": 2,
        "stage3_param_persistence_threshold": 3,
        "sub_group_size": 4,
    }
    assert full({"zero_optimization": given}, block=BLOCK, largest=LARGEST)["zero_optimization"] == given


def test_auto_is_as_if_left_out(tmp_path):
    keys = ds_schema.SIZES.split()
    config = read(tmp_path, {"zero_optimization": {"stage": 3, **dict.fromkeys(keys, "auto")}})
    zero = full(config, block=BLOCK, largest=LARGEST)["zero_optimization"]
    assert zero == full({"zero_optimization": {"stage": 3}}, block=BLOCK, largest=LARGEST)["zero_optimization"]


def test_sizes_of_small_and_odd_models():
    for block, largest in [(1, 1), (1, 0), (10, 10_000), (2_000_000_003, 7)]:
        found = {k: s.elements for k, s in sizes({"zero_optimization": {"stage": 3}}, block, largest).items()}
        assert found["stage3_prefetch_bucket_size"] >= max(block, largest)  # one gather can take it whole
        assert found["stage3_max_live_parameters"] >= 2 * found["stage3_prefetch_bucket_size"]
        assert found["stage3_max_reuse_distance"] >= block
        assert 1 <= found["reduce_bucket_size"] <= 500_000_000
        assert found["sub_group_size"] >= 1
        check_sections({"zero_optimization": {"stage": 3, **found}}, PATH)


def test_twin_flow_has_smaller_tiles():
    zero = {"stage": 3, "offload_optimizer": {**CPU, "ratio": 0.5}}
    assert sizes({"zero_optimization": zero}, BLOCK, LARGEST)["sub_group_size"].elements == BLOCK // 2


def test_fp16_that_is_auto_and_a_scheduler_do_not_reach_deepspeed():
    config = {"fp16": {"enabled": "auto"}, "scheduler": warmup("WarmupLR")}
    done = full(config, settle(recipe(), config, PATH))
    assert {"fp16", "scheduler"}.isdisjoint(done)
    assert done["optimizer"]["type"] == "AdamW"


@pytest.mark.parametrize(
    ("config", "world", "says"),
    [
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, 12, "does not divide the 12 ranks"),
        ({"data_types": {"param_dtype": "fp32"}}, 2, "param_dtype = 'fp32', but weights are bf16"),
        ({"train_batch_size": 16}, 2, "global_batch_size 8"),
        ({"gradient_accumulation_steps": 3}, 2, "global_batch_size 8"),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}, 2, "global_batch_size 8"),
    ],
)
def test_what_the_ranks_and_the_recipe_do_not_allow(config, world, says):
    with pytest.raises(ConfigError, match=says):
        full(config, world=world)


@pytest.mark.parametrize(
    ("config", "sections", "says"),
    [
        ({"zero_optimization": TWIN_FLOW}, {"optimizer": {"name": "adamw_8bit"}}, ["ratio = 0.4", "DeepSpeedCPUAdam"]),
        (
            {"zero_optimization": TWIN_FLOW},
            {"optimizer": {"name": "muon"}},
            ["optimizer.name muon is not; set it to 1"],
        ),
        (
            {"bf16": LOW, "zero_optimization": {"stage": 3, "offload_optimizer": CPU}},
            {"optimizer": {"name": "adamw_8bit"}},
            ["bf16_master_weights_and_grads = true", "offload_optimizer", "optimizer.name adamw_8bit is not"],
        ),
        (
            {"bf16": LOW, "zero_optimization": {"stage": 3, "offload_optimizer": CPU}},
            {"optimizer": {"name": "muon"}},
            ["bf16_master_weights_and_grads = true", "optimizer.name muon is not", "set optimizer.name to adamw"],
        ),
        (
            {"bf16": LOW, "zero_optimization": {"stage": 1, "offload_optimizer": CPU}},  # the same assertion there
            {"optimizer": {"name": "adamw_8bit"}},
            ["bf16_master_weights_and_grads = true"],
        ),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, {}, ["grad_accum_dtype = 'fp32' beside bf16", "stage to 1"]),
        ({"data_types": {"grad_accum_dtype": "float32"}}, {}, ["grad_accum_dtype = 'float32' beside bf16"]),
    ],
)
def test_what_the_recipe_or_the_weights_do_not_allow(config, sections, says):
    with pytest.raises(ConfigError) as e:
        full(config, recipe(**sections))
    assert all(word in str(e.value) for word in ["ds.json: ", *says]), e.value


def test_sums_in_bf16_of_fp32_weights():
    config = {"data_types": {"grad_accum_dtype": "bf16"}}
    with pytest.raises(ConfigError, match="grad_accum_dtype = 'bf16' beside fp32 weights"):
        complete(config, recipe(), world_size=2, bf16=False, path=PATH)


def test_near_to_what_is_not_allowed():
    eight = recipe(optimizer={"name": "adamw_8bit"})
    full({"zero_optimization": TWIN_FLOW})
    full({"zero_optimization": {"stage": 3, "offload_optimizer": CPU}}, eight)
    full({"bf16": LOW, "zero_optimization": {"stage": 3, "offload_optimizer": CPU}})
    full({"bf16": {**LOW, "bf16_optimizer_states": True}, "zero_optimization": {"stage": 3}}, eight)
    full({"data_types": {"grad_accum_dtype": "bfloat16"}})
    full({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}})


@pytest.mark.parametrize(
    ("what", "sections", "says"),
    [
        ("param", {"ema": {"decay": 0.5}}, "ema and sample.every do not go with zero_optimization.offload_param nvme"),
        ("param", {"sample": {"every": 5, "prompts": ["x"]}}, "sample.every = 5: ema and sample.every do not go with"),
        ("optimizer", {"ema": {"decay": 0.5}}, "ema does not go with zero_optimization.offload_optimizer nvme"),
        ("optimizer", {"sample": {"every": 5, "prompts": ["x"]}}, ""),
        ("param", {}, ""),
    ],
)
def test_what_cannot_be_with_weights_on_nvme(what, sections, says, tmp_path):
    section = {"device": "nvme", "nvme_path": str(tmp_path)}
    zero = {"stage": 3, "offload_optimizer": CPU, f"offload_{what}": section}
    if says:
        with pytest.raises(ConfigError, match=says):
            full({"zero_optimization": zero}, recipe(**sections))
    else:
        full({"zero_optimization": zero}, recipe(**sections))
    full({"zero_optimization": {**zero, f"offload_{what}": CPU}}, recipe(**sections))


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        ("Block", ""),
        (["Block", "net.parts.Outer.Inner", "Inner", "net.parts.Block"], ""),
        ([], ""),
        (["Block", "Blok"], "has 'Blok', and the model has no such module, did you mean 'Block'?"),
        ("other.parts.Block", "has 'other.parts.Block'"),
        ("Outer.Inner", "has 'Outer.Inner'"),  # DeepSpeed knows Inner, or all of net.parts.Outer.Inner
    ],
)
def test_leaf_modules_are_classes_of_the_model(leaves, says):
    config = {"zero_optimization": {"stage": 3, "leaf_module": {"classes": leaves}}}
    done = complete(config, recipe(), world_size=2, bf16=True, path=PATH)  # the model is not known
    assert done["zero_optimization"]["leaf_module"] == {"classes": leaves}
    given = {"world_size": 2, "bf16": True, "path": PATH, "classes": {"net.parts.Block", "net.parts.Outer.Inner"}}
    if says:
        with pytest.raises(ConfigError) as e:
            complete(config, recipe(), **given)
        assert says in str(e.value)
    else:
        complete(config, recipe(), **given)


def test_batch_keys_that_agree():
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto"}
    assert full(config)["train_batch_size"] == 2  # a step of DeepSpeed's is one micro-batch of one
    full({"data_types": {"param_dtype": "bfloat16"}})


def test_only_a_gpu_can():
    config = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}, "aio": {"use_gds": True}}
    assert len(gpu_only(config)) == 2
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        check_sections(config, PATH, gpu=False)
    check_sections(config, PATH, gpu=True)
    assert gpu_only({"aio": None, "zero_optimization": {"offload_optimizer": None}}) == []


def test_deepspeeds_own_validators_have_the_last_word():
    with pytest.raises(ConfigError, match=r"zero_optimization\.reduce_bucket_size = 0"):
        check_sections({"zero_optimization": {"reduce_bucket_size": 0}}, PATH)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}}, "stage3_max_live_parameters has no eff"),
        ({"zero_optimization": {"stage": 1, "sub_group_size": 5}}, "sub_group_size has no effect at stage 1"),
        ({"zero_optimization": {"overlap_comm": True}}, "overlap_comm has no effect at stage 0"),
        ({"zero_optimization": {"stage": 3, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4 has no effect"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2 has no effect"),
        ({"activation_checkpointing": {}}, "model.activations"),
        ({"checkpoint": {}}, "its own checkpoints"),
        ({"aio": {}}, "aio has no effect"),
        ({"zero_optimization": {"stage": 3, "offload_param": {**CPU, "nvme_path": "/x"}}}, "nvme_path has no effect"),
    ],
)
def test_what_has_no_effect_is_said(config, says):
    (warning,) = idle(config)
    assert says in warning


def test_nothing_is_said_of_batch_keys_that_are_auto():
    assert list(idle(dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"))) == []


# Optimizer and schedule from the ds_config.


def warmup(kind: str, **params: object) -> dict:
    return {"type": kind, "params": {"warmup_type": "linear", "warmup_num_steps": 10, **params}}


def test_an_optimizer_of_the_ds_config_becomes_the_recipes():
    params = {"lr": 2e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0, "adam_w_mode": True}
    for name in ("AdamW", "adamw", "Adam"):
        o = settle(recipe(), {"optimizer": {"type": name, "params": params}}, PATH).optimizer
        assert (o.name, o.lr, o.betas, o.eps, o.weight_decay) == ("adamw", 2e-4, [0.8, 0.95], 1e-6, 0.0)


def test_left_out_and_auto_are_the_recipes():
    mine = recipe(optimizer={"lr": 3e-4, "weight_decay": 0.2}, stated=["optimizer.lr", "optimizer.weight_decay"])
    section = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.99]}}
    o = settle(mine, {"optimizer": section}, PATH).optimizer
    assert (o.lr, o.weight_decay, o.betas) == (3e-4, 0.2, [0.9, 0.99])
    assert settle(mine, {}, PATH) == mine


def test_muon_has_two_rates():
    def rates(**params: float) -> tuple[float, float]:
        o = settle(recipe(), {"optimizer": {"type": "Muon", "params": params}}, PATH).optimizer
        assert o.name == "muon"
        return o.lr, o.muon_lr

    assert rates(lr=0.01) == (0.01, 0.01)
    assert rates(lr=0.01, adam_lr=1e-4) == (1e-4, 0.01)
    assert rates(muon_lr=0.03, lr=0.01) == (0.01, 0.03)
    assert rates() == (1e-5, 0.02)


def test_sections_for_deepspeed():
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}
    assert "torch_adam" in full({})["optimizer"]["params"]
    assert "torch_adam" not in full(offloaded)["optimizer"]["params"]
    muon = full({}, recipe(optimizer={"name": "muon", "lr": 1e-4}))["optimizer"]
    assert muon["type"] == "Muon"
    assert {k: muon["params"][k] for k in ("adam_lr", "muon_lr", "momentum")} == {
        "adam_lr": 1e-4,
        "muon_lr": 0.02,
        "momentum": 0.95,
    }


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"type": "AdmaW"}, ["optimizer.type = 'AdmaW'", "did you mean 'AdamW'"]),
        ({"type": "OneBitAdam"}, ["'OneBitAdam'", "supported: AdamW, Adam, Muon", "adamw_8bit"]),
        ({}, ["optimizer.type = None"]),
        ({"type": "AdamW", "params": [1]}, ["optimizer.params must be an object"]),
        ({"type": "AdamW", "params": {"lr": "1e-4"}}, ["optimizer.params.lr", "number >= 0", "'1e-4'"]),
        ({"type": "AdamW", "params": {"lr": -1}}, ["optimizer.params.lr", "-1"]),
        ({"type": "AdamW", "params": {"betas": [0.9, 1.0]}}, ["optimizer.params.betas", "[0, 1)"]),
        ({"type": "AdamW", "params": {"betas": 0.9}}, ["optimizer.params.betas"]),
        ({"type": "AdamW", "params": {"weigth_decay": 0.1}}, ["weigth_decay", "did you mean 'weight_decay'"]),
        ({"type": "AdamW", "params": {"momentum": 0.9}}, ["momentum", "supported for AdamW: lr, betas"]),
        ({"type": "AdamW", "params": {"max_grad_norm": 1}}, ["gradient_clipping at the top level"]),
        ({"type": "AdamW", "params": {"torch_adam": False}}, ["torch_adam", "remove it"]),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, ["adam_w_mode = False", "always True"]),
        ({"type": "AdamW", "params": {"amsgrad": True}}, ["amsgrad = True", "always False"]),
        ({"type": "AdamW", "params": {"amsgrad": 0}}, ["amsgrad = 0", "always False"]),
        ({"type": "Muon", "params": {"momentum": 1.0}}, ["optimizer.params.momentum"]),
        ({"type": "Muon", "params": {"ns_method": "standard"}}, ["ns_method", "always 'gram'"]),
        ({"type": "AdamW", "legacy_fusion": True}, ["legacy_fusion"]),
    ],
)
def test_optimizers_that_the_recipe_cannot_express(section, says):
    with pytest.raises(ConfigError) as e:
        settle(recipe(), {"optimizer": section}, PATH)
    assert all(word in str(e.value) for word in [*says, "ds.json"]), e.value


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"type": "WarmUpLR"}, ["scheduler.type = 'WarmUpLR'", "did you mean 'WarmupLR'"]),
        ({"type": "OneCycle"}, ["'OneCycle'", "supported: WarmupLR, WarmupDecayLR, WarmupCosineLR", "wsd"]),
        ({"type": "WarmupLR"}, ["warmup_type", "left out", "'log'", "always 'linear'"]),
        (warmup("WarmupLR", warmup_type="log"), ["warmup_type = 'log'", "always 'linear'"]),
        (warmup("WarmupLR", warmup_num_steps=0), ["warmup_num_steps", "positive whole number"]),
        (warmup("WarmupLR", warmup_num_steps="10"), ["warmup_num_steps", "'10'"]),
        (warmup("WarmupLR", warmup_min_lr=1e-6), ["warmup_min_lr = 1e-06", "always 0"]),
        (warmup("WarmupLR", warmup_steps=10), ["warmup_steps", "did you mean 'warmup_num_steps'"]),
        (warmup("WarmupLR", total_num_steps=100), ["total_num_steps", "supported for WarmupLR"]),
        (warmup("WarmupDecayLR", warmup_max_lr="auto"), ["total_num_steps must be given", '"auto"']),
        (warmup("WarmupDecayLR", total_num_steps=99), ["total_num_steps = 99", "recipe's train.steps = 100"]),
        (warmup("WarmupCosineLR", total_num_steps=100, warmup_min_ratio=0.1), ["warmup_min_ratio", "always 0"]),
        (warmup("WarmupCosineLR", total_num_steps=100, cos_min_ratio=2), ["cos_min_ratio", "from 0 to 1"]),
        (warmup("WarmupCosineLR", total_num_steps=100, warmup_num_steps=101), ["warmup_steps 101", "train.steps 100"]),
        (
            {"type": "WarmupCosineLR", "params": {"warmup_type": "linear", "total_num_steps": "auto"}},
            ["warmup_steps 1000", "train.steps 100"],
        ),
    ],
)
def test_schedulers_that_the_recipe_cannot_express(section, says):
    with pytest.raises(ConfigError) as e:
        settle(recipe(), {"scheduler": section}, PATH)
    assert all(word in str(e.value) for word in [*says, "ds.json"]), e.value


@pytest.mark.parametrize(
    ("stated", "config", "says"),
    [
        (
            {"lr": 1e-5},
            {"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}},
            ["optimizer.params.lr = 2e-05", "recipe's optimizer.lr = 1e-05", '"auto"'],
        ),
        (
            {"name": "muon"},
            {"optimizer": {"type": "AdamW"}},
            ["optimizer.type 'AdamW'", "recipe's optimizer.name = 'muon'"],
        ),
        (
            {"schedule": "cosine"},
            {"scheduler": warmup("WarmupLR")},
            ["scheduler.type 'WarmupLR'", "recipe's optimizer.schedule = 'cosine'"],
        ),
        (
            {"warmup_steps": 5},
            {"scheduler": warmup("WarmupLR")},
            ["scheduler.params.warmup_num_steps = 10", "recipe's optimizer.warmup_steps = 5"],
        ),
        (
            {"min_lr_ratio": 0.1},
            {"scheduler": warmup("WarmupCosineLR", total_num_steps=100)},
            ["cos_min_ratio (left out, so DeepSpeed's default) = 0.0001", "recipe's optimizer.min_lr_ratio = 0.1"],
        ),
    ],
)
def test_the_two_must_agree_on_what_both_state(stated, config, says):
    mine = recipe(optimizer=stated, stated=[f"optimizer.{key}" for key in stated])
    with pytest.raises(ConfigError) as e:
        settle(mine, config, PATH)
    assert all(word in str(e.value) for word in [*says, "ds.json"]), e.value
    settle(recipe(optimizer=stated), config, PATH)  # a default of the recipe gives way


def test_both_may_say_the_same():
    mine = recipe(optimizer={"lr": 2e-5}, stated=["optimizer.lr"])
    assert settle(mine, {"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}}, PATH).optimizer == mine.optimizer


def test_a_ds_config_must_agree_with_itself():
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "scheduler": warmup("WarmupDecayLR", total_num_steps=100),
    }
    with pytest.raises(
        ConfigError, match=r"warmup_max_lr \(left out, so DeepSpeed's default\) = 0.001 contradicts its"
    ):
        settle(recipe(), config, PATH)
    config["optimizer"] = {"type": "Muon"}
    with pytest.raises(ConfigError, match="Muon has two"):
        settle(recipe(), config, PATH)


def test_the_recipe_must_be_settled_first():
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    with pytest.raises(AssertionError, match="settle"):
        full(config)
    assert full(config, settle(recipe(), config, PATH))["optimizer"]["params"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("section", "late"),
    [
        (warmup("WarmupLR", warmup_max_lr=0.5), 2),
        (warmup("WarmupDecayLR", warmup_max_lr=0.5, total_num_steps=60), 2),
        (warmup("WarmupDecayLR", warmup_max_lr=0.5, total_num_steps=60, warmup_num_steps=1), 2),
        (warmup("WarmupCosineLR", total_num_steps=60, cos_min_ratio=0.1), 1),
    ],
)
def test_the_curve_is_deepspeeds_without_its_steps_at_zero(section, late):
    from deepspeed.runtime import lr_schedules

    lr = 0.5
    mine = recipe(optimizer={"lr": lr}, train={"steps": 60})
    o = settle(mine, {"scheduler": section}, PATH).optimizer
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = getattr(lr_schedules, section["type"])(optimizer, **section["params"])
    theirs = []
    for _ in range(62):
        theirs.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert theirs[:2] == [0, 0]
    for step in range(60 - late):
        if late == 1 and step in (o.warmup_steps - 1, o.warmup_steps):
            continue  # DeepSpeed's cosine leaves out the peak
        behind = 2 if step < o.warmup_steps else late - 1
        assert o.lr * lr_factor(o, step, 60) == pytest.approx(theirs[step + behind], abs=1e-12), step


def test_parameters_on_nvme_are_neither_prefetched_nor_kept(tmp_path):
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    found = sizes({"zero_optimization": zero}, block=1000, largest=300)
    for key in ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"):
        assert found[key].elements == 0
    assert found["reduce_bucket_size"].elements == 500
