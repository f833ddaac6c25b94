"""The real Qwen3-VL tokenizer, template and processor files, rebuilt: a directory the hub's files would make.

data/qwen_ranks.xz holds the 151,643 byte strings of Qwen's vocabulary in the order of their ids: one byte of length each, then
the strings. `python -m tests.qwen_tokenizer qwen.tiktoken` packs it from the file in the wheel of dashscope 2.0.2 (Apache-2.0).
tokenizer.json comes out byte for byte as the hub's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

DATA = Path(__file__).parent / "data"
RANKS = DATA / "qwen_ranks.xz"
TEMPLATE = DATA / "qwen3_vl_chat_template.jinja"
HUB_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"

NUM_RANKS = 151643
SPECIAL = (
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
    ),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"),
    *("<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build(directory: Path) -> Path:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.json and both preprocessor files."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(directory / "tokenizer.json")
    template = TEMPLATE.read_text(encoding="utf-8").rstrip("\n")
    pixels = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels["processor_class"] = "Qwen3VLProcessor"
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in _added_tokens()
            },
            "additional_special_tokens": list(SPECIAL[1:]),
            "bos_token": None,
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 262144,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        "chat_template.json": {"chat_template": template},
        "preprocessor_config.json": {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **pixels,
        },
        "video_preprocessor_config.json": {
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": "Qwen3VLVideoProcessor",
            **pixels,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    return directory


def _added_tokens() -> list[dict[str, Any]]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return [
        {"id": NUM_RANKS + i, "content": token, **flags, "special": i < len(SPECIAL)} for i, token in enumerate(SPECIAL + ADDED)
    ]


def _write_tokenizer(path: Path) -> None:
    ranks = {token: rank for rank, token in enumerate(_unpack(lzma.decompress(RANKS.read_bytes())))}
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = (_last_merge(ranks, token, rank) for token, rank in ranks.items() if len(token) > 1)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    model = {
        **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""},
        **{"fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
        "vocab": {spelled[token]: rank for token, rank in ranks.items()},
        "merges": [f"{spelled[a]} {spelled[b]}" for a, b in pairs],
    }
    whole = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens()},
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        **{"post_processor": byte_level, "decoder": byte_level, "model": model},
    }
    Tokenizer.from_str(json.dumps(whole, ensure_ascii=False)).save(str(path), pretty=True)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == HUB_SHA256, "not the hub's tokenizer.json"


def _last_merge(ranks: dict[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes]:
    """The pair that byte pair encoding joins last to make `token` from tokens of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = ((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
        best, at = min(candidates)
        assert best < rank
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _unpack(data: bytes) -> list[bytes]:
    lengths, body = data[:NUM_RANKS], data[NUM_RANKS:]
    ends = 0
    return [body[(start := ends) : (ends := start + length)] for length in lengths]


def _pack(tiktoken_file: Path) -> None:
    tokens = [base64.b64decode(line.split()[0]) for line in tiktoken_file.read_bytes().splitlines() if line]
    assert len(tokens) == NUM_RANKS
    data = bytes(len(token) for token in tokens) + b"".join(tokens)
    RANKS.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    _pack(Path(sys.argv[1]))
