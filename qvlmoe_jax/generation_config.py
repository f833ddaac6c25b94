"""`generation_config.json`: when a checkpoint's answers end, and how its authors sample. No jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.safetensors_io import parse_json

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
UNSAID = {"temperature": 1.0, "top_k": 50}
"""What transformers fills in where a file turns sampling on (configuration_utils.py, `_get_default_generation_params`)."""
MAX_ID = 2**31 - 1
"""Token ids are int32."""


@dataclass(frozen=True)
class GenerationConfig:
    """What the file says. All are equal to each other: none of it is part of a compiled program.

    Attributes:
      eos_token_id: the tokens that end an answer; empty = none does.
      pad_token_id: fills an answer's row after its end.
      sampling: `generate`'s arguments, those that the file names; temperature 0 when it turns sampling off.
      file: the file's own object, which holds more than is used here.
    """

    eos_token_id: tuple[int, ...] = field(default=(), compare=False)
    pad_token_id: int | None = field(default=None, compare=False)
    sampling: Mapping[str, float] = field(default_factory=dict, compare=False)
    file: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_directory(cls, directory: str | Path, config: Mapping[str, Any] | None = None) -> GenerationConfig:
        """Reads `generation_config.json`; ids that it lacks come from `config`'s (the object in `config.json`), as in HF.

        Raises:
          ConfigError: the file is not a JSON object, or an id or a sampling value is not a number.
        """
        file = Path(directory) / FILE
        own = parse_json(file.read_bytes(), str(file)) if file.exists() else {}
        if not isinstance(own, dict):
            raise ConfigError(f"{file}: expected a JSON object")
        ids = {name: own.get(name) for name in ("eos_token_id", "pad_token_id")}
        for section in (config or {}, (config or {}).get("text_config") or {}):
            ids = {name: section.get(name) if value is None else value for name, value in ids.items()}
        eos, pad = ids["eos_token_id"], ids["pad_token_id"]
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        for value in (*eos, *([] if pad is None else [pad])):
            if type(value) is not int or not 0 <= value <= MAX_ID:
                raise ConfigError(f"{file}: eos_token_id or pad_token_id holds {value!r}, expected token ids")
        sampling = {name: own[name] for name in SAMPLING if own.get(name) is not None}
        for name, value in sampling.items():
            if type(value) not in (int, float):
                raise ConfigError(f"{file}: {name} is {value!r}, expected a number")
        if own.get("do_sample", False):
            sampling = UNSAID | sampling
        else:
            sampling["temperature"] = 0.0
        return cls(tuple(eos), pad, sampling, own)

    def to_hf(self) -> dict[str, Any]:
        """The object for a `generation_config.json`: the file's own with these ids, or one that says the same."""
        out = dict(self.file)
        if eos := list(self.eos_token_id):
            out["eos_token_id"] = eos if len(eos) > 1 else eos[0]
        if self.pad_token_id is not None:
            out["pad_token_id"] = self.pad_token_id
        if not self.file and self.sampling.get("temperature"):
            out.update({"top_k": 0} | dict(self.sampling), do_sample=True)  # unsaid, it would be 50
        return out
