"""Grouped products, each row times its own expert's matrix: what the experts' kernels of TPU and GPU are made of.

R rows sorted by expert, E experts, I and O any input and output width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.layers import exact


def zero_past(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeroes the rows that belong to no group (padding tokens, experts of other devices)."""
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None], rows, 0)


def ragged_product(rows_RI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """`[R,O]`; rows that belong to nobody are not defined."""
    return jax.lax.ragged_dot(rows_RI, w_EIO, group_sizes_E, precision=exact(rows_RI))


def tokamax_product(rows_RI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """`[R,O]` by tokamax's kernels: Mosaic on Hopper, Triton on other GPUs, `jax.lax.ragged_dot` where there is neither.

    Raises:
      ConfigError: tokamax is not installed.
    """
    try:
        import tokamax
        from absl import flags
    except ImportError:
        raise ConfigError("experts = 'tokamax': that package is not installed; pip install 'qvlmoe_jax[gpu]'") from None
    if not flags.FLAGS.is_parsed():  # or tokamax parses the command line, which is not its own
        flags.FLAGS.mark_as_parsed()
    rows, w = _defined(rows_RI, w_EIO, group_sizes_E)
    return zero_past(tokamax.ragged_dot(rows, w, group_sizes_E, precision=exact(rows)), group_sizes_E)


@jax.custom_vjp
def _defined(rows: jax.Array, w: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same two arrays, with gradients that are zero where the kernels' are not defined.

    Kernels leave the rows of nobody as memory was. And up to 0.0.12 the Triton one adds what it reads past its rows to the
    gradient of an expert that has none (tokamax, issue 887).
    """
    del group_sizes
    return rows, w


def _defined_backward(group_sizes: jax.Array, gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    d_rows, d_w = gradients
    return zero_past(d_rows, group_sizes), jnp.where((group_sizes > 0)[:, None, None], d_w, 0), None


_defined.defvjp(lambda rows, w, group_sizes: ((rows, w), group_sizes), _defined_backward)
