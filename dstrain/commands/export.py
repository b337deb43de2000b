"""Write a checkpoint as a model that diffusers loads, or as LoRA files; or turn a LoRA file into another form.

    dstrain export runs/full                                    the newest checkpoint, as a model folder
    dstrain export runs/lora/checkpoints/step-00001000          LoRA files for diffusers and ComfyUI
    dstrain export runs/lora --merge --out merged               the whole model with the LoRA in its weights
    dstrain export a.safetensors --format comfyui --out b.safetensors --model Qwen/Qwen-Image

Runs on one machine without GPU and holds one tensor at a time. A checkpoint's digests are checked first.
"""

import argparse
from pathlib import Path
from typing import Any

from dstrain.commands.arguments import given, path
from dstrain.errors import CheckpointError, ConfigError

ABOUT = "write a checkpoint as a diffusers model or as LoRA files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "source", metavar="CHECKPOINT", type=path, help="checkpoint, run folder (its newest checkpoint), or LoRA file"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=path, help="must not exist (RUN_DIR/export-step-N); FILE.safetensors: one LoRA"
    )
    parser.add_argument(
        "--format", choices=("diffusers", "peft", "comfyui", "all"), help="of LoRA files (diffusers and comfyui)"
    )
    parser.add_argument(
        "--weights", choices=("ema", "trained"), help="the averaged ones or the last (ema where the checkpoint has it)"
    )
    parser.add_argument("--merge", action="store_true", help="the whole model, with the LoRA merged into its weights")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of what is written (as the run computed)")
    parser.add_argument(
        "--model", metavar="FOLDER", type=given, help="the model that was trained, folder or hub id (the recipe's)"
    )


def run(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is written, and write."""
    import torch

    if args.merge and args.format:
        raise ConfigError("--merge writes the whole model, --format is for LoRA files; give one of them")
    args.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.dtype]
    folder = _checkpoint(args.source)
    if folder is None:
        _convert(args)
    else:
        _export(args, folder)
    files = [args.out] if args.out.is_file() else [p for p in args.out.rglob("*.safetensors") if p.stat().st_nlink == 1]
    print(f"{args.out}: {sum(p.stat().st_size for p in files) / 1e6:,.1f} MB written")


def _checkpoint(source: Path) -> Path | None:
    """Return the checkpoint folder that `source` names, or None if it is a LoRA."""
    from dstrain.engine.checkpoint import MANIFEST, committed, step_of

    if (source / MANIFEST).is_file():
        return source
    folders = (source, source / "checkpoints") if source.is_dir() else ()
    if found := [path for folder in folders for path in committed(folder) if (path / MANIFEST).is_file()]:
        return max(found, key=step_of)
    if source.is_file() or any(not p.name.startswith("rank-") for p in source.glob("*.safetensors")):
        return None
    what = f"neither a checkpoint ({MANIFEST}) nor a run folder with one, nor a LoRA file"
    raise CheckpointError(f"{source}: {what if source.exists() else 'no such file or folder'}")


def _export(args: argparse.Namespace, folder: Path) -> None:
    from dstrain.engine.export import check_files, export, open_base, open_checkpoint
    from dstrain.pipelines import PIPELINES

    checkpoint = open_checkpoint(folder, ema={"ema": True, "trained": False, None: None}[args.weights])
    for flag in ("merge", "format"):
        if getattr(args, flag) and checkpoint.lora is None:
            raise ConfigError(f"--{flag} is for LoRA, and {folder} holds trained weights themselves; leave it out")
    if args.out is None:
        args.out = folder.resolve().parents[1] / f"export-{folder.name}"
    forms = _forms(args, whole=args.merge or checkpoint.lora is None)
    check_files(folder)
    model = checkpoint.model

    def base() -> Any:
        try:
            pipeline = PIPELINES.get(model.family).from_pretrained(
                args.model or model.path, components=model.components, load=()
            )
            return open_base(pipeline, model.init, checkpoint.seed)
        except CheckpointError as e:
            raise CheckpointError(f"{e}; if the model has moved, say where it is: --model FOLDER") from e

    export(checkpoint, args.out, base, forms=forms, merge=args.merge, dtype=args.dtype)


def _convert(args: argparse.Namespace) -> None:
    from dstrain.commands.family import family_of
    from dstrain.engine.export import merged, open_base, write_loras, write_model
    from dstrain.models.lora_files import open_lora

    for flag in ("model", "out"):
        if getattr(args, flag) is None:
            raise ConfigError(f"{args.source} is a LoRA: give --{flag} too")
    if args.weights:
        raise ConfigError(f"--weights is for checkpoints, and {args.source} is a LoRA; leave it out")
    forms = _forms(args, whole=args.merge)
    base = open_base(family_of(args.model).from_pretrained(args.model, load=()))
    lora = open_lora(args.source, base.shapes)
    if not args.merge:
        write_loras(args.out, lora, forms, args.dtype)
        return
    reader = merged(lora, base)
    write_model(args.out, base, reader, args.dtype or reader(next(iter(base.shapes))).dtype)


def _forms(args: argparse.Namespace, *, whole: bool) -> tuple[str, ...]:
    """Return the forms of LoRA files that are asked for; refuse an --out that is there or does not suit them."""
    from dstrain.engine.export import FORMS
    from dstrain.models.lora_files import FILES

    forms = {None: FORMS, "all": tuple(FILES)}.get(args.format, (args.format,))
    if args.out.exists() or args.out.is_symlink():
        raise ConfigError(f"{args.out} is there already; give a new one (--out), or remove it first")
    if args.out.suffix == ".safetensors" and whole:
        raise ConfigError(f"--out {args.out} is one file, and a whole model is a folder; name a folder")
    if args.out.suffix == ".safetensors" and (len(forms) > 1 or forms == ("peft",)):
        raise ConfigError(f"--out {args.out} is one file: add --format diffusers or comfyui, or name a folder")
    return forms
