"""Optimizer and schedule: from the recipe or from a ds_config's own sections, and as DeepSpeed is given them.

A ds_config may hold `optimizer` and `scheduler` as DeepSpeed documents them. They are translated to the recipe's keys,
so that there is one description of the run; what cannot be said there is refused. Of an optimizer, what is left out or
"auto" is the recipe's. Of a scheduler, "auto" is the recipe's, and what is left out is DeepSpeed's own default, since
it decides the curve. DeepSpeed's schedulers give the first two steps a rate of 0, and its cosine leaves out the peak;
the curve here is the same but for that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.config import OptimizerConfig, Recipe
from dstrain.engine.ds_schema import POSITIVE, SHARE, Kind, between, is_number
from dstrain.errors import ConfigError, did_you_mean

RATE = Kind("a number >= 0", lambda v: is_number(v) and v >= 0)
BETAS = Kind(
    "two numbers in [0, 1)",
    lambda v: isinstance(v, list) and len(v) == 2 and all(is_number(b) and 0 <= b < 1 for b in v),
)
Param = tuple[Kind, tuple[str, ...]]  # what it may be, and the keys of the recipe that it sets


@dataclass(frozen=True)
class Known:
    """A `type` of DeepSpeed's that the recipe can express."""

    sets: Mapping[str, Any]  # what the type itself says, by the recipe's key
    params: Mapping[str, Param]
    fixed: Mapping[str, Any]  # parameters that may only say what happens anyway
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # DeepSpeed's, of parameters left out; None = there is none


_ADAM: dict[str, Param] = {
    "lr": (RATE, ("optimizer.lr",)),
    "betas": (BETAS, ("optimizer.betas",)),
    "eps": (RATE, ("optimizer.eps",)),
    "weight_decay": (RATE, ("optimizer.weight_decay",)),
}
_ADAM_FIXED = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False, "fp32_optimizer_states": True}
OPTIMIZERS = {
    "AdamW": Known({"optimizer.name": "adamw"}, _ADAM, _ADAM_FIXED),
    "Adam": Known({"optimizer.name": "adamw"}, _ADAM, _ADAM_FIXED),  # DeepSpeed's Adam decays as AdamW by default
    "Muon": Known(
        {"optimizer.name": "muon"},
        {
            **_ADAM,
            "lr": (RATE, ("optimizer.lr", "optimizer.muon_lr")),  # of both halves, unless they have their own
            "adam_lr": (RATE, ("optimizer.lr",)),
            "muon_lr": (RATE, ("optimizer.muon_lr",)),
            "momentum": (between(0, 0.9999), ("optimizer.momentum",)),
        },
        {**_ADAM_FIXED, "ns_method": "gram"},
    ),
}
_WARMUP: dict[str, Param] = {
    "warmup_num_steps": (POSITIVE, ("optimizer.warmup_steps",)),
    "warmup_max_lr": (RATE, ("optimizer.lr",)),
}
_TOTAL: dict[str, Param] = {"total_num_steps": (POSITIVE, ("train.steps",))}
_FIXED = {"warmup_type": "linear", "last_batch_iteration": -1}
_DEFAULTS = {"warmup_num_steps": 1000, "warmup_type": "log"}
SCHEDULERS = {
    "WarmupLR": Known({"optimizer.schedule": "constant"}, _WARMUP, {**_FIXED, "warmup_min_lr": 0}, _DEFAULTS),
    "WarmupDecayLR": Known(
        {"optimizer.schedule": "linear", "optimizer.min_lr_ratio": 0.0},
        {**_WARMUP, **_TOTAL},
        {**_FIXED, "warmup_min_lr": 0},
        {**_DEFAULTS, "warmup_max_lr": 0.001, "total_num_steps": None},
    ),
    "WarmupCosineLR": Known(
        {"optimizer.schedule": "cosine"},
        {
            "warmup_num_steps": _WARMUP["warmup_num_steps"],
            "cos_min_ratio": (SHARE, ("optimizer.min_lr_ratio",)),
            **_TOTAL,
        },
        {**_FIXED, "warmup_min_ratio": 0},
        {**_DEFAULTS, "cos_min_ratio": 0.0001, "total_num_steps": None},
    ),
}
HINTS = {
    "optimizer": "or optimizer.name of the recipe, which also has adamw_8bit",
    "scheduler": "or optimizer.schedule of the recipe, which also has wsd",
    "max_grad_norm": "; clipping is gradient_clipping at the top level",
    "torch_adam": "; remove it: DeepSpeed's CPU Adam is taken with offload, PyTorch's fused AdamW otherwise",
}
Said = dict[str, tuple[Any, str]]  # by the recipe's dotted key: the value, and where the ds_config says it


def settle(recipe: Recipe, ds_config: Mapping[str, Any], path: Path) -> Recipe:
    """Return the recipe with what `optimizer` and `scheduler` of the ds_config at `path` say filled in.

    Raises ConfigError for a type or parameter that the recipe cannot express, and where the two state different
    things: `recipe.stated` has the dotted keys that were written in the recipe or given as overrides.
    """
    said = _read(ds_config, "optimizer", OPTIMIZERS, path)
    for key, (value, where) in _read(ds_config, "scheduler", SCHEDULERS, path).items():
        if key in said and said[key][0] != value:
            raise ConfigError(
                f"{path}: {where} = {value!r} contradicts its own {said[key][1]} = {said[key][0]!r}; keep one"
            )
        said[key] = (value, where)
    stated = {*getattr(recipe, "stated", ()), "train.steps"}
    changes = {}
    for key, (value, where) in said.items():
        section, name = key.split(".")
        mine = getattr(getattr(recipe, section), name)
        if key in stated and mine != value:
            raise ConfigError(
                f"{path}: {where} = {value!r} contradicts the recipe's {key} = {mine!r}; remove one of the two"
                + ("" if ".type" in where else ', or write "auto" in the ds_config')
            )
        if section == "optimizer":
            changes[name] = value
    if not changes:
        return recipe
    optimizer = dataclasses.replace(recipe.optimizer, **changes)
    if optimizer.name == "muon" and "warmup_max_lr" in said.get("optimizer.lr", ("", ""))[1]:
        raise ConfigError(
            f"{path}: scheduler.params.warmup_max_lr is one rate for all parameters, and Muon has two; write"
            ' "warmup_max_lr": "auto" and the rates in optimizer.params or the recipe'
        )
    try:
        return dataclasses.replace(recipe, optimizer=optimizer)
    except ConfigError as e:  # of values that do not go together
        raise ConfigError(f"{path} with the recipe: {e}") from None


def _read(ds_config: Mapping[str, Any], name: str, types: Mapping[str, Known], path: Path) -> Said:
    """Translate one section; ConfigError if it says what the recipe cannot."""
    if name not in ds_config:
        return {}
    section = ds_config[name]
    given = section.get("type")
    # DeepSpeed, too, takes optimizers in any case, and schedulers as they are written.
    kind = next((t for t in types if t == given or (name == "optimizer" and t.lower() == str(given).lower())), None)
    if kind is None:
        raise ConfigError(
            f"{path}: {name}.type = {given!r} cannot be used{did_you_mean(str(given), types)} (supported:"
            f" {', '.join(types)}; {HINTS[name]})"
        )
    if section.get("legacy_fusion"):
        raise ConfigError(f"{path}: {name}.legacy_fusion has no effect on {kind}; remove it")
    known, params = types[kind], section.get("params", {})
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: {name}.params must be an object, not {params!r:.80}")
    said: Said = {key: (value, f"{name}.type {kind!r}, so {key}") for key, value in known.sets.items()}
    for key, value in sorted({**known.defaults, **params}.items(), key=lambda item: item[0] != "lr"):
        where = f"{name}.params.{key}"
        if value == "auto":
            continue
        if key not in params:
            if value is None:
                raise ConfigError(f'{path}: {where} must be given for {kind}; write "auto" for train.steps')
            where += " (left out, so DeepSpeed's default)"
        if key in known.fixed:
            fixed = known.fixed[key]
            if value != fixed or isinstance(value, bool) != isinstance(fixed, bool):
                raise ConfigError(f"{path}: {where} = {value!r:.80}, but here it is always {fixed!r}; write that")
            continue
        if key not in known.params:
            raise ConfigError(
                f"{path}: unknown key {where!r}{did_you_mean(key, [*known.params, *known.fixed])}{HINTS.get(key, '')}"
                f" (supported for {kind}: {', '.join(known.params)})"
            )
        accepts, targets = known.params[key]
        if not accepts.fits(value):
            raise ConfigError(f'{path}: {where} must be {accepts.says}, or "auto", not {value!r:.80}')
        if key == "warmup_num_steps":
            value = max(2, int(value))  # as DeepSpeed does
        elif is_number(value):
            value = float(value)
        said |= dict.fromkeys(targets, (value, where))
    return said


def optimizer_section(o: OptimizerConfig, *, offloaded: bool) -> dict[str, Any]:
    """Return the `optimizer` section that DeepSpeed is given; `offloaded`: its states are not on the device."""
    return _SECTIONS[o.name](o, offloaded)


def _adamw(o: OptimizerConfig, offloaded: bool) -> dict[str, Any]:
    params: dict[str, Any] = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if not offloaded:  # DeepSpeed's own FusedAdam would have to be compiled; PyTorch's is as fast
        params |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": params}


def _adamw_8bit(o: OptimizerConfig, offloaded: bool) -> dict[str, Any]:
    """DeepSpeed has none of its own: the engine makes the optimizer from this section and hands it over."""
    return {
        "type": "AdamW8bit",
        "params": {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay},
    }


def _muon(o: OptimizerConfig, offloaded: bool) -> dict[str, Any]:
    """Muon for matrices, AdamW for the rest; DeepSpeed splits the groups by the tag `use_muon` of a parameter."""
    params = _adamw(o, offloaded)["params"] | {"momentum": o.momentum, "muon_lr": o.muon_lr, "adam_lr": o.lr}
    params.pop("fused", None)
    return {"type": "Muon", "params": params}


_SECTIONS: Mapping[str, Callable[[OptimizerConfig, bool], dict[str, Any]]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "muon": _muon,
}
