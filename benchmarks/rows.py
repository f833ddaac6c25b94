"""The rows of the table that run a network: each builds both sides' calls on equal weights and inputs, and times them.

A row is a generator of `Timed`; `rows_of` finds them by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.models import SETTINGS, Both, quarter, random_ids
from benchmarks.pairs import Call, Timed, compare, fastest, seconds
from qvlmoe_jax import Batch
from qvlmoe_jax.generate import generate
from tests import cases, ours, reference
from train.config import LossConfig, OptimizerConfig, ScheduleConfig
from train.optim import make_optimizer, schedule
from train.state import init_state
from train.step import make_train_step

PICTURES = [
    [cases.Text(100), cases.Image(8, 12), cases.Text(314)],
    [cases.Text(200), cases.Image(12, 8), cases.Text(214)],
]
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1)


@dataclass(frozen=True)
class Sizes:
    """layers of the measured models; pairs per row; seconds a row may take once three pairs are done; answer: new tokens of a
    decode row; torch_compile: try `torch.compile` as one more setting of theirs."""

    layers: int = 4
    pairs: int = 5
    limit: float = 20.0
    answer: int = 24
    torch_compile: bool = False


def each_setting(make: Callable[[str], Call], *, compiled: Callable[[str], Call] | None = None) -> dict[str, Call]:
    """Theirs under every setting, in inference mode."""

    def quietly(call: Call) -> Call:
        def run() -> Any:
            with torch.inference_mode():
                return call()

        return run

    calls = {setting: quietly(make(setting)) for setting in SETTINGS}
    if compiled is not None:
        calls["torch.compile, grouped_mm + sdpa"] = quietly(compiled("grouped_mm + sdpa"))
    return calls


def _blocked(function: Any, model: Any, batch: Any) -> Call:
    """`function` on a batch that is in JAX's memory, as theirs is in torch's."""
    batch = jax.tree.map(jnp.asarray, batch)
    return lambda: jax.block_until_ready(function(model, batch))


def forward(sizes: Sizes) -> Iterator[Timed]:
    """Logits of every column of two rows of text with a picture each."""
    both = Both(quarter(sizes.layers))
    inputs = cases.build(both.config, PICTURES)
    batch = Batch.from_hf(both.ours.config, **inputs)
    run = jax.jit(lambda model, batch: model(batch).logits)

    def theirs(setting: str) -> Call:
        return functools.partial(reference.run, both.theirs(setting), inputs)

    def compiled(setting: str) -> Call:
        return functools.partial(reference.run, _compiled(both.theirs(setting)), inputs)

    tokens = int((inputs["attention_mask"] != 0).sum())
    yield compare(
        "forward, 2 x 512 with pictures",
        _blocked(run, both.ours, batch),
        each_setting(theirs, compiled=compiled if sizes.torch_compile else None),
        pairs=sizes.pairs,
        limit=sizes.limit,
        per=(tokens, "tokens"),
    )


def _compiled(model: Any) -> Any:
    model.forward = torch.compile(model.forward)
    return model


def generation(sizes: Sizes) -> Iterator[Timed]:
    """Prefill (until the first new token) and decoding (each new token after it)."""
    both = Both(quarter(sizes.layers))
    for kind, rows, prompt, goal in (
        ("prefill", 1, 512, 1.0),
        ("prefill", 1, 2048, 1.0),
        ("decode", 1, 128, 1.5),
        ("decode", 8, 128, 1.0),
    ):
        ids = random_ids(both.config, rows, prompt)
        batch, torch_ids = Batch.from_hf(both.ours.config, input_ids=ids), torch.from_numpy(ids)

        def own(new: int, batch: Batch = batch) -> Any:
            return generate(both.ours, batch, max_new_tokens=new, eos_token_id=())

        def theirs(new: int, ids: torch.Tensor = torch_ids) -> dict[str, Call]:
            return each_setting(functools.partial(_generate, both, ids, new))

        name = f"{kind} batch {rows}, prompt {prompt}"
        if kind == "prefill":
            yield compare(
                name, lambda own=own: own(1), theirs(1), pairs=sizes.pairs, limit=sizes.limit, per=(rows * prompt, "tokens")
            )
            continue
        new = sizes.answer
        own(1)
        setting, _ = fastest(theirs(4))
        until_first = theirs(1)[setting]
        whole = compare(
            name,
            lambda own=own, new=new: own(new + 1),
            {setting: theirs(new + 1)[setting]},
            pairs=sizes.pairs,
            limit=sizes.limit,
            per=(rows, "tokens"),
            goal=goal,
        )
        # The prompt's share is measured alone, and taken off.
        prompts = [min(seconds(call) for _ in range(3)) for call in (lambda own=own: own(1), until_first)]
        yield replace(
            whole,
            ours=[max(s - prompts[0], 1e-9) / new for s in whole.ours],
            theirs=[max(s - prompts[1], 1e-9) / new for s in whole.theirs],
        )


def _generate(both: Both, ids: torch.Tensor, new: int, setting: str) -> Call:
    """transformers' `generate` under a setting, greedily."""
    model = both.theirs(setting)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)

    def call() -> Any:
        model.model.rope_deltas = None
        return model.generate(ids, **options)

    return call


class TorchTrainer:
    """A plain torch loop over transformers' model: forward, backward, clipping, AdamW (fused: a sixth of foreach's CPU time)."""

    def __init__(self, both: Both, setting: str):
        self.model = both.theirs(setting).requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self, inputs: dict[str, np.ndarray]) -> float:
        out = reference.run(self.model, inputs)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.loss.item()


class OurTrainer:
    """The jitted step."""

    def __init__(self, both: Both):
        tx = make_optimizer(OPTIMIZER)
        rate = schedule(ScheduleConfig(name="constant"), OPTIMIZER.learning_rate, 1)
        self.train_step = make_train_step(both.ours, tx, rate, loss=LossConfig(), optimizer=OPTIMIZER)
        self.state = init_state(jax.tree.map(jnp.copy, both.ours.params()), tx)

    def step(self, batch: Batch) -> float:
        self.state, metrics = self.train_step(self.state, batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def train(sizes: Sizes) -> Iterator[Timed]:
    """Forward, backward, clipping and AdamW on two rows of text, and on two rows with a picture each."""
    both = Both(quarter(sizes.layers))
    setting = "grouped_mm + sdpa"  # a backward pass through eager experts takes over ten times as long
    own, theirs = OurTrainer(both), TorchTrainer(both, setting)
    for kind, rows in {"2 x 512": [[cases.Text(512)]] * 2, "2 x 512 with pictures": PICTURES}.items():
        inputs = cases.build(both.config, rows)
        labels = cases.shifted_labels(inputs, both.config)
        # One vision row that the pictures fill, as a training configuration would name it (docs/data.md) and packing fill it.
        patches = int(inputs["image_grid_thw"].prod(axis=1).sum()) if "image_grid_thw" in inputs else None
        batch = Batch.from_hf(both.ours.config, **inputs, labels=labels, row_patches=patches)
        batch = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
        yield compare(
            f"train step, {kind}",
            functools.partial(own.step, batch),
            {setting: functools.partial(theirs.step, inputs | {"labels": labels})},
            pairs=sizes.pairs,
            limit=2 * sizes.limit,
            per=(int((inputs["attention_mask"] != 0).sum()), "tokens"),
            goal=1.5,
        )


VISION = {
    "64 pictures of 64 patches": [(1, 8, 8)] * 64,
    "1 picture of 4096 patches": [(1, 64, 64)],
    "video, 8 frames of 256 patches": [(8, 16, 16)],
    "4096 patches and 64 of 64": [(1, 64, 64)] + [(1, 8, 8)] * 64,
}


def packed_frames(both: Both, grids: list[tuple[int, int, int]], pixels: np.ndarray) -> Batch:
    """A Batch whose only purpose is its vision half."""
    unit = both.config["vision_config"]["spatial_merge_size"] ** 2
    special = both.config["image_token_id"]
    ids = [np.r_[np.full(t * h * w // unit, special), 1] for t, h, w in grids]  # a token between pictures
    as_images = [(1, h, w) for t, h, w in grids for _ in range(t)]
    return Batch.from_hf(
        both.ours.config, input_ids=np.concatenate(ids)[None], pixel_values=pixels, image_grid_thw=np.array(as_images)
    )


def vision(sizes: Sizes) -> Iterator[Timed]:
    """The tower alone: visual tokens and DeepStack features of pictures and of a clip."""
    both = Both(quarter(1, depth=sizes.layers, experts=8, vocab_size=512))
    run = jax.jit(lambda model, batch: model.model.visual_features(batch))
    width = both.ours.config.vision_config.patch_width
    for name, grids in VISION.items():
        grid = np.array(grids)
        pixels = np.random.default_rng(0).normal(size=(int(grid.prod(1).sum()), width)).astype(np.float32)
        batch = packed_frames(both, grids, pixels)
        arguments = torch.from_numpy(pixels), torch.from_numpy(grid)

        def theirs(setting: str, arguments: Any = arguments) -> Call:
            return functools.partial(both.theirs(setting).model.visual, *arguments)

        settings = each_setting(theirs)
        del settings["eager + sdpa"]  # a tower has no experts
        yield compare(
            f"vision, {name}",
            _blocked(run, both.ours, batch),
            settings,
            pairs=sizes.pairs,
            limit=sizes.limit,
            per=(len(pixels), "patches"),
            goal=1.2,
        )


def experts(sizes: Sizes) -> Iterator[Timed]:
    """One layer's router and experts."""
    both = Both(quarter(1, vocab_size=512))
    block = ours.layer(both.ours.model.language_model.layers, 0).mlp
    run = jax.jit(lambda block, x: block(x, jnp.ones(x.shape[:2], bool))[0])
    for tokens in (1, 64, 512, 2048):
        x = np.random.default_rng(0).normal(size=(1, tokens, 512)).astype(np.float32)
        torch_x = torch.from_numpy(x)

        def theirs(setting: str, x: torch.Tensor = torch_x) -> Call:
            return functools.partial(both.theirs(setting).model.language_model.layers[0].mlp, x)

        settings = each_setting(theirs)
        del settings["grouped_mm + eager"]  # no attention in it
        yield compare(
            f"experts, {tokens} tokens",
            _blocked(run, block, jnp.asarray(x)),
            settings,
            pairs=max(sizes.pairs, 9),
            limit=sizes.limit / 2,
            per=(tokens, "tokens"),
        )


ROWS: dict[str, Callable[[Sizes], Iterator[Timed]]] = {
    "forward": forward,
    "generation": generation,
    "train": train,
    "vision": vision,
    "experts": experts,
}
