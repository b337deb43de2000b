"""Memory, traffic and time from counts: against known figures, PyTorch's counters, DeepSpeed's estimators, and laws."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dstrain import cli
from dstrain.config import LoraConfig
from dstrain.engine.estimate import Choice, Load, Machine, advise, estimate, load_of
from dstrain.engine.estimate.memory import ATTENTION, BACKWARD, BLOCK, ENDS, INPUTS, PIECE
from dstrain.engine.estimate.model import QWEN_IMAGE_ENCODERS, read_model
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.models.trained import choose_trained

GB = 1e9
CPU = {"device": "cpu"}
SMALL = {"reduce_bucket_size": 1, "stage3_max_live_parameters": 0, "sub_group_size": 10**8}
STATES = ("weights", "gradients", "master weights", "optimizer")


def qwen() -> Load:
    model, encoders = read_model("qwen-image")
    choose_trained(model, ["*"], LoraConfig())
    return load_of(model, [(4096, 512)], encoder_bytes=2 * encoders)


QWEN = qwen()
# Only the states: no activations, no encoders, all parameters alike and trained.
COUNTS = dataclasses.replace(QWEN, frozen=0, trained=QWEN.parameters, matrices=QWEN.parameters, sizes=(), tokens=0)
COUNTS = dataclasses.replace(COUNTS, encoder_bytes=0.0)


def run(zero, *, ranks=8, load=COUNTS, bf16=True, extra=None, **choice):
    extra = extra or {}
    config = {"bf16": {"enabled": bf16, **extra.pop("bf16", {})}, "zero_optimization": {**SMALL, **zero}, **extra}
    machine = Machine(gpus=ranks, process=0.0, pinned_rounding=False)
    return estimate(config, load, machine, Choice(**choice))


def states(e) -> float:
    """Bytes for a parameter of all ranks together, on their GPUs and in their hosts."""
    parts = [e.memory.device.get(p, 0.0) + e.memory.host.get(p, 0.0) for p in STATES]
    return sum(parts) * e.machine.ranks / e.load.parameters


BF16_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}
LOW = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}, **BF16_SUMS}


@pytest.mark.parametrize(
    ("zero", "bf16", "extra", "wanted"),
    [
        ({"stage": 3}, True, BF16_SUMS, 16),  # of DeepSpeed as it comes
        ({"stage": 3}, True, {}, 18),  # of this trainer, which adds gradients up in fp32
        ({"stage": 3}, False, {}, 20),
        ({"stage": 3, "offload_optimizer": CPU}, True, BF16_SUMS, 20),
        ({"stage": 3, "offload_optimizer": CPU}, True, {}, 22),
        ({"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, True, {}, 22),
        ({"stage": 3, "offload_optimizer": {**CPU, "ratio": 0.5}}, True, {}, 22),
        ({"stage": 3}, True, LOW, 10),
        ({"stage": 3, "offload_optimizer": CPU}, True, LOW, 12),
    ],
)
def test_bytes_a_parameter_of_stage_3_are_the_measured_ones(zero, bf16, extra, wanted):
    assert states(run(zero, bf16=bf16, extra=dict(extra))) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "bf16", "wanted"),
    [(0, False, 16), (0, True, 16), (1, False, 4 + 16 / 8), (1, True, 2 + 4 + 2 + 12 / 8), (2, True, 2 + 16 / 8)],
)
def test_stages_below_divide_what_they_should(stage, bf16, wanted):
    e = run({"stage": stage}, bf16=bf16)
    assert sum(e.memory.device[p] for p in STATES if p in e.memory.device) / e.load.parameters == pytest.approx(wanted)


def test_offload_puts_the_parts_where_they_belong():
    n = COUNTS.parameters / 8
    none, optimizer, both, half = (
        run({"stage": 3, **zero}).memory
        for zero in (
            {},
            {"offload_optimizer": CPU},
            {"offload_optimizer": CPU, "offload_param": CPU},
            {"offload_optimizer": {**CPU, "ratio": 0.5}},
        )
    )
    assert not none.host
    assert sum(none.device[p] for p in STATES) / n == pytest.approx(18)
    assert optimizer.device["weights"] / n == pytest.approx(2)
    assert "optimizer" not in optimizer.device
    assert sum(optimizer.host.values()) / n == pytest.approx(20)
    assert "weights" not in both.device
    assert sum(both.host.values()) / n == pytest.approx(22)
    assert sum(half.device[p] for p in STATES) / n == pytest.approx(2 + 8)
    assert sum(half.host.values()) / n == pytest.approx(4 + 8)


def test_the_moments_that_come_late_are_told():
    late = [run({"stage": s}).memory.late / COUNTS.parameters for s in (3, 2, 0)]
    assert late == pytest.approx([1, 1, 0])  # in bf16 without ZeRO they are there from the start
    e = run({"stage": 3, "offload_optimizer": CPU})
    assert (e.memory.late, e.memory.late_host / COUNTS.parameters) == (0.0, pytest.approx(1))


def test_optimizers_and_average():
    def size(**choice):
        e = run({"stage": 3}, **choice)
        return e.memory.device["optimizer"] * 8 / COUNTS.parameters

    assert size() == pytest.approx(8)
    assert size(optimizer="adamw_8bit") == pytest.approx(2, rel=0.02)
    assert size(optimizer="muon") == pytest.approx(4)
    assert run({"stage": 3}, ema="auto").memory.device["EMA"] * 8 / COUNTS.parameters == pytest.approx(4)
    assert "EMA" in run({"stage": 3}, ema="cpu").memory.host
    assert "EMA" in run({"stage": 3, "offload_optimizer": CPU}, ema="auto").memory.host


def test_hpz_keeps_a_second_copy_for_the_node():
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    e, plain = (
        estimate({**config, "zero_optimization": zero}, COUNTS, Machine(nodes=4))
        for zero in (config["zero_optimization"], {"stage": 3})
    )
    more = e.memory.device["weights"] - plain.memory.device["weights"]
    assert more == pytest.approx(2 * COUNTS.parameters / 8)
    assert e.traffic.links["network"] == pytest.approx(plain.traffic.links["network"] * 2 / 3)


def test_page_locked_memory_comes_in_powers_of_two():
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "offload_optimizer": CPU}}
    e = estimate(config, COUNTS, Machine(gpus=1))
    assert e.memory.host["pinned rounding"] > 2**37 - 4 * COUNTS.parameters  # of the sums of gradients alone
    config["zero_optimization"]["offload_optimizer"] = {**CPU, "pin_memory": False}
    assert "pinned rounding" not in estimate(config, COUNTS, Machine(gpus=1)).memory.host


def test_a_drive_takes_the_states_of_the_optimizer_out_of_the_host():
    nvme = {"device": "nvme"}
    machine = Machine(nvme=6e9)
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "offload_optimizer": nvme}}
    e = estimate(config, COUNTS, machine)
    assert not {"master weights", "optimizer"} & {*e.memory.host, *e.memory.device}
    assert e.traffic.bound == "NVMe"
    assert estimate(config, COUNTS, Machine()).traffic.seconds == float("inf")


@pytest.mark.parametrize("stage", [2, 3])
def test_against_deepspeeds_own_estimators(stage):
    """They count 18 B for a parameter (this trainer's fp32 sums make that true) and take 1.5 times the host memory."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    n, gpus = COUNTS.parameters, 8
    ours, offloaded = (run({"stage": stage, **zero}) for zero in ({}, {"offload_optimizer": CPU}))
    device = sum(ours.memory.device[p] for p in STATES)
    host = sum(offloaded.memory.host.values()) * gpus
    if stage == 3:
        theirs, with_cpu = (zero3(n, 0, gpus, 1, cpu_offload=o, cpu_offload_params=False) for o in (False, True))
        assert theirs[1] / device == pytest.approx(1, rel=1e-6)
        assert with_cpu[0] / host == pytest.approx(16 * 1.5 / 20, rel=1e-3)
        assert with_cpu[1] / offloaded.memory.device["weights"] == pytest.approx(1, rel=1e-6)
    else:  # 2 n + 18 n / gpus there; the bf16 gradients are among the 18, where here the buckets count them
        theirs, with_cpu = (zero2(n, gpus, 1, cpu_offload=o) for o in (False, True))
        assert theirs[1] / device == pytest.approx((2 + 18 / 8) / (2 + 16 / 8), rel=1e-6)
        assert with_cpu[0] / host == pytest.approx(4 * 8 * 1.5 / 18, rel=0.03)


def small_qwen(layers=2, heads=4) -> QwenImageDiT:
    return QwenImageDiT(
        QwenImageParams(num_layers=layers, num_attention_heads=heads, joint_attention_dim=320, in_channels=64)
    )


@pytest.mark.parametrize("samples", [[(96, 40)], [(64, 7), (25, 90), (1, 1)]])
def test_flops_are_those_that_pytorch_counts(samples):
    model = small_qwen()
    layout = PackLayout.build([[(1, 1, i)] for i, _ in samples], [t for _, t in samples])
    inputs = torch.randn(sum(i for i, _ in samples), 64), torch.randn(sum(t for _, t in samples), 320)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        model(*inputs, torch.rand(len(samples)), layout)
    load = load_of(model, samples)
    assert load.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    assert load.attention_flops == pytest.approx(attention, rel=0.01)
    assert load.train_flops == pytest.approx(3 * load.flops, rel=1e-6)


def test_flops_of_the_full_size_models_step():
    assert QWEN.flops == pytest.approx(78.2e12, rel=0.01)
    assert QWEN.attention_flops / QWEN.flops == pytest.approx(0.2, abs=0.01)
    full, kept, none = (run({"stage": 3}, load=QWEN, activations=(a,)).traffic for a in ("full", "attention", "none"))
    assert none.flops == pytest.approx(3 * QWEN.flops, rel=0.01)
    assert full.flops - none.flops == pytest.approx(QWEN.flops)
    assert full.flops - kept.flops == pytest.approx(QWEN.attention_flops)
    mixed = run({"stage": 3}, load=QWEN, activations=("full", "none")).traffic
    assert mixed.flops - none.flops == pytest.approx(QWEN.flops / 2)


def fake_forward(layers, policy):
    """Bytes kept for the backward, for a token and unit of width, of a Qwen-Image of real width."""
    layout = PackLayout.build([[(1, 64, 64)]], [512])
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = QwenImageDiT(QwenImageParams(num_layers=layers))
        finally:
            torch.set_default_dtype(torch.float32)
        model.activations, model.kernel = policy, "triton"
        parameters = {id(p.untyped_storage()) for p in model.parameters()}
        kept = {}

        def pack(x):
            storage = x.untyped_storage()
            if id(storage) not in parameters:
                kept[id(storage)] = (storage.nbytes(), storage)
            return x

        inputs = torch.empty(4096, 64), torch.empty(512, 3584, dtype=torch.bfloat16), torch.empty(1), layout
        with saved_tensors_hooks(pack, lambda x: x):
            out = model(*inputs)
    assert out.shape == (4096, 64)
    return sum(size for size, _ in kept.values()) / (4608 * model.width)


def test_what_a_block_keeps_is_what_is_counted():
    assert fake_forward(3, ("none",)) - fake_forward(2, ("none",)) == pytest.approx(BLOCK, rel=0.005)
    assert fake_forward(2, ("full",)) - 2 * INPUTS == pytest.approx(ENDS, rel=0.05)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("policy", [("none",), ("attention",), ("full", "none")])
def test_the_peak_of_activations(policy):
    from torch.distributed._tools.mem_tracker import MemTracker

    layers = 2
    layout = PackLayout.build([[(1, 16, 16)]], [64])
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = QwenImageDiT(QwenImageParams(num_layers=layers, num_attention_heads=8))
        finally:
            torch.set_default_dtype(torch.float32)
        model.activations, model.kernel = policy, "triton"
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda q: setattr(q, "grad", None))
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            inputs = torch.empty(256, 64), torch.empty(64, 3584, dtype=torch.bfloat16), torch.empty(1), layout
            model(*inputs).float().square().mean().backward()
    peak = Counter[str]()
    for parts in tracker.get_tracker_snapshot("peak").values():
        peak.update({str(kind): size for kind, size in parts.items()})
    measured = sum(size for kind, size in peak.items() if "ACT" in kind or "TEMP" in kind)
    load = load_of(model, [(256, 64)])
    weight = 2 * max(load.largest, PIECE * load.block)  # gradients that the estimate counts as passing
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    e = estimate(config, load, Machine(), Choice(activations=policy))
    ours = e.memory.device["activations"]
    assert measured <= ours + weight
    assert measured >= 0.85 * ours
    assert min(BACKWARD, ATTENTION) > INPUTS


def test_offloaded_activations_go_to_the_host():
    full, away = (run({"stage": 3}, load=QWEN, activations=(a,)) for a in ("full", "offload"))
    unit = QWEN.width * QWEN.tokens * INPUTS
    assert away.memory.host["activations"] == pytest.approx(59 * unit)  # the last block's stay
    assert full.memory.device["activations"] - away.memory.device["activations"] == pytest.approx(57 * unit)
    assert away.traffic.links["pcie out"] == pytest.approx(60 * unit, rel=0.02)


def test_tensors_up_to_the_threshold_stay_on_each_gpu():
    none, few, all_ = (
        run({"stage": 3, "stage3_param_persistence_threshold": size}, load=QWEN) for size in (0, 3072, 10**8)
    )
    assert none.memory.device["weights"] == pytest.approx(2 * QWEN.parameters / 8)
    assert few.memory.device["weights"] > none.memory.device["weights"]  # biases of 3,072 are at the threshold
    assert all_.memory.device["weights"] == 2 * QWEN.parameters
    assert "gathered blocks" not in all_.memory.device
    assert all_.traffic.links["nvlink"] == pytest.approx(2 * (QWEN.parameters + QWEN.trained) * 7 / 8)
    away = run({"stage": 3, "stage3_param_persistence_threshold": 10**8, "offload_param": CPU}, load=QWEN)
    assert away.memory.device["weights"] == 2 * QWEN.parameters


def test_stage_3_allocates_its_reduce_bucket_whole():
    little = dataclasses.replace(QWEN, trained=1000, frozen=QWEN.parameters - 1000, matrices=1000)
    assert run({"stage": 3, "reduce_bucket_size": 10**8}, load=little).memory.device["buckets"] == 2e8


def test_what_is_lighter_is_tried_before_it_is_said_that_nothing_fits():
    def said(machine, **choice):
        advice = advise(QWEN, machine, Choice(**choice))
        assert advice.best is None
        return advice.sentence

    small = Machine(gpu_bytes=69.5e9, host_bytes=200e9)
    larger = dataclasses.replace(small, gpu_bytes=72e9)
    assert said(larger, activations=("none",)) == "none fits as asked; with --activations full: zero3"
    assert said(small) == "none fits as asked; with --encoders offload: zero3"
    assert said(small, activations=("none",)).endswith("with --activations full --encoders offload: zero3")
    poor = dataclasses.replace(small, host_bytes=100e9)
    assert said(poor, encoders="offload") == "none fits as asked; with --encoders absent: zero3"
    assert said(poor).endswith("with --encoders absent: zero3")
    tiny = Machine(gpus=1, gpu_bytes=40e9, host_bytes=64e9)
    assert said(tiny, activations=("none",)).endswith("that fits: 32 (4 x 8), with --activations full")


def test_encoders():
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    with torch.device("meta"):
        model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**shape, num_attention_heads=28, num_key_value_heads=4))
    vae = 126_892_531
    assert sum(p.numel() for p in model.parameters()) + vae == QWEN_IMAGE_ENCODERS
    resident, away, absent = (run({"stage": 3}, load=QWEN, encoders=e) for e in ("resident", "offload", "absent"))
    assert resident.device - absent.device == pytest.approx(QWEN.encoder_bytes)
    assert away.host - absent.host == pytest.approx(QWEN.encoder_bytes)
    assert absent.device < away.device < resident.device  # they come when the activations are gone


@pytest.mark.parametrize(
    ("lora", "called"),
    [({}, False), ({"rank": 4}, False), ({"rank": 4, "dora": True}, True), ({"rank": 4, "dropout": 0.1}, True)],
)
def test_layers_that_must_be_called_keep_more(lora, called):
    with torch.device("meta"):
        model = QwenImageDiT(QwenImageParams(num_layers=2))
    choose_trained(model, ["*"], LoraConfig(**lora))
    assert load_of(model, [(4096, 512)]).called == called


@pytest.mark.parametrize(("base", "size"), [("bf16", 2.0), ("int8", 1.0), ("fp8", 1.0), ("nf4", 0.5)])
def test_lora_on_a_base_in_fewer_bits(base, size):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    with torch.device("meta"):
        model = QwenImageDiT(QwenImageParams(num_layers=2))
    whole = sum(p.numel() for p in model.parameters())
    choose_trained(model, ["*"], LoraConfig(rank=16, base=base))
    load = load_of(model, [(4096, 512)])
    assert load.parameters - load.trained == whole
    assert load.trained < 0.02 * whole
    assert load.called == (base != "bf16")
    if base != "bf16":
        assert load.stored / load.stored_elements == pytest.approx(size + 2 / 64)
        assert load.stored_elements > 0.5 * whole
    e = run({"stage": 3}, ranks=8, load=load)
    kept = sum(p.numel() if p.dtype is torch.uint8 else 2 * p.numel() for p in model.parameters())
    whole = load.persistent(100_000, 2)
    assert whole > 0.4 * load.trained  # matrices of up to 100,000 elements, which ZeRO-3 leaves whole
    assert e.memory.device["weights"] == pytest.approx((kept - whole) / 8 + whole)
    assert run({"stage": 3, "stage3_param_persistence_threshold": 10**9}, load=load).memory.device["weights"] == kept
    assert sum(e.memory.device[p] for p in STATES[1:]) == pytest.approx(16 * load.trained / 8)
    assert 2 < load.train_flops / load.flops < 2.4


positive = st.integers(1, 10**11)
sections = st.builds(
    lambda stage, optimizer, parameters, ratio: {
        "stage": stage,
        **({"offload_optimizer": {**CPU, **({"ratio": ratio} if stage == 3 else {})}} if optimizer and stage else {}),
        **({"offload_param": CPU} if parameters and stage == 3 else {}),
    },
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
loads = st.builds(
    lambda trained, frozen, depth, width, tokens: Load(
        width=width,
        depth=depth,
        frozen=frozen,
        trained=trained,
        matrices=trained,
        block=max(1, (trained + frozen) // depth),
        largest=max(1, trained // depth // 4),
        tokens=tokens,
        flops=2 * trained * tokens,
    ),
    positive,
    st.integers(0, 10**11),
    st.integers(1, 80),
    st.integers(64, 8192),
    st.integers(1, 10**6),
)
policies = st.lists(st.sampled_from(["none", "attention", "full", "offload"]), min_size=1, max_size=4)


@settings(deadline=None)  # the machine may be busy
@given(loads, sections, st.integers(1, 1000), policies, st.booleans())
def test_laws(load, zero, ranks, activations, bf16):
    config = {"bf16": {"enabled": bf16}, "zero_optimization": zero}
    choice = Choice(activations=tuple(activations))

    def at(zero, ranks=ranks, choice=choice):
        config["zero_optimization"] = zero
        return estimate(config, load, Machine(gpus=ranks), choice)

    e = at(zero)
    assert all(size >= 0 for parts in (e.memory.device, e.memory.host) for size in parts.values())
    assert e.device >= 0
    assert e.host >= e.machine.process
    assert 0 <= e.traffic.seconds < float("inf")
    assert e.traffic.seconds >= max(e.traffic.times["compute"], e.traffic.times["CPU optimizer"]) * (1 - 1e-9)
    assert 0 <= e.traffic.optimizer_share <= 1
    if zero["stage"] == 3:
        more = at(zero, ranks + 1)
        assert more.device <= e.device * (1 + 1e-9)
    if "offload_optimizer" in zero:
        without = {k: v for k, v in zero.items() if k != "offload_optimizer"}
        if zero["stage"] == 3:
            assert e.device <= at(without).device * (1 + 1e-9)
    if "offload_param" in zero:
        assert e.device <= at({k: v for k, v in zero.items() if k != "offload_param"}).device * (1 + 1e-9)
    kept = {a: at(zero, choice=Choice(activations=(a,))).memory.device["activations"] for a in ("full", "offload")}
    assert kept["offload"] <= kept["full"]


def test_eight_gpus_of_80_gb_need_no_offload():
    advice = advise(QWEN, Machine())
    assert advice.best.name == "zero3"
    assert advice.best.estimate.device / GB == pytest.approx(46.0 + 14.4 + 2.9 + 2.5, rel=0.02)
    assert "compute" in advice.sentence


def test_one_gpu_with_little_host_memory_fits_nothing():
    advice = advise(QWEN, Machine(gpus=1, gpu_bytes=141e9, host_bytes=128e9))
    assert advice.best is None
    assert "none fits" in advice.sentence
    assert "x the" in advice.sentence
    assert "4 (1 x 4)" in advice.sentence


def test_two_large_gpus_split_the_optimizer():
    advice = advise(QWEN, Machine(gpus=2, gpu_bytes=141e9, host_bytes=512e9))
    assert advice.best.name.startswith("zero3_offload, ratio 0.")
    assert '(ds_configs/zero3_offload.json with "zero_optimization": {"stage": 3, "offload_' in advice.sentence
    whole = next(c for c in advice.candidates if c.name == "zero3_offload, optimizer only")
    assert whole.estimate.traffic.seconds > advice.best.estimate.traffic.seconds


def test_a_small_model_is_not_told_to_offload():
    load = load_of(small_qwen(), [(64, 8)])
    advice = advise(load, Machine(gpus=1))
    assert advice.best.name in ("zero1", "zero2")


def test_hpz_and_drives_only_where_there_are_such():
    def names(**machine):
        return {c.name for c in advise(QWEN, Machine(**machine)).candidates}

    assert "zero3_hpz" not in names()
    assert {"zero3_hpz"} == names(nodes=2) - names()
    assert {"zero3_nvme"} == names(nvme=6e9) - names()
    averaged = advise(QWEN, Machine(nvme=6e9), Choice(ema="auto"))
    assert {c.name for c in averaged.candidates} == names()


def test_every_candidate_is_a_file_with_its_change():
    folder = Path(__file__).parents[2] / "ds_configs"
    machine = Machine(nodes=2, nvme=6e9)
    for c in advise(QWEN, machine).candidates:
        path = folder / f"{c.name.split(',')[0]}.json"
        config = json.loads(path.read_text()) | json.loads("{" + c.change + "}")
        given = estimate(config, QWEN, machine)
        assert (given.device, given.node) == pytest.approx((c.estimate.device, c.estimate.node)), c.name
        assert given.traffic.seconds == pytest.approx(c.estimate.traffic.seconds), c.name


def test_advice_keeps_the_precision_it_is_given():
    base = {"bf16": {"enabled": False}}
    assert advise(QWEN, Machine(), base=base).candidates[0].estimate.plan.word == 4


def test_the_command(tmp_path, capsys):
    out, plot = tmp_path / "e.json", tmp_path / "e.png"
    argv = ["estimate", "--model", "qwen-image", "--gpus", "8", "--json", str(out), "--plot", str(plot)]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "advice: zero3: 0.57 s a step at least, bound by compute (ds_configs/zero3.json)" in text
    assert "each alone: compute 0.575 with recomputation," in text
    assert "4,608 tokens a rank (4,096 + 512, the default)" in text
    assert text.count("passing gradients: of the largest tensor") == 1
    assert "pinned rounding" not in text
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 120
    data = json.loads(out.read_text())
    assert data["advice"]["ds_config"] == "zero3"
    assert [row["gpus"] for row in data["scaling"]] == [1 << i for i in range(11)]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_with_recipe_and_ds_config(tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 3, "num_attention_heads": 4}))
    (tmp_path / "r.yaml").write_text(
        "run_dir: x\nmodel: {path: x, activations: [none, full]}\ndata: {shards: [x]}\ntrain: {steps: 1}\n"
        "batch: {global_batch_size: 64, tokens_per_pack: 10000}\nlora: {rank: 4}\n"
    )
    argv = ["estimate", "--model", str(tmp_path / "config.json"), "--config", str(tmp_path / "r.yaml")]
    out = tmp_path / "e.json"
    argv += ["--ds_config", str(tmp_path / "ds.json"), "--gpus", "4", "--json", str(out), "lora.rank=8"]
    assert cli.main(argv) == 0
    assert "ds (given): GB of a rank" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert data["choice"] == {
        "activations": ["none", "full"],
        "encoders": "resident",
        "optimizer": "adamw",
        "ema": "none",
        "micro_steps": 8,  # 64 samples on 4 ranks, two of 4,608 tokens in a pack of 10,000
    }
    assert data["load"]["samples"] == 2
    assert data["load"]["trained"] < data["load"]["frozen"]


RECIPE = (
    "run_dir: x\nmodel: {path: x}\ndata: {shards: [x], max_pixels: %d}\n"
    "batch: {global_batch_size: 8, tokens_per_pack: %d}\n"
)


@pytest.mark.parametrize(
    ("pixels", "most", "samples", "tokens", "said"),
    [
        (512 * 512, 8192, 1, 1536, "1,024 + 512 a sample, by data.max_pixels"),
        (512 * 512, 1536, 1, 1536, "1,024 + 512 a sample, by data.max_pixels"),
        (1024 * 1024, 1000, 1, 1000, "500 + 500 a sample, by batch.tokens_per_pack"),
        (1024 * 1024, 2000, 1, 2000, "1,488 + 512 a sample, by batch.tokens_per_pack"),
    ],
)
def test_the_sample_is_the_recipes(pixels, most, samples, tokens, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 3, "num_attention_heads": 4}))
    (tmp_path / "r.yaml").write_text(RECIPE % (pixels, most))
    argv = ["estimate", "--model", str(tmp_path / "config.json"), "--config", str(tmp_path / "r.yaml")]
    argv += ["--json", str(tmp_path / "e.json"), "train.steps=1"]
    assert cli.main(argv) == 0
    load = json.loads((tmp_path / "e.json").read_text())["load"]
    assert (load["samples"], load["tokens"]) == (samples, tokens)
    assert f"{tokens:,} tokens a rank ({said});" in capsys.readouterr().out


def test_a_drive_is_refused_with_an_average_and_need_not_be_here(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 3, "num_attention_heads": 4}))
    (tmp_path / "r.yaml").write_text(RECIPE % (4096, 8192))
    path = Path(__file__).parents[2] / "ds_configs" / "zero3_nvme.json"
    argv = ["estimate", "--model", str(tmp_path / "config.json"), "--ds_config", str(path), "--nvme_gbs", "6"]
    argv += ["--config", str(tmp_path / "r.yaml"), "train.steps=1"]
    assert cli.main(argv) == 0
    assert "pinned rounding: PyTorch" in capsys.readouterr().out
    assert cli.main([*argv, "ema.decay=0.99"]) == 2
    assert "ema.decay" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ds_config", "ds_configs/zero3_hpz.json", "--gpus", "6"], "= 8 does not divide the 6 ranks"),
        (["--model", "qwen-imag"], "did you mean 'qwen-image'"),
        (["--model", "nowhere/config.json"], "no such model folder"),
        (["--gpus", "0"], "at least 1"),
        (["--nodes", "-3"], "at least 1"),
        (["--nodes", "99999999"], "nodes must be"),
        (["--gpu_gb", "lots"], "above 0"),
        (["--gpu_gb", "-1"], "above 0"),
        (["--host_gb", "nan"], "above 0"),
        (["--pcie_gbs", "0"], "above 0"),
        (["--nvme_gbs", "-1"], "at least 0"),
        (["--efficiency", "2"], "at most 1"),
        (["--tokens", "4096"], "image tokens + text tokens"),
        (["--tokens", "0+5"], "image tokens + text tokens"),
        (["--ds_config", "nothing.json"], "no such ds_config"),
        (["--ds_config", "ds_configs/zero3_nvme.json"], "--nvme_gbs"),
        (["--config", "nothing.yaml"], "no such recipe"),
        (["train.steps=3"], "add --config"),
    ],
)
def test_bad_input_is_one_sentence(argv, words, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    try:
        code = cli.main(["estimate", *argv])
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    assert code == 2
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out


def test_configs_of_other_families_are_refused(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"_class_name": "QwenImageTransformer2DModl"}')
    assert cli.main(["estimate", "--model", str(path)]) == 2
    assert "did you mean 'QwenImageTransformer2DModel'" in capsys.readouterr().err
    path.write_text("[]")
    assert cli.main(["estimate", "--model", str(path)]) == 2
    path.write_text('{"num_layers": 0}')
    assert cli.main(["estimate", "--model", str(path)]) == 2
    assert "num_layers" in capsys.readouterr().err
