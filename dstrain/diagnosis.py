"""Which samples, ranks or weights are behind a step whose loss or gradient was not finite, or a spike."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from dstrain.data.sample import Sample
from dstrain.engine.engine import Engine
from dstrain.errors import printable
from dstrain.models.lora import plain_name
from dstrain.pipelines.base import Encoded, Pipeline
from dstrain.tracking.metrics import SIGMA_BINS

MOST = 8  # that are named

Packed = tuple[Sequence[Sample], Encoded]  # a pack's samples, and what was computed with


@dataclass(frozen=True)
class Suspect:
    """Something that may have spoilt a step.

    rank: where it was. shard, key: the sample's; of a weight, key is its name and shard is "". what: "loss", "gradient"
    or "weight". value: the loss; the largest number of the gradient; how many elements of a weight are not finite.
    """

    rank: int
    shard: str
    key: str
    what: str
    value: float


def suspects(
    rank: int, samples: Sequence[Sample], losses: Tensor, sigmas: Tensor, usual: Sequence[float] | None = None
) -> list[Suspect]:
    """Return the samples of this rank whose loss is not finite; if none, the most striking ones first.

    Args:
        rank: this rank.
        samples: N, of all packs of the step.
        losses: [N], of each sample.
        sigmas: [N], of each sample.
        usual: the usual loss in each range of sigma (`Spikes.usual`); without it, or where it is nan, a loss strikes
            by itself. Only losses above the usual are named.
    """
    values = losses.detach().double().cpu()
    strange = [i for i, finite in enumerate(torch.isfinite(values).tolist()) if not finite]
    if not strange:
        places = (sigmas.float().cpu() * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
        compared = torch.tensor(usual or [1.0] * SIGMA_BINS, dtype=torch.float64).nan_to_num(1.0)[places]
        ratios = values / compared
        strange = [i for i in ratios.argsort(descending=True, stable=True).tolist() if ratios[i] > 1 or not usual]
        strange = strange[:MOST]
    return [Suspect(rank, samples[i].shard, samples[i].key, "loss", float(values[i])) for i in strange]


def second_look(
    pipeline: Pipeline, engine: Engine, objective: Any, packs: Sequence[Packed], rank: int
) -> list[Suspect]:
    """Compute a step again and return this rank's weights, losses and gradients that are not finite; [] if all are.

    Collective: every rank brings as many packs. Noise is drawn by counters, so it is the same computation. Gradients
    are those of the inputs, which tell sample from sample; those of the weights, accumulated or not, are not touched.
    """
    found = _weights(engine, rank)
    with _no_reduction(engine.ds.optimizer):
        for samples, encoded in packs:
            losses, gradients = _gradients(pipeline, engine, objective, samples, encoded)
            for i, sample in enumerate(samples):
                what, value = ("loss", losses[i]) if not losses[i].isfinite() else ("gradient", gradients[i])
                if not value.isfinite():
                    found.append(Suspect(rank, sample.shard, sample.key, what, float(value)))
    return found


@contextmanager
def _no_reduction(optimizer: Any) -> Iterator[None]:
    """Let a backward leave no gradient of a weight.

    `autograd.grad` makes none. But ZeRO-3 (DeepSpeed 0.19) reduces those of a leaf module when the module's backward is
    done, and takes zeros where there are none.
    """
    instead: dict[str, Any] = {}
    if hasattr(optimizer, "leaf_parameters"):
        instead = {
            "reduce_ready_partitions_and_remove_grads": lambda p: setattr(p, "grad", None),
            "update_hook_state_and_maybe_run_epilogue": lambda expected: None,
            "reenter_backward_if_needed": lambda: None,
            "should_refresh_expected_hook_count": lambda: False,
        }
    vars(optimizer).update(instead)
    try:
        yield
    finally:
        for name in instead:
            delattr(optimizer, name)


def _gradients(
    pipeline: Pipeline, engine: Engine, objective: Any, samples: Sequence[Sample], encoded: Encoded
) -> tuple[Tensor, Tensor]:
    """Loss, and largest number in the gradient of all inputs (nan if one is), of each sample: [N] each."""
    inputs = list[Tensor]()

    def velocity(x_t: Tensor, sigmas: Tensor) -> Tensor:
        # Whatever a weight's gradient is made of comes by one of these: picture, noise level, text.
        inputs.extend(x.detach().clone().requires_grad_() for x in (x_t, sigmas, encoded.prompt_embeds))
        return pipeline.velocity(engine.module, inputs[0], inputs[1], replace(encoded, prompt_embeds=inputs[2]))

    draws = torch.tensor([s.draw for s in samples])
    layout = encoded.layout
    losses = objective(velocity, encoded.x0, layout, draws).per_sample
    gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    highest = torch.zeros(len(samples), device=losses.device)
    owners = (layout.image_sample, torch.arange(len(samples), device=losses.device), layout.text_sample)
    for gradient, owner in zip(gradients, owners):
        if gradient is not None:
            rows = gradient.detach().float().abs().view(len(owner), -1).amax(1)  # amax keeps nan
            highest = highest.scatter_reduce(0, owner, rows, "amax")
    return losses.detach(), highest


@torch.no_grad()
def _weights(engine: Engine, rank: int) -> list[Suspect]:
    """The parameters of which this rank holds elements that are not finite."""
    spoilt = dict[str, int]()
    for group in engine.master.groups:
        with group.in_memory():
            for f in group.fragments:
                for values in (f.of(group.flat), f.weight()):
                    spoilt[f.name] = max(spoilt.get(f.name, 0), _not_finite(values))
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            spoilt[plain_name(name)] = _not_finite(getattr(p, "ds_tensor", p).data)
    return [Suspect(rank, "", name, "weight", float(n)) for name, n in spoilt.items() if n]


def _not_finite(values: Tensor) -> int:
    return values.numel() - int(values.isfinite().sum())


def report(step: int, what: str, suspects: Sequence[Suspect], samples: int = 0) -> str:
    """Say in one sentence what happened in a step, who is behind it, and what can be done.

    Args:
        step: its number.
        what: "the loss is nan", say.
        suspects: those of all ranks; none means that nothing was found when the step was computed again.
        samples: how many the step had: all of them together are not to blame.
    """
    weights = list(dict.fromkeys(s.key for s in suspects if s.what == "weight"))
    ranks = sorted({s.rank for s in suspects})
    where = f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:MOST]))}{', ...' * (len(ranks) > MOST)}"
    if weights:
        return (
            f"step {step}: {what}, since weights {where} are not finite: {_some(weights)};"
            " go on from an earlier checkpoint with --resume PATH, with a lower optimizer.lr"
        )
    if not suspects:
        return (
            f"step {step}: {what}, but not when it was computed a second time, so memory or a processor of one of the"
            " machines is in doubt; look at their logs and run the same command again"
        )
    if samples and len(suspects) >= samples > 1:
        return (
            f"step {step}: {what}, for all {samples} samples of all ranks, although all weights are finite; go on from"
            " an earlier checkpoint with --resume PATH, with a lower optimizer.lr or gradient_clipping (ds_config)"
        )
    names = [
        f"{s.key!r} of {PurePath(s.shard).name} ({s.what} {s.value:.4g})"
        for s in sorted(suspects, key=lambda s: (s.value == s.value, -s.value))
    ]
    return (
        f"step {step}: {what}, {where}, most by the sample{'s' * (len(names) > 1)} {_some(names)}; look at"
        " them, leave them out of the shards, or lower optimizer.lr or gradient_clipping (ds_config), and run the same"
        " command again"
    )


def _some(names: list[str]) -> str:
    more = len(names) - MOST
    return printable(", ".join(names[:MOST]) + (f" and {more} more" if more > 0 else ""))
