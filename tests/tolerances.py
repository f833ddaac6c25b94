"""Every numeric bound of the tests, once. They follow from measured noise and are never relaxed to make a test pass.

Independent fp32 implementations of this model differ by about 5e-6 in the logits (standard deviation about 1).
"""

LOGITS = 1e-4
"""Largest absolute difference of whole-model fp32 logits, at every valid position."""

MODULE = 1e-5
"""Largest absolute difference of one sub-module's fp32 output."""

BUCKETING = 1e-5
"""Largest change of a valid logit when the same input is padded to another static shape."""

AUX_LOSS = 1e-5
"""Largest absolute difference of the load-balancing loss."""

GRADIENT = 1e-4
"""Largest relative L2 difference of one parameter's gradient."""

ROTARY_ULP = 1
"""Units in the last place between our rotary tables and torch's."""

BF16_KL_RATIO = 1.25
"""Upper 95 % bootstrap bound of (our mean KL to fp32) / (transformers' mean KL to fp32), both in bfloat16."""

ABLATION = 10 * LOGITS
"""What a bug must at least change in the logits for the parity tests to be called sensitive to it."""

CURVE = 1e-4
"""Largest relative difference of a step's loss or gradient norm from the torch loop's, over ten steps."""

SAME_LOSS = 1e-5
"""Largest relative difference of losses that should be equal: packed or not, accumulated or not, chunked or not, remat or not."""

GREY_LEVELS = 2
"""Largest difference of a processed pixel from transformers' torchvision resize, of 255: two roundings, one per pass."""
