"""A model directory's weights as a QLoRA base: its linears are quantised when they are read; the surface of other weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qvlmoe_jax.checkpoint import Weights
from qvlmoe_jax.lora import Quantization, linear_dims
from qvlmoe_jax.quantise import codes_of, dequantise, quantised_shapes, scales_of

FLOAT32 = np.dtype(np.float32)


class QuantisedBase:
    """`weights` with `PATH/codes` and `PATH/scales` for each linear at PATH; everything else in `dtype`.

    Attributes:
      shapes, dtypes: path -> shape, dtype.
    """

    def __init__(self, weights: Weights, kind: Quantization, dtype: np.dtype):
        self.weights = weights
        self.kind: Quantization = kind
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        assert weights.dtypes  # checks the stored tree
        for path, shape in weights.shapes.items():
            dims = linear_dims(path)
            if dims is None:
                self.shapes[path], self.dtypes[path] = shape, np.dtype(dtype)
                continue
            codes, scales = quantised_shapes(kind, shape, dims)
            self.shapes |= {f"{path}/codes": codes, f"{path}/scales": scales}
            self.dtypes |= {f"{path}/codes": np.dtype(np.int8 if kind == "int8" else np.uint8), f"{path}/scales": FLOAT32}

    def read(
        self, path: str, index: tuple[slice, ...] | None = None, dtype: np.dtype | None = None, *, copy: bool = True
    ) -> np.ndarray:
        """A slice of one array. Of a linear whole channels are read and quantised, one layer at a time."""
        weight, _, what = path.rpartition("/")
        if path in self.weights.shapes:
            return self.weights.read(path, index, dtype or self.dtypes[path], copy=copy)
        shape = self.shapes[path]
        bounds = [s.indices(size)[:2] for s, size in zip(index or (slice(None),) * len(shape), shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], self.dtypes[path])
        dims = linear_dims(weight)
        assert dims is not None
        first, last = len(shape) - sum(dims), len(shape) - dims[1]
        inner = tuple(slice(*bound) for bound in bounds[first:last])
        for place, part in _layers(bounds, first):
            w = self._channels(weight, (*part, *(slice(*bound) for bound in bounds[last:])), first, last)
            scales = scales_of(self.kind, w, dims)
            made = scales if what == "scales" else codes_of(self.kind, w, scales, dims)
            out[place] = made[(*(slice(None),) * first, *inner)]
        return out

    def expanded(self, path: str, index: Sequence[slice]) -> np.ndarray:
        """A slice of the linear at `path` as the codes stand for it, float32."""
        dims = linear_dims(path)
        assert dims is not None
        first, last = len(index) - sum(dims), len(index) - dims[1]
        w = self._channels(path, (*index[:first], *index[last:]), first, last)
        scales = scales_of(self.kind, w, dims)
        full = dequantise(self.kind, codes_of(self.kind, w, scales, dims), scales, dims, w.shape[last - 1])
        return full[(*(slice(None),) * first, *index[first:last])]

    def _channels(self, path: str, index: Sequence[slice], first: int, last: int) -> np.ndarray:
        """Whole channels: all inputs of the leading dims and outputs that `index` names."""
        inputs = (slice(None),) * (last - first)
        return self.weights.read(path, (*index[:first], *inputs, *index[first:]), FLOAT32, copy=False)


def _layers(bounds: Sequence[tuple[int, int]], first: int) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For each layer of the leading dims: its place in the result, its place in the parameter."""
    if not first:
        return [((), ())]
    start, stop = bounds[0]
    rest = tuple(slice(*bound) for bound in bounds[1:first])
    return [((slice(i - start, i - start + 1),), (slice(i, i + 1), *rest)) for i in range(start, stop)]
