"""What an argument is: asked before it is compared, since to compare what is no number raises an error that names no argument."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_number(value: Any) -> bool:
    """One finite number, of Python's, numpy's or jax's; a bool is none."""
    if isinstance(value, (list, tuple)):  # ragged ones numpy refuses to look at
        return False
    array = np.asarray(value)
    return array.ndim == 0 and array.dtype.kind in "iuf" and bool(np.isfinite(array))
