"""What the backward pass recomputes instead of keeping: one decision for the text and the vision scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from qvlmoe_jax.backend import BackendConfig


def rematerialised(body: Callable[..., Any], backend: BackendConfig) -> Callable[..., Any]:
    """The scan body under `backend.remat`: as it is, recomputed whole, or with only its matrix products kept."""
    if backend.remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if backend.remat == "dots" else None
    # A scan body needs no CSE barrier: the loop already keeps forward and backward apart.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def is_recomputed(path: str, backend: BackendConfig) -> bool:
    """Whether the backward pass runs the layer again that has the parameter at `path`."""
    return backend.remat != "none" and ("language_model/layers/" in path or "visual/blocks/" in path)
