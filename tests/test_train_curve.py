"""Ten steps beside a torch + transformers loop: same weights, same data, AdamW, float32."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tests import cases, ours, reference, tiny, tolerances, training
from tests.hf_checkpoints import random_hf_tensors
from train.config import LossConfig, OptimizerConfig, ScheduleConfig
from train.optim import make_optimizer, schedule
from train.state import init_state
from train.step import make_train_step

STEPS = 10
CLIP = 1.0
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=CLIP)
SCHEDULE = ScheduleConfig(name="cosine", warmup_steps=2, final_fraction=0.1)


def inputs_of(config: dict[str, Any]) -> list[cases.Inputs]:
    names = ["image", "text", "two_images", "video", "right_padded"]
    return [cases.CASES[names[i % len(names)]](config) for i in range(STEPS)]


def learning_rate(step: int) -> float:
    done = max(0.0, (step - 2) / (STEPS - 2))
    return OPTIMIZER.learning_rate * min(1.0, (step + 1) / 2) * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def torch_curve(config: dict[str, Any], tensors: dict[str, np.ndarray], aux: float) -> list[tuple[float, float]]:
    """`(loss, gradient norm)` of each step of a plain torch loop; aux is the weight of HF's load-balancing loss."""
    model = reference.build_model(config, tensors).requires_grad_(True)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "norm" not in name and not name.endswith("bias")]
    rest = [p for name, p in named if "norm" in name or name.endswith("bias")]
    groups = [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=OPTIMIZER.eps)
    curve = []
    for step, inputs in enumerate(inputs_of(config)):
        options = {"output_router_logits": True} if aux else {}
        out = reference.run(model, inputs | {"labels": cases.shifted_labels(inputs, config)}, **options)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        # By default torch would drop the vision tower's gradients, and then skip it in a step without pictures; here no gradient
        # is a zero gradient. (The first step has a picture, so every parameter has a gradient from then on.)
        optimizer.zero_grad(set_to_none=False)
        # transformers adds the weighted aux loss to `loss`; ours is reported apart
        curve.append((out.loss.item() - aux * (out.aux_loss.item() if aux else 0.0), norm.item()))
    return curve


@pytest.mark.parametrize(
    ("name", "aux"),
    [("tiny", 0.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tied", 0.01), ("mixed", 0.0)))],
)
def test_ten_steps_follow_torch(name: str, aux: float, record) -> None:
    config = tiny.variant(tiny.ALL[name], text_config={"router_aux_loss_coef": aux})
    tensors = random_hf_tensors(config)
    expected = torch_curve(config, tensors, aux)
    model = ours.build_model(config, tensors)
    tx = make_optimizer(OPTIMIZER)
    state = init_state(jax.tree.map(jnp.copy, model.params()), tx)
    rate = schedule(SCHEDULE, OPTIMIZER.learning_rate, STEPS)
    step: Any = make_train_step(model, tx, rate, loss=LossConfig(chunk_tokens=48, aux_loss=aux), optimizer=OPTIMIZER)
    for number, (inputs, (loss, norm)) in enumerate(zip(inputs_of(config), expected, strict=True)):
        state, metrics = step(state, training.stacked([training.labelled(config, inputs)]))
        assert float(metrics["learning_rate"]) == pytest.approx(learning_rate(number), rel=1e-6)
        errors = {
            "relative loss difference over ten steps": abs(float(metrics["loss"]) - loss) / loss,
            "relative gradient norm difference over ten steps": abs(float(metrics["grad_norm"]) - norm) / norm,
        }
        for what, error in errors.items():
            record(what, error)
            assert error <= tolerances.CURVE, (number, what)
    assert expected[-1][0] < 0.8 * expected[0][0]  # it learns, so that ten steps are ten different models
    assert step._cache_size() == 1
