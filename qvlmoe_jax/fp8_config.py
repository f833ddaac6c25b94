"""`quantization_config` of a config.json."""

from __future__ import annotations

from typing import Any

from qvlmoe_jax.errors import ConfigError


def parse_quantization(section: Any) -> tuple[int, int]:
    """The block size `[rows, columns]` of a config.json's `quantization_config`.

    Raises:
      ConfigError: another method, format, or block; only block-scaled float8 can be dequantised.
    """
    where = "config.json: quantization_config"
    if not isinstance(section, dict):
        raise ConfigError(f"{where} is {type(section).__name__}, expected an object")
    for key, expected in (("quant_method", "fp8"), ("fmt", "e4m3")):
        found = section.get(key, expected if key == "fmt" else None)
        if found != expected:
            raise ConfigError(f"{where}.{key} is {found!r}, expected {expected!r}; use the unquantised checkpoint")
    block = section.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise ConfigError(f"{where}.weight_block_size is {block!r}, expected two positive ints, as [128, 128]")
    return block[0], block[1]
