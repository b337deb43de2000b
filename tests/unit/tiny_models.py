"""Complete model folders in diffusers layout, of a few hundred thousand random weights, for the tests."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

HIDDEN = 32  # width of the text encoder, joint_attention_dim of the transformer

TRANSFORMER = {
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": HIDDEN,
    "axes_dims_rope": (8, 12, 12),
}

# The scheduler of the published Qwen-Image checkpoint.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_model_folder(folder: Path, *, seed: int = 0) -> Path:
    """Write transformer, vae, text_encoder, tokenizer, scheduler and model_index.json into `folder`; returns it.

    The weights are random and far from any symmetric point, so that every branch shows in the output.
    `diffusers.QwenImagePipeline.from_pretrained` loads the folder.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": tiny_transformer(),
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(len(tokenizer)),
            "tokenizer": tokenizer,
            "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index |= {"_class_name": "QwenImagePipeline", "_diffusers_version": "0.36.0"}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def tiny_transformer(**changes: object) -> QwenImageTransformer2DModel:
    """A diffusers transformer whose parameters are all noise (its own zero biases would hide mistakes)."""
    model = QwenImageTransformer2DModel(**{**TRANSFORMER, **changes})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def tiny_vae() -> AutoencoderKLQwenImage:
    """8x smaller in each direction and 16 channels like the real one, with 4 base channels."""
    return AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1)


def tiny_text_encoder(vocab_size: int) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with two text layers and one vision layer."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [0],
    }
    tokens = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.25)
    return model


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE that knows the words of Qwen-Image's prompt template: its prefix is 34 tokens, as in the real."""
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    words = PREFIX.replace("<|im_start|>", "").replace("<|im_end|>", "")
    bpe.train_from_iterator([words, "assistant", " a red cat on blue grass"], trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    return Qwen2Tokenizer(vocab=state["vocab"], merges=merges, extra_special_tokens=SPECIAL[1:])
