"""Which tokens are learnt: those of assistant turns, found by token ids alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qvlmoe_jax.batch import IGNORED_LABEL
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.tokenizer import Tokenizer

CONTROL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True)
class TurnTokens:
    """Token ids of the chat format `<|im_start|>ROLE\\n...<|im_end|>\\n`. `assistant` is the role's name."""

    im_start: int
    im_end: int
    assistant: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TurnTokens:
        """From a `qvlmoe_jax.tokenizer.Tokenizer`.

        Raises:
          ConfigError: a tokenizer without the chat format's tokens.
        """
        im_start, im_end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
        if im_start is None or im_end is None:
            raise ConfigError("the tokenizer has no <|im_start|> and <|im_end|>, expected Qwen's chat format")
        return cls(im_start, im_end, tuple(tokenizer.encode(["assistant"], add_special_tokens=False)[0].tolist()))


def assistant_labels(ids: np.ndarray, tokens: TurnTokens, *, label_newline: bool = False) -> np.ndarray:
    """Labels `[n]` of one conversation `ids [n]`: itself on assistant turns, -100 elsewhere. Not shifted.

    A turn begins at `<|im_start|>` followed by exactly the tokens of `assistant`. What is learnt starts after the one token
    that ends the header's line and runs up to and including `<|im_end|>`; with `label_newline` the token after it too. The
    word "assistant" inside a turn starts nothing (in Qwen's own finetuning code it does), and a turn that never ends is not
    learnt.

    The header's last token is counted, not compared: before an answer that begins with a newline it is `\\n\\n`, not `\\n`.
    """
    labels = np.full(len(ids), IGNORED_LABEL, np.int32)
    header = np.array([tokens.im_start, *tokens.assistant])
    ends = np.flatnonzero(ids == tokens.im_end)
    for start in np.flatnonzero(ids == tokens.im_start):
        after = start + len(header)
        if not np.array_equal(ids[start:after], header):
            continue
        end = ends[np.searchsorted(ends, after)] if len(ends) and ends[-1] >= after else None
        if end is not None and end > after:
            stop = end + (2 if label_newline else 1)
            labels[after + 1 : stop] = ids[after + 1 : stop]
    return labels
