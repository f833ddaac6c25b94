"""The checkpoint's own tokenizer through the `tokenizers` library: transformers takes seconds to import and is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from qvlmoe_jax.errors import ProcessorError

# models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX: for directories that hold vocab.json and merges.txt alone
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """`encode` and `decode` as the checkpoint's files say.

    Attributes:
      config: tokenizer_config.json.
      special_tokens: `eos_token` and its like, by HF's names.
      pad_token_id: what fills a batch; the end token where the files name no padding.
      padding_side: tokenizer_config.json's, or None.
    """

    def __init__(self, backend: FastTokenizer, config: Mapping[str, Any]):
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.config = dict(config)
        _add_missing_tokens(backend, self.config.get("added_tokens_decoder") or {})
        self.special_tokens = {name: _content(self.config[name]) for name in _NAMED if self.config.get(name)}
        pad = self.special_tokens.get("pad_token") or self.special_tokens.get("eos_token")
        self.pad_token_id = (self.id_of(pad) if pad else None) or 0
        side = self.config.get("padding_side")
        if side not in (None, "left", "right"):
            raise ProcessorError(f"tokenizer_config.json: padding_side is {side!r}, expected 'left' or 'right'")
        self.padding_side: str | None = side

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """Reads tokenizer.json (or vocab.json with merges.txt) and tokenizer_config.json.

        Raises:
          ProcessorError: files missing or not a tokenizer's.
        """
        folder = Path(directory)
        config = read_json(folder / "tokenizer_config.json") or {}
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(FastTokenizer.from_file(str(folder / "tokenizer.json")), config)
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return cls(_byte_level_bpe(folder), config)
        except ProcessorError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ProcessorError(f"{folder}: the tokenizer's files cannot be read: {error}; expected Hugging Face's") from error
        raise ProcessorError(
            f"{folder}: no tokenizer found, expected tokenizer.json, or vocab.json with merges.txt; copy them from the checkpoint"
        )

    def id_of(self, token: str) -> int | None:
        """The id of one token, None if the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[np.ndarray]:
        """Ids `[n]` int64 of each text. Raises ProcessorError for a text that is not Unicode."""
        for text in texts:  # bytes of a terminal or a pipe that are not UTF-8 arrive as lone surrogates
            if not _is_unicode(text):
                raise ProcessorError(f"the text {text[:60]!a} holds what is not Unicode text; expected UTF-8, convert it first")
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [np.array(one.ids, np.int64) for one in encoded]

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """The text of ids `[n]` (numpy, jax or a list); bytes that are not UTF-8 yet become U+FFFD."""
        flat = np.asarray(ids)
        if flat.ndim > 1 or (flat.size and flat.dtype.kind not in "iu"):
            raise ProcessorError(f"ids are {flat.dtype} of shape {list(flat.shape)}, expected one row of integers")
        if flat.size and not 0 <= flat.min() <= flat.max() < 2**32:
            raise ProcessorError(f"ids are {flat.min()} .. {flat.max()}, expected those of tokens; leave out labels' -100")
        return self.backend.decode(flat.reshape(-1).tolist(), skip_special_tokens=skip_special_tokens)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None if there is no such file.

    Raises:
      ProcessorError: the file is there but holds something else.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProcessorError(f"{path} is not JSON: {error}; copy the checkpoint's own file") from error
    if not isinstance(value, dict):
        raise ProcessorError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)  # 4.x writes AddedToken as an object


def _add_missing_tokens(backend: FastTokenizer, declared: Mapping[str, Any]) -> None:
    """tokenizer_config.json may declare added tokens that tokenizer.json lacks; transformers adds them in the order of ids."""
    for number, fields in sorted(declared.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(fields["content"]) is None:
            flags = {key: bool(fields.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized", "special")}
            backend.add_tokens([AddedToken(fields["content"], **flags)])
            if backend.token_to_id(fields["content"]) != int(number):
                raise ProcessorError(
                    f"tokenizer_config.json gives {fields['content']!r} the id {number}, but it would become "
                    f"{backend.token_to_id(fields['content'])}; expected a tokenizer.json of the same checkpoint"
                )


def _byte_level_bpe(folder: Path) -> FastTokenizer:
    backend = FastTokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
