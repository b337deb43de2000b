"""What of a transformer trains, parameters by name or adapters on frozen weights, and what each of them starts from."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dstrain.config import LoraConfig
from dstrain.errors import ConfigError, did_you_mean
from dstrain.models.base import DiT
from dstrain.models.lora import Fill, adapter_fill, add_adapters, target_layers


def choose_trained(model: DiT, patterns: Sequence[str], lora: LoraConfig) -> None:
    """Set requires_grad of every parameter of `model`, putting adapters on it if `lora` has a rank.

    Args:
        model: as its family builds it, on the meta device.
        patterns: of the parameters that train, in turn; "!" in front takes out again, of all if it is the first.
            Without LoRA.
        lora: adapters to train instead, and how the weights under them are kept.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left to train, or the settings do not go together.
    """
    if lora.rank:
        layers = target_layers(model, lora.targets)
        if lora.base != "bf16":
            from dstrain.models.storage import store_linears

            blocks = [(path, m) for path, m in model.named_modules() if isinstance(m, model.block_class)]
            linears = [f"{path}.{n}" for path, b in blocks for n, m in b.named_modules() if type(m) is nn.Linear]
            store_linears(model, linears, lora.base)
        add_adapters(model, lora, layers)
        return
    names = [name for name, _ in model.named_parameters()]
    chosen = set(names) if patterns[0].startswith("!") else set[str]()
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        found = {n for n in names if fnmatchcase(n, bare)}
        if not found:
            raise ConfigError(
                f"train.parameters: {pattern!r} matches no parameter{did_you_mean(bare, names)}; names are those of the"
                f" checkpoint, such as {names[-1]}, and * matches anything"
            )
        chosen = chosen - found if pattern.startswith("!") else chosen | found
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen and name not in model.unused)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"train.parameters: {list(patterns)} leave nothing to train that has an effect; name other parameters"
        )


def start_values(
    base: Fill, shapes: Mapping[str, torch.Size], lora: LoraConfig, seed: int, given: Mapping[str, Tensor]
) -> Fill:
    """Return a fill for a model that `choose_trained` has shaped.

    Args:
        base: gives the parameters of the model as its family builds it.
        shapes: of these.
        lora: as in `choose_trained`.
        seed: of adapters that start from nothing.
        given: adapters to start from, by plain name.
    """
    if not lora.rank:
        return base
    if lora.base == "bf16":
        return adapter_fill(lora, base, shapes, seed, given)
    from dstrain.models.storage import stored_fill

    return adapter_fill(lora, stored_fill(base, shapes, lora.base), shapes, seed, given)
