"""Prune the Qwen2.5 tokenizer to the words of the demo, without changing how they are cut.

    python tokenizer.py PACKAGE TOKENIZER --out launch/demo/model/tokenizer

PACKAGE is the npm package emoji-datasource-twitter, TOKENIZER a folder with Qwen2.5's `tokenizer.json`. Kept
are the special tokens, all 256 bytes, and every merge that byte-pair encoding applies to the covered texts.
Leaving out the other merges changes nothing for those texts, as each step takes the best merge that applies.
Any other text still has a tokenization, of more and shorter pieces.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from emoji import read_captions, read_package
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
PREFIX_TOKENS = 34  # what the Qwen-Image pipeline drops from the front
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
WORDS = Path(__file__).with_name("words.txt")

log = logging.getLogger("tokenizer")


def covered_texts(package: Path) -> list[str]:
    """Return the texts whose tokenization must stay exactly Qwen2.5's."""
    captions = read_captions().values()
    names = dict.fromkeys(e.name for e in read_package(package))
    words = WORDS.read_text().split()
    return [PREFIX, SUFFIX, *names, *captions, *(f"a {c}" for c in captions), *(f" {w}" for w in words)]


def applied_merges(piece: str, ranks: dict[tuple[str, str], int]) -> Iterable[tuple[str, str]]:
    """Yield the merges that byte-pair encoding applies to `piece`, best rank first."""
    parts = list(piece)
    while True:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)), default=None)
        if best not in ranks:
            return
        yield best
        merged, i = [], 0
        while i < len(parts):
            step = 2 if tuple(parts[i : i + 2]) == best else 1
            merged.append("".join(parts[i : i + step]))
            i += step
        parts = merged


def prune(source: dict, texts: list[str]) -> dict:
    """Return the `tokenizer.json` of `source` with only what `texts` need, ids renumbered densely."""
    whole = Tokenizer.from_str(json.dumps(source))
    merges = [merge.split(" ") for merge in source["model"]["merges"]]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    specials = [token["content"] for token in source["added_tokens"]]
    kept: set[tuple[str, str]] = set()
    for text in texts:
        for special in specials:
            text = text.replace(special, "")
        for piece, _ in whole.pre_tokenizer.pre_tokenize_str(whole.normalizer.normalize_str(text)):
            kept.update(applied_merges(piece, ranks))
    ordered = sorted(kept, key=ranks.__getitem__)
    alphabet = [t for t, _ in sorted(source["model"]["vocab"].items(), key=lambda item: item[1]) if len(t) == 1]
    pieces = list(dict.fromkeys([*alphabet[:256], *("".join(pair) for pair in ordered)]))
    pruned = json.loads(json.dumps(source))
    pruned["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    pruned["model"]["merges"] = [" ".join(pair) for pair in ordered]
    for i, token in enumerate(pruned["added_tokens"]):
        token["id"] = len(pieces) + i
    return pruned


def verify(pruned: Qwen2Tokenizer, whole: Tokenizer, texts: list[str]) -> None:
    """Fail unless all `texts` are cut as by the real tokenizer and any text survives the round trip."""
    for text in texts:
        ours = pruned.convert_ids_to_tokens(pruned(text).input_ids)
        assert ours == whole.encode(text, add_special_tokens=False).tokens, (text, ours)
    assert len(pruned(PREFIX).input_ids) == PREFIX_TOKENS
    for text in ("Ünïcödé, 漢字 and 🙂 in Grönland\n\ttabs  and   spaces", "x = {'a': [1, 2.5]}"):
        assert pruned.decode(pruned(text).input_ids) == text
    assert pruned.pad_token == "<|endoftext|>" and sorted(pruned.get_vocab().values()) == list(range(len(pruned)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    source = json.loads((args.tokenizer / "tokenizer.json").read_text())
    settings = json.loads((args.tokenizer / "tokenizer_config.json").read_text())
    texts = covered_texts(args.package)
    pruned = prune(source, texts)
    ids = {token["content"]: token["id"] for token in pruned["added_tokens"]}
    old = settings["added_tokens_decoder"].values()
    settings["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in old}
    settings.pop("chat_template", None)  # the pipeline has its own template

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.json").write_text(json.dumps(pruned, ensure_ascii=False, separators=(",", ":")) + "\n")
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    verify(Qwen2Tokenizer.from_pretrained(args.out), Tokenizer.from_str(json.dumps(source)), texts)
    log.info(
        "%d tokens, of which %d special; %d texts verified",
        len(pruned["model"]["vocab"]) + len(ids),
        len(ids),
        len(texts),
    )


if __name__ == "__main__":
    main()
