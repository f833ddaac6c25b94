"""Writes a Hugging Face checkpoint directory that is small but real: the hub's file names, key names, orientation and dtype.

`transformers` loads it like a released model. The weights are random, of order one, so that every part of the network moves
the logits (at the usual initialisation, 0.02, most mistakes hide below rounding).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qvlmoe_jax import Qwen3VLMoeConfig
from qvlmoe_jax.hf import expand

SEED = 7
NUM_SHARDS = 3
VOCAB_SIZE = 512
LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
ADDED = SPECIAL + (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()


def added_ids(vocab_size: int) -> dict[str, int]:
    """The ids of Qwen's added tokens: the last of the vocabulary, in the hub's order."""
    return {token: vocab_size - len(ADDED) + i for i, token in enumerate(ADDED)}


TOKEN_IDS = added_ids(VOCAB_SIZE)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "transformers_version": "4.57.0",
    "tie_word_embeddings": False,
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": TOKEN_IDS["<|endoftext|>"],
        "eos_token_id": TOKEN_IDS["<|im_end|>"],
    },
    "vision_config": {
        "model_type": "qwen3_vl_moe",
        "depth": 6,
        "hidden_size": 80,
        "intermediate_size": 112,
        "num_heads": 4,
        "out_hidden_size": 96,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [1, 2, 4],
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
    },
}

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' or 'image' in content %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif content.type == 'video' or 'video' in content %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_PIXELS = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}

SIDE_FILES: dict[str, dict[str, Any]] = {
    "generation_config.json": {
        "bos_token_id": TOKEN_IDS["<|endoftext|>"],
        "pad_token_id": TOKEN_IDS["<|endoftext|>"],
        "eos_token_id": [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.0,
        "transformers_version": "4.57.0",
    },
    "preprocessor_config.json": {
        **_PIXELS,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    "video_preprocessor_config.json": {
        **_PIXELS,
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
        "video_processor_type": "Qwen3VLVideoProcessor",
    },
    "tokenizer_config.json": {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    },
}


def build_tokenizer(lines: Iterable[str], vocab_size: int) -> Tokenizer:
    """Qwen's byte-level BPE with a small vocabulary, learnt from `lines`.

    Where they hold fewer words than the vocabulary has room for, the ids between the last word and the added tokens stay unused.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED[len(SPECIAL) :]])
    assert all(tokenizer.token_to_id(token) == i for token, i in added_ids(vocab_size).items())
    return tokenizer


def random_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norm scales 1 + 0.3 N(0,1), biases 0.2 N, embeddings 0.7 N, linears 1.2 / sqrt(fan_in) N; rounded to bfloat16."""
    noise = np.random.default_rng([SEED, zlib.crc32(key.encode())]).standard_normal(shape, np.float32)
    if key.endswith(".bias"):
        values = 0.2 * noise
    elif "embed_tokens" in key or "pos_embed" in key:
        values = 0.7 * noise
    elif len(shape) == 1:
        values = 1 + 0.3 * noise
    else:
        fan_in = shape[1] if ".experts." in key else math.prod(shape[1:])  # experts are [E, in, out], linears [out, in...]
        values = 1.2 / math.sqrt(fan_in) * noise
    return values.astype(ml_dtypes.bfloat16)


def write_checkpoint(directory: Path) -> int:
    """Writes the whole directory (created; files of an earlier run are overwritten). Returns the number of parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {"config.json": CONFIG, **SIDE_FILES}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    # The licence: an English text that is here and never changes.
    build_tokenizer(LICENSE.read_text(encoding="utf-8").splitlines(), VOCAB_SIZE).save(str(directory / "tokenizer.json"))

    rows = expand(Qwen3VLMoeConfig.from_hf(CONFIG))
    tensors = {row.key: random_tensor(row.key, row.hf_shape) for row in rows}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for key, tensor in tensors.items():  # in network order, cut by size: a layer may straddle two files, as on the hub
        shards[written * NUM_SHARDS // num_bytes][key] = tensor
        written += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        safetensors.numpy.save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.size for tensor in tensors.values())
