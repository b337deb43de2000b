"""What may differ between a checkpoint and the run that continues it, key by key."""

import functools
import glob
import json
import platform
import re
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dstrain
from dstrain.config import Recipe, to_dict
from dstrain.errors import CheckpointError, ConfigError, did_you_mean
from dstrain.knobs import describe, flat
from dstrain.tracking.redact import MASK, redact

if TYPE_CHECKING:
    from dstrain.job import Job

Verdict = Literal["may", "consent", "refused"]

# Every key of a recipe is in exactly one class. Facts that are no keys (see `Job.facts`) are refused.
RULES: dict[Verdict, tuple[str, ...]] = {
    "may": (
        # What a run is called, shows and keeps: nothing of it is learned from.
        *("run_dir", "tracking.*", "sample.*"),
        # How long it goes on, how it is guarded, when it saves.
        *("train.steps", "train.max_minutes", "train.save_*", "train.keep_*", "train.async_save"),
        *("train.failed_saves", "train.export", "guard.*"),
        # The learning rate is a function of the step, so it goes on from any step.
        *("optimizer.lr", "optimizer.muon_lr", "optimizer.weight_decay", "optimizer.warmup_steps"),
        *("optimizer.schedule", "optimizer.decay_steps", "optimizer.min_lr_ratio"),
        # Where the work is done, and in what portions: the same sums, but for rounding.
        *("model.activations", "model.kernel", "model.encoders", "batch.tokens_per_pack", "objective.kernel"),
        "ema.device",
        *("data.workers", "data.cache_dir", "data.cache_gb", "data.encoded_cache_mb"),
        # How many bad samples are borne. Which ones are bad, the data say.
        *("data.bad_samples", "data.max_bad_samples", "data.max_consecutive_bad"),
        # Files move. The digests of samples and weights say whether they are the same, with repeats and weights.
        *("model.path", "model.components", "data.shards", "data.sources"),
        # Used at step 0 only; of what stays frozen, the digest of the base tells.
        *("model.init", "lora.path", "lora.init"),
    ),
    "consent": (
        # What is learned: the model would be led elsewhere from here on, which can be meant (stages of a training).
        *("objective.name", "objective.density", "objective.shift", "objective.mu", "objective.terminal"),
        *("objective.mean", "objective.std", "objective.mode_scale", "objective.weighting"),
        *("model.gelu", "model.encoder_dtype", "lora.base", "lora.dropout"),
        # What is made of a sample. Where another size takes in other samples, their digest differs and is refused.
        *("data.max_pixels", "data.min_pixels", "data.width", "data.height", "data.fit", "data.upscale", "data.crop"),
        *("data.flip", "data.background", "data.caption", "data.shuffle_tags", "data.tag_separator"),
        *("data.keep_tags", "data.caption_dropout", "data.frames", "data.fps"),
        # The moments and the average that were saved are of another horizon for a while.
        *("optimizer.betas", "optimizer.eps", "optimizer.momentum", "ema.decay"),
    ),
    "refused": (
        # The order of the samples and all randomness: samples would be repeated and left out in silence.
        *("seed", "batch.global_batch_size", "data.shuffle_window"),
        # Which numbers there are and what they mean: the saved ones would not fit, or would say something else.
        *("model.family", "optimizer.name", "train.parameters"),
        *("lora.rank", "lora.alpha", "lora.rslora", "lora.dora", "lora.targets"),
    ),
}
KEYS = tuple(row[0] for row in describe(Recipe))
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "numpy", "triton")
_SECTIONS = ("recipe", "ds_config", "versions", "world_size")  # of a record; the rest of it are facts
_OF_RECIPE = ("optimizer.", "scheduler.")  # what a ds_config says there is in the recipe by now, see ds_optimizer
_SHOWN = 100  # characters of a value
_UNSET = object()


@dataclass(frozen=True)
class Change:
    """One thing that differs, and whether it may."""

    key: str
    was: Any
    now: Any
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.was)}, is {_shown(self.now)}"


def verdict(key: str) -> Verdict:
    """Return the class of a recipe's dotted key."""
    found = [v for v, patterns in RULES.items() if any(fnmatchcase(key, pattern) for pattern in patterns)]
    assert len(found) == 1, f"{key} is in {len(found)} classes of RULES"
    return found[0]


def record(job: "Job", world_size: int) -> dict[str, Any]:
    """Return what a checkpoint says of the run that saved it: plain values, without secrets.

    The facts under their own names, then recipe, ds_config, versions and world_size.
    """
    return {
        **job.facts,
        "recipe": redact(to_dict(job.recipe)),
        "ds_config": redact(job.ds_config),
        "versions": versions(),
        "world_size": world_size,
    }


def compare(manifest: Mapping[str, Any], record: Mapping[str, Any], accepted: Collection[str], path: Path) -> list[str]:
    """Return a line for every change that is allowed since `path` was saved.

    Args:
        manifest: of the checkpoint; what it does not have, as older ones do not, is no change.
        record: of this run, see `record`.
        accepted: keys that need consent and have it, see `parse_accepted`.
        path: the checkpoint, for the message.

    Raises:
        CheckpointError: something has changed that must not, or has no consent; it lists all of that. Or the manifest
            is none.
    """
    if wrong := [name for name in _SECTIONS[:3] if not isinstance(manifest.get(name, {}), Mapping)]:
        raise CheckpointError(f"{path}: {wrong[0]} of its manifest is no mapping; it was not written by dstrain")
    found = list(_changes(manifest, record))
    refused = [c for c in found if c.verdict == "refused"]
    asked = [c for c in found if c.verdict == "consent" and c.key not in accepted]
    if refused or asked:
        parts = [f"refused: {'; '.join(map(str, refused))}"] if refused else []
        parts += [f"needs consent: {'; '.join(map(str, asked))}"] if asked else []
        given = [c for c in found if c.verdict == "consent" and c not in asked]
        parts += [f"accepted: {'; '.join(map(str, given))}"] if given else []  # it may be the cause of what is refused
        ways = ["Change it back", f"pass --accept {','.join(c.key for c in asked)}"][: 1 if refused else 2]
        raise CheckpointError(
            f"{path}: cannot be continued, since this run differs; {'. '.join(parts)}. {', '.join(ways)},"
            " or choose another run_dir"
        )
    return [f"{'accepted' if c.verdict == 'consent' else 'changed'} since the checkpoint: {c}" for c in found]


def parse_accepted(text: str) -> frozenset[str]:
    """Read KEY[,KEY...] of the command line; ConfigError for one that consent is not asked for."""
    keys = frozenset(key.strip() for key in text.split(",") if key.strip())
    for key in sorted(keys):
        if key not in KEYS:
            known = [k for k in KEYS if verdict(k) == "consent"]
            raise ConfigError(
                f"--accept {key}: no key of a recipe{did_you_mean(key, known)} (can be accepted: {', '.join(known)})"
            )
        if verdict(key) == "may":
            raise ConfigError(f"--accept {key}: it may change without consent; leave it out")
        if verdict(key) == "refused":
            raise ConfigError(f"--accept {key}: it cannot change within a run; choose another run_dir for it")
    return keys


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what computes, by name; "" for what is not installed, and the commit of the code."""
    found = {"dstrain": dstrain.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found | {"commit": _commit(Path(__file__).parent)}


def _commit(folder: Path) -> str:
    """Return the last git commit that changed the files of `folder`, or "" where git tracks none of them."""
    command = ["git", "-C", str(folder), "log", "-1", "--format=%H", "--", "."]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def _changes(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[Change]:
    for key, now in record.items():
        if key not in _SECTIONS and key in manifest and not _same(manifest[key], now):
            yield Change(key, manifest[key], now, "refused")
    then, now = redact(manifest.get("recipe", {})), record["recipe"]
    for key in KEYS:
        old, new = _at(then, key), _at(now, key)
        if old is not _UNSET and new is not _UNSET and not _same(old, new):
            yield Change(key, old, new, verdict(key))
    if "world_size" in manifest and manifest["world_size"] != record["world_size"]:
        yield Change("world size", manifest["world_size"], record["world_size"], "may")
    for section in ("ds_config", "versions"):
        if section in manifest:
            then, now = flat(redact(manifest[section])), flat(record[section])
            for key in sorted(then.keys() | now.keys()):
                old, new = then.get(key, _UNSET), now.get(key, _UNSET)
                if not _same(old, new) and not key.startswith(_OF_RECIPE):
                    yield Change(f"{section} {key}", old, new, "may")


def _at(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, which may be a mapping itself, as model.components is."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part, _UNSET) if isinstance(value, Mapping) else _UNSET
    return value


def _same(was: Any, now: Any) -> bool:
    """Whether two values are the same once both have been JSON, and where one is masked, as far as can be told."""
    if was is _UNSET or now is _UNSET:
        return was is now
    texts = [json.dumps(value, sort_keys=True) for value in (was, now)]
    if texts[0] == texts[1] or (_is_number(was) and _is_number(now) and was == now):
        return True
    for masked, other in (texts, texts[::-1]):
        if MASK in masked and fnmatchcase(other, "*".join(map(glob.escape, masked.split(MASK)))):
            return True
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if value is _UNSET:
        return "not set"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]  # a digest
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
