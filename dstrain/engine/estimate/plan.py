"""What of a ds_config and a recipe decides memory and traffic, with DeepSpeed's defaults filled in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dstrain.config import Activations, Recipe
from dstrain.engine.ds_config import offload, stage, uses_bf16
from dstrain.engine.ds_sizes import sizes
from dstrain.engine.estimate.load import Load


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the recipe decides."""

    activations: tuple[Activations, ...] = ("full",)  # of block i: entry i, repeated
    encoders: Literal["resident", "offload", "absent"] = "resident"
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    ema: Literal["none", "auto", "cpu"] = "none"
    micro_steps: int = 1  # packs of a rank in an optimizer step

    @classmethod
    def of(cls, recipe: Recipe, *, micro_steps: int = 1, encoded: bool = False) -> "Choice":
        """Read a recipe; `encoded`: the shards hold latents and embeddings, so the encoders are never loaded."""
        return cls(
            activations=tuple(recipe.model.activations),
            encoders="absent" if encoded else recipe.model.encoders,
            optimizer=recipe.optimizer.name,
            ema=recipe.ema.device if recipe.ema.decay else "none",
            micro_steps=micro_steps,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A ds_config on a number of ranks. Sizes in elements, widths of numbers in bytes."""

    stage: int
    ranks: int
    word: int  # of weights and activations
    accumulator: int  # of gradients that are added up over micro-steps
    master: int  # of the weights that the optimizer changes; 0 = these are the weights themselves
    moments: float  # of the optimizer, a trained parameter
    optimizer: str  # where its states are: none, cpu, nvme
    parameters: str  # where the weights are between uses, likewise
    ratio: float  # of the optimizer's states that are offloaded (Twin-Flow)
    pinned_states: bool
    pinned_weights: bool
    overlap: bool
    bucket: int
    live: int
    reuse: int
    persistence: int  # the largest tensor that stage 3 leaves whole
    tile: int
    swap_buffers: int  # of an NVMe drive: tiles of fp32, and bytes for weights
    swap_bytes: float
    group: int  # ranks that hold a second copy of the weights among them (hpZ); 1 = none
    choice: Choice

    @classmethod
    def of(cls, config: Mapping[str, Any], load: Load, ranks: int, choice: Choice) -> "Plan":
        """Read a ds_config, completed or not."""
        zero = dict(config.get("zero_optimization", {}))
        zero = {**zero, **{key: size.elements for key, size in sizes(config, load.block, load.largest).items()}}
        level, bf16 = stage(config), uses_bf16(config, True)
        low = bf16 and config["bf16"].get("bf16_master_weights_and_grads", False)
        moments = 4.0 if low and config["bf16"].get("bf16_optimizer_states", False) else 8.0
        if choice.optimizer == "adamw_8bit":
            moments = 2.0 + 2 * 4 / 256  # a byte and, for 256 of them, an fp32 scale; twice
        elif choice.optimizer == "muon":
            moments -= moments / 2 * load.matrices / max(1, load.trained)  # one moment
        wide = config.get("data_types", {}).get("grad_accum_dtype", "fp32" if level else "bf16")
        word = 2 if bf16 else 4
        states, weights = (zero.get(f"offload_{what}") or {} for what in ("optimizer", "param"))
        return cls(
            stage=level,
            ranks=ranks,
            word=word,
            accumulator=4 if wide in ("fp32", "float32", None) or not bf16 else 2,
            master=0 if level == 0 and not bf16 else 2 if low else 4,
            moments=moments,
            optimizer=offload(config, "optimizer"),
            parameters=offload(config, "param"),
            ratio=states.get("ratio", 1.0) if states else 0.0,
            pinned_states=bool(states.get("pin_memory", True)),
            pinned_weights=bool(weights.get("pin_memory", True)),
            overlap=zero.get("overlap_comm", level == 3) or False,
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            live=int(zero.get("stage3_max_live_parameters", 1e9)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)) if level == 3 else 0,
            tile=int(zero.get("sub_group_size", 1e9)),
            swap_buffers=states.get("buffer_count", 4),
            swap_bytes=weights.get("buffer_count", 5) * weights.get("buffer_size", 1e8) * word,
            group=min(ranks, zero.get("zero_hpz_partition_size", 1)) if level == 3 else 1,
            choice=choice,
        )

    def shard(self, elements: float, needs: int) -> float:
        """Elements of a rank's share of what is divided among ranks from stage `needs` on."""
        return elements / self.ranks if self.stage >= needs else elements
