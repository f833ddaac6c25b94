"""Gradients of every parameter, the auxiliary loss, hidden states and router sums against transformers', in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, hf
from qvlmoe_jax.errors import BatchError
from qvlmoe_jax.param_tree import flatten
from tests import cases, ours, reference, tiny, tolerances
from tests.hf_checkpoints import random_hf_tensors

CONFIGS = {"tiny": tiny.TINY, "mixed": tiny.MIXED, "dense_tied": tiny.DENSE_TIED}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """HF's loss: fp32, shifted by one, mean over labels that are not -100."""
    labels = labels[:, 1:]
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(labels >= 0, picked, 0)) / jnp.sum(labels >= 0)


def torch_gradients(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], loss: Any, inputs: cases.Inputs, **options: Any
) -> tuple[float, dict[str, np.ndarray]]:
    """transformers' loss and its gradients by HF key, experts back in the hub's orientation."""
    model = reference.build_model(config, tensors).requires_grad_(True)
    value = loss(reference.run(model, inputs, **options))
    value.backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    return value.item(), {key: (grads[key].mT if ".mlp.experts." in key else grads[key]).numpy() for key in tensors}


def worst_error(config: Mapping[str, Any], grads: dict[str, Any], expected: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """Largest relative L2 difference over HF tensors, and its key."""
    flat = flatten(grads)
    errors = []
    for row in hf.expand(Qwen3VLMoeConfig.from_hf(config)):
        found = row.to_hf(np.asarray(flat[row.path][row.index] if row.index else flat[row.path]))
        norm = np.linalg.norm(expected[row.key])
        assert norm > 0, f"{row.key}: no gradient reaches it, the case is too small"
        errors.append((float(np.linalg.norm(found - expected[row.key]) / norm), row.key))
    return max(errors)


@pytest.mark.parametrize("name", ["tiny", "dense_tied", pytest.param("mixed", marks=pytest.mark.slow)])
def test_gradients(name: str, record) -> None:
    _check_gradients(CONFIGS[name], BackendConfig(), record)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        BackendConfig(experts="ragged_dot"),
        BackendConfig(remat="full", attention="chunked", attention_chunk=16),
        BackendConfig(remat="dots"),
    ],
    ids=["ragged_dot", "remat_chunked", "remat_dots"],
)
def test_gradients_of_every_backend(backend: BackendConfig, record) -> None:
    _check_gradients(tiny.TINY, backend, record)


def _check_gradients(config: Mapping[str, Any], backend: BackendConfig, record) -> None:
    """Cross entropy on a case with two pictures: every parameter's gradient."""
    tensors = random_hf_tensors(config)
    inputs = cases.CASES["two_images"](dict(config))
    labels = cases.shifted_labels(inputs, dict(config))
    value, expected = torch_gradients(config, tensors, lambda out: out.loss, inputs | {"labels": labels})
    batch = ours.make_batch(config, inputs, labels=labels)
    model = ours.build_model(config, tensors, backend)

    @jax.jit
    @jax.value_and_grad
    def loss(model: Qwen3VLMoeForConditionalGeneration) -> jax.Array:
        return cross_entropy(model(batch).logits, jnp.asarray(batch.labels))

    found, grads = loss(model)
    assert float(found) == pytest.approx(value, abs=tolerances.AUX_LOSS)
    error, key = worst_error(config, grads.params(), expected)
    record("worst relative L2 of a gradient", error)
    assert error <= tolerances.GRADIENT, key


@pytest.mark.parametrize("case", ["left_padded", "image", "text"])
def test_aux_loss(case: str, record) -> None:
    config = tiny.TINY
    tensors = random_hf_tensors(config)
    inputs = cases.CASES[case](config)
    model = ours.build_model(config, tensors)
    expected = reference.run(reference.build_model(config, tensors), inputs, output_router_logits=True)
    out = jax.jit(lambda m, b: m(b, output_router_logits=True))(model, ours.make_batch(config, inputs))
    error = abs(float(out.aux_loss) - float(expected.aux_loss))
    record("aux loss error", error)
    assert error <= tolerances.AUX_LOSS
    # the sums it is made of, per layer
    valid = cases.valid(inputs).reshape(-1)
    k = config["text_config"]["num_experts_per_tok"]
    assert out.router_stats.prob_sum.shape[0] == len(expected.router_logits)
    for layer, logits in enumerate(expected.router_logits):
        probs = torch.softmax(logits.float(), -1).numpy()[valid]
        chosen = np.argsort(-probs, axis=1)[:, :k]
        assert np.array_equal(np.asarray(out.router_stats.tokens_per_expert[layer]), np.bincount(chosen.reshape(-1), minlength=8))
        assert np.abs(np.asarray(out.router_stats.prob_sum[layer]) - probs.sum(0)).max() <= tolerances.MODULE * len(probs)


def test_aux_loss_gradient(record) -> None:
    """The auxiliary loss alone: its gradient reaches the routers and all below them, nothing above the last router."""
    config = tiny.UNIFORM
    tensors = random_hf_tensors(config)
    inputs = cases.CASES["left_padded"](config)
    model = reference.build_model(config, tensors).requires_grad_(True)
    reference.run(model, inputs, output_router_logits=True).aux_loss.backward()
    named = dict(model.named_parameters())
    batch = ours.make_batch(config, inputs)
    grads = jax.jit(jax.grad(lambda m: m(batch, output_router_logits=True).aux_loss))(ours.build_model(config, tensors))
    flat = flatten(grads.params())
    for row in hf.expand(Qwen3VLMoeConfig.from_hf(config)):
        theirs = named[row.key].grad
        found = row.to_hf(np.asarray(flat[row.path][row.index] if row.index else flat[row.path]))
        if theirs is None or not theirs.any():
            assert not found.any(), row.key
            continue
        expected = (theirs.mT if ".mlp.experts." in row.key else theirs).numpy()
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        record("worst relative L2 of an aux-loss gradient", error)
        assert error <= tolerances.GRADIENT, row.key


def test_aux_loss_is_off_unless_asked_for() -> None:
    model = ours.build_model(tiny.TINY, random_hf_tensors(tiny.TINY))
    batch = ours.make_batch(tiny.TINY, cases.CASES["text"](tiny.TINY))
    shape = jax.eval_shape(lambda m, b: m(b), model, batch)
    assert shape.aux_loss is None and shape.router_stats is not None and shape.hidden_states is None
    asking = tiny.variant(tiny.TINY, text_config={"output_router_logits": True})
    model = ours.build_model(asking, random_hf_tensors(asking))
    assert jax.eval_shape(lambda m, b: m(b), model, batch).aux_loss.shape == ()
    assert jax.eval_shape(lambda m, b: m(b, output_router_logits=False), model, batch).aux_loss is None
    dense = ours.build_model(tiny.DENSE, random_hf_tensors(tiny.DENSE))
    batch = ours.make_batch(tiny.DENSE, cases.CASES["text"](tiny.DENSE))
    out = jax.eval_shape(lambda m, b: m(b, output_router_logits=True), dense, batch)
    assert out.aux_loss is None and out.router_stats is None


@pytest.mark.parametrize("name", ["tiny", "mixed"])
def test_hidden_states(name: str) -> None:
    config = CONFIGS[name]
    tensors = random_hf_tensors(config)
    inputs = cases.CASES["mixed"](dict(config))
    expected = reference.run(reference.build_model(config, tensors), inputs, output_hidden_states=True).hidden_states
    out = jax.jit(lambda m, b: m(b, output_hidden_states=True))(
        ours.build_model(config, tensors), ours.make_batch(config, inputs)
    )
    valid = cases.valid(inputs)
    assert len(out.hidden_states) == len(expected)
    for level, theirs in enumerate(expected):
        found = np.asarray(out.hidden_states[level])[:, : valid.shape[1]]
        assert np.abs(found - theirs.numpy())[valid].max() <= tolerances.LOGITS, level


def test_logits_to_keep() -> None:
    """The last n of what HF sees, not of the bucket; or any columns by index."""
    config = tiny.TINY
    tensors = random_hf_tensors(config)
    theirs, model = reference.build_model(config, tensors), ours.build_model(config, tensors)

    def forward(model: Any, batch: Batch, keep: Any) -> jax.Array:
        if isinstance(keep, int | np.integer):
            return keep_last(model, batch, keep)
        return keep_columns(model, batch, keep)

    keep_last = jax.jit(lambda m, b, n: m(b, logits_to_keep=n).logits, static_argnums=2)
    keep_columns = jax.jit(lambda m, b, columns: m(b, logits_to_keep=columns).logits)
    for case in ("left_padded", "right_padded"):
        inputs = cases.CASES[case](config)
        valid = cases.valid(inputs)
        batch = ours.make_batch(config, inputs)
        columns = np.array([0, 5, 2, valid.shape[1] - 1])
        for keep, kept in ((3, valid[:, -3:]), (columns, valid[:, columns]), (0, valid)):
            torch_keep = torch.from_numpy(keep) if isinstance(keep, np.ndarray) else keep
            expected = reference.run(theirs, inputs, logits_to_keep=torch_keep).logits.numpy()
            found = np.asarray(forward(model, batch, keep))[:, : kept.shape[1]]
            assert np.abs(found - expected)[kept].max() <= tolerances.LOGITS, (case, keep)
        beyond = forward(model, batch, np.int64(100))  # more than there are: at most the bucket's, and the last are the last
        assert beyond.shape[1] == batch.input_ids.shape[1]
        np.testing.assert_array_equal(beyond[:, -3:], forward(model, batch, 3))
    for keep in (-2, [0, 64], [-1], 1.5, None):  # a column past the end would be not-a-number, the last of a bucket is padding
        with pytest.raises(BatchError, match="logits_to_keep = .*, expected "):
            jax.eval_shape(lambda batch, keep=keep: model(batch, logits_to_keep=keep).logits, ours.make_batch(config, inputs))


def test_inputs_embeds_take_the_place_of_the_lookup() -> None:
    config = tiny.TINY
    model = ours.build_model(config, random_hf_tensors(config))
    batch = ours.make_batch(config, cases.CASES["image"](config))
    embeds = model.get_input_embeddings()(jnp.asarray(batch.input_ids))
    forward = jax.jit(lambda m, b, e: m(b, inputs_embeds=e).logits)
    expected = np.asarray(ours.forward(model, batch))
    assert np.abs(np.asarray(forward(model, batch, embeds)) - expected).max() <= tolerances.LOGITS
    assert not np.allclose(np.asarray(forward(model, batch, 2 * embeds)), expected, atol=0.1)


def test_the_text_model_takes_positions_of_any_rank() -> None:
    """None, [B,T], [3,B,T] and HF's [4,B,T]; ids or embeddings, never both (the seed's surface)."""
    model = ours.build_model(tiny.UNIFORM, random_hf_tensors(tiny.UNIFORM)).model.language_model
    ids = jnp.arange(14).reshape(2, 7)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    expected = np.asarray(model(ids).last_hidden_state)
    forms = (positions, jnp.stack([positions] * 3), jnp.stack([positions + 5, *[positions] * 3]))
    for position_ids in forms:
        assert np.array_equal(np.asarray(model(ids, position_ids=position_ids).last_hidden_state), expected)
    embeds = model.embed_tokens(ids)
    assert np.array_equal(np.asarray(model(inputs_embeds=embeds).last_hidden_state), expected)
    for neither_or_both in ((None, None), (ids, embeds)):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(neither_or_both[0], inputs_embeds=neither_or_both[1])


def test_embeddings_can_be_replaced() -> None:
    config = tiny.DENSE_TIED
    model = ours.build_model(config, random_hf_tensors(config))
    batch = ours.make_batch(config, cases.CASES["text"](config))
    assert model.get_output_embeddings() is None
    before = np.asarray(ours.forward(model, batch))
    embeddings = model.get_input_embeddings()
    model.set_input_embeddings(jax.tree.map(lambda p: 2 * p, embeddings))
    after = np.asarray(ours.forward(model, batch))
    assert not np.allclose(before, after, atol=0.1)  # lookup and tied head both follow


def test_packed_documents_do_not_see_each_other() -> None:
    """Two documents in one row by segment ids give each document's own logits."""
    config = Qwen3VLMoeConfig.from_hf(tiny.UNIFORM)
    model = ours.build_model(tiny.UNIFORM, random_hf_tensors(tiny.UNIFORM))
    first, second = np.arange(9) + 3, np.arange(7) + 90
    alone = [np.asarray(model(Batch.from_hf(config, input_ids=ids[None])).logits)[0, : len(ids)] for ids in (first, second)]
    language = model.model.language_model
    hidden = language(
        jnp.asarray(np.concatenate([first, second]))[None],
        position_ids=jnp.asarray(np.concatenate([np.arange(9), np.arange(7)]))[None],
        segment_ids=jnp.asarray([1] * 9 + [2] * 7)[None],
    ).last_hidden_state
    head = model.get_output_embeddings()
    assert head is not None
    packed = np.asarray(head(hidden))[0]
    assert np.abs(packed - np.concatenate(alone)).max() <= tolerances.LOGITS
