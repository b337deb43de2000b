"""Write the demo's text encoder: a tiny Qwen2.5-VL with random weights from a fixed seed.

    python text_encoder.py TOKENIZER --out launch/demo/model/text_encoder

Random features are enough to tell a few hundred captions apart, which the script checks; what is learnt of
language is learnt by the DiT. The shapes follow Qwen2.5-VL (grouped queries, multimodal rotary positions,
a vision tower that text alone never enters), so it runs the code of the real encoder.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from emoji import read_captions
from tokenizer import PREFIX, PREFIX_TOKENS, SUFFIX
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

HIDDEN = 128
MIN_DISTANCE = 0.3  # between two captions, of the embeddings' own length

log = logging.getLogger("text_encoder")


def build(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Return the model with unit-variance embeddings and variance-preserving projections."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
        # sections count pairs of a head's 32 channels: time, height, width
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
            elif isinstance(module, nn.Linear) and module is not model.lm_head:
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return model.bfloat16()


@torch.no_grad()
def embed(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, caption: str) -> Tensor:
    """Return the last hidden states [T, d] of a caption in the Qwen-Image template, without the prefix."""
    ids = tokenizer(PREFIX + caption + SUFFIX, return_tensors="pt").input_ids
    return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, PREFIX_TOKENS:].float()


def nearest(embeds: list[Tensor]) -> tuple[float, int, int]:
    """Return the smallest relative distance between two of the ragged [T, d] embeddings, and whose it is."""
    flat = nn.utils.rnn.pad_sequence(embeds, batch_first=True).flatten(1)  # [N, T * d]
    distance = torch.cdist(flat, flat) / flat.norm(dim=1).mean()
    distance.fill_diagonal_(torch.inf)
    i, j = divmod(int(distance.argmin()), len(flat))
    return distance[i, j].item(), i, j


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="folder of the pruned tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tokenizer = Qwen2Tokenizer.from_pretrained(args.tokenizer)
    build(tokenizer, args.seed).save_pretrained(args.out)
    # stored in half, loaded in full precision when nobody says otherwise, as diffusers does with its own parts
    config = json.loads((args.out / "config.json").read_text()) | {"dtype": "float32"}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).eval()
    captions = list(read_captions().values())
    distance, i, j = nearest([embed(model, tokenizer, caption) for caption in captions])
    log.info(
        "%d parameters; nearest captions: %r, %r at %.2f", model.num_parameters(), captions[i], captions[j], distance
    )
    assert distance > MIN_DISTANCE, "two captions are too close to tell apart"


if __name__ == "__main__":
    main()
