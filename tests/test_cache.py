"""The cache's memory, programs that are compiled once, refusals, and a sharded decoder that computes what one device does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax import Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, make_mesh
from qvlmoe_jax.cache import KVCache, cache_bytes, grow, init_cache
from qvlmoe_jax.compilation import CompileLog
from qvlmoe_jax.errors import GenerationError
from qvlmoe_jax.generate import columns_of, generate
from qvlmoe_jax.incremental import decode_step, prefill
from qvlmoe_jax.sharding import tree_shardings
from tests import ours, prompts, tiny
from tests.hf_checkpoints import random_hf_tensors
from tests.tolerances import LOGITS


@pytest.fixture(scope="module")
def model() -> Qwen3VLMoeForConditionalGeneration:
    return ours.build_model(tiny.TINY, random_hf_tensors(tiny.TINY))


def batch(model: Any, *names: str, **fields: Any) -> Batch:
    inputs = prompts.batch([[prompts.row(tiny.TINY, name)] for name in names])
    return Batch.from_hf(model.config, **inputs, **({"text_length": 64, "vision_rows": 4, "row_patches": 64} | fields))


LOG = CompileLog()  # once: jax keeps its listeners


@contextmanager
def compilations(expected: int) -> Iterator[None]:
    before = LOG.programs
    yield
    assert LOG.programs - before == expected


def test_memory_is_as_computed() -> None:
    """30B-A3B: 48 layers, 4 kv heads of 128, keys and values, 2 bytes: 98304 bytes a token."""
    import json
    from pathlib import Path

    config = Qwen3VLMoeConfig.from_hf(json.loads((Path(__file__).parent / "data" / "config_30b_a3b.json").read_text()))
    cache = jax.eval_shape(lambda: init_cache(config, 3, 1000, dtype=jnp.bfloat16))
    assert cache.k.shape == cache.v.shape == (48, 3, 1000, 4, 128)
    stored = sum(a.size * a.dtype.itemsize for a in (cache.k, cache.v))
    assert stored == cache_bytes(config, 3, 1000, jnp.bfloat16) == 3 * 1000 * 98304


def test_a_step_updates_the_cache_where_it_lies(model) -> None:
    """The compiled step aliases the cache to its output and holds no second one meanwhile."""
    cache = jax.eval_shape(lambda: init_cache(model.config, 2, 4096))
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    memory = jax.jit(decode_step, donate_argnums=2).lower(model, tokens, cache).compile().memory_analysis()
    size = cache_bytes(model.config, 2, 4096, jnp.float32)
    assert memory is not None
    assert memory.alias_size_in_bytes >= size
    layer = size // model.config.text_config.num_hidden_layers
    assert memory.temp_size_in_bytes < 2 * layer


def test_nothing_compiles_twice_in_a_bucket(model) -> None:
    """Other prompts, other lengths, other numbers of new tokens, other sampling values, another seed."""
    options: Any = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "eos_token_id": ()}
    generate(model, batch(model, "image", "mixed"), max_new_tokens=32, **options)
    with compilations(0):
        generate(model, batch(model, "mixed", "text"), max_new_tokens=32, **options)
        generate(model, batch(model, "two images", "video"), max_new_tokens=17, **options, seed=3)
        generate(model, batch(model, "text", "mixed"), max_new_tokens=25, **options | {"temperature": 1.2, "top_p": 0.3})
        generate(model, batch(model, "mixed", "image"), max_new_tokens=31, **options, on_token=lambda tokens: None)


@pytest.mark.slow
def test_chunks_share_one_program(model) -> None:
    """However many of them a prompt has."""
    options: Any = {"max_new_tokens": 8, "eos_token_id": (), "prefill_chunk": 8}
    cache = init_cache(model.config, 2, 128)
    generate(model, batch(model, "text", "image"), cache=cache, **options)
    with compilations(0):
        generate(model, batch(model, "mixed", "long text"), cache=cache, **options)


def test_the_counter_counts() -> None:
    with compilations(1):
        jax.jit(lambda x: x * 3 + 1.25)(np.ones(3, np.float32))


def test_same_seed_same_text_whatever_stands_beside_it(model) -> None:
    options: Any = {"max_new_tokens": 24, "temperature": 0.9, "seed": 11, "eos_token_id": ()}
    first = generate(model, batch(model, "image", "mixed"), **options)
    np.testing.assert_array_equal(generate(model, batch(model, "image", "mixed"), **options), first)
    other = generate(model, batch(model, "image", "video"), **options)
    np.testing.assert_array_equal(other[0], first[0])
    assert (other[1] != first[1]).any()
    assert (generate(model, batch(model, "image", "mixed"), **options | {"seed": 12})[0] != first[0]).any()


@pytest.mark.slow
def test_same_seed_same_text_alone(model) -> None:
    options: Any = {"max_new_tokens": 24, "temperature": 0.9, "seed": 11, "eos_token_id": ()}
    together = generate(model, batch(model, "image", "mixed"), **options)
    np.testing.assert_array_equal(generate(model, batch(model, "image"), **options)[0], together[0])


@pytest.mark.slow
def test_a_cache_grows_without_forgetting(model) -> None:
    first, second = batch(model, "image"), batch(model, "text")
    small, large = init_cache(model.config, 1, 96), init_cache(model.config, 1, 256)
    answers = []
    for cache in (small, large):
        generate(model, first, max_new_tokens=8, cache=cache, eos_token_id=())
        cache = cache if cache is large else grow(cache, 256)
        answers.append(generate(model, second, max_new_tokens=8, cache=cache, eos_token_id=()))
    np.testing.assert_array_equal(*answers)


def test_what_does_not_fit_is_refused_with_what_would(model) -> None:
    one = batch(model, "long text")
    cache = init_cache(model.config, 1, 32)
    words = r"the cache has 32 columns, 0 of them used; .* need 39; .*init_cache\(config, 1, 64\)"
    with pytest.raises(GenerationError, match=words):
        generate(model, one, max_new_tokens=10, cache=cache)
    with pytest.raises(GenerationError, match="the cache has 1 rows, the batch 2"):
        generate(model, batch(model, "text", "image"), max_new_tokens=1, cache=cache)
    assert not cache.k.is_deleted(), "refused calls leave the cache as it was"
    with pytest.raises(GenerationError, match="max_new_tokens = 0, expected a positive"):
        generate(model, one, max_new_tokens=0)
    packed = jax.tree.map(np.asarray, one)
    packed.segment_ids[0, 4:] *= 2
    with pytest.raises(GenerationError, match="several packed documents"):
        generate(model, packed, max_new_tokens=1)
    packed.segment_ids[0] = 0
    with pytest.raises(GenerationError, match="holds no token"):
        generate(model, packed, max_new_tokens=1)
    with pytest.raises(GenerationError, match="0 rows and 5 columns"):
        init_cache(model.config, 0, 5)
    with pytest.raises(GenerationError, match=r"max_new_tokens = 2\.5, expected a positive"):
        generate(model, one, max_new_tokens=2.5)  # pyright: ignore[reportArgumentType]
    for name in ("eos_token_id", "pad_token_id"):
        for ids in ("</s>", 2.5, 10**12, {1, 2}):
            with pytest.raises(GenerationError, match=f"{name} = .*, expected one token id or a sequence of them"):
                generate(model, one, max_new_tokens=1, **{name: ids})  # pyright: ignore[reportArgumentType]
    with pytest.raises(GenerationError, match=r"pad_token_id = \[1, 2\], expected one token id"):
        generate(model, one, max_new_tokens=1, pad_token_id=[1, 2])  # pyright: ignore[reportArgumentType]
    wrong: dict[str, tuple[Any, ...]] = {
        "max_new_tokens": (None, "8", [8], float("inf")),
        "prefill_chunk": ("8", float("nan")),
        "seed": (None, 1.5, "a"),
    }
    for name, values in wrong.items():
        for value in values:
            options: dict[str, Any] = {"max_new_tokens": 1, name: value}
            with pytest.raises(GenerationError, match=f"{name} = .*, expected "):
                generate(model, one, **options)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 3}, {"num_hidden_layers": 6}, {"num_key_value_heads": 4}, {"head_dim": 16}]
)
def test_the_cache_of_another_model_is_refused(model, change: dict[str, int]) -> None:
    """Fewer layers or more heads would be written over each other in silence: dynamic slices are moved to where they fit."""
    cache = init_cache(dataclasses.replace(model.config.text_config, **change), 1, 64)
    with pytest.raises(GenerationError, match=r"the cache has .* layers of .* the model 5 of 2 of 32; make one with init_cache"):
        generate(model, batch(model, "text"), max_new_tokens=1, cache=cache)


def test_a_model_in_bfloat16_takes_a_cache_in_float32(model) -> None:
    """`init_cache`'s own dtype. The hidden states stay the model's, so no chunk compiles for another one."""
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    one, cache = batch(model, "image"), init_cache(model.config, 1, 128)
    generate(half, one, max_new_tokens=2, cache=cache, prefill_chunk=5)
    with compilations(0):
        generate(half, one, max_new_tokens=2, cache=cache, prefill_chunk=5)
    assert cache.k.dtype == jnp.float32
    logits, _ = jax.jit(prefill)(half, one, init_cache(model.config, 1, 128))
    expected, _ = jax.jit(prefill)(half, one, init_cache(model.config, 1, 128, dtype=jnp.bfloat16))
    assert logits.dtype == expected.dtype == jnp.bfloat16
    assert np.abs(np.asarray(logits - expected, np.float32)).max() < 0.1


def test_numbers_may_be_numpys(model) -> None:
    numbers: dict[str, Any] = {"max_new_tokens": np.int64(3), "seed": np.int32(-1), "top_k": np.int64(5)}
    numbers |= {"prefill_chunk": np.int64(16)}
    plain: dict[str, Any] = {name: int(value) for name, value in numbers.items()}
    one = batch(model, "text")
    got, expected = (generate(model, one, temperature=1.0, eos_token_id=(), **options) for options in (numbers, plain))
    np.testing.assert_array_equal(got, expected)


def test_a_chunk_that_is_no_power_of_two_may_take_more_than_its_bucket() -> None:
    """What a conversation makes room for: 51 tokens in chunks of 40 are 80 columns, though their bucket is 64."""
    assert [columns_of(51, chunk) for chunk in (None, 40, 5, 64, 1000)] == [64, 80, 55, 64, 64]


@pytest.mark.slow
def test_the_given_cache_survives_an_interruption(model) -> None:
    cache = init_cache(model.config, 1, 128)

    def interrupt(tokens: np.ndarray) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, batch(model, "text"), max_new_tokens=9, cache=cache, on_token=interrupt)
    assert np.asarray(cache.tokens)[0, 0] >= 0, "its arrays are alive"


SIZES = [{"expert": 2, "tensor": 2, "fsdp": 2}, {"expert": 8}, {"tensor": 2, "data": 2}, {"fsdp": 4, "context": 2}]


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        pytest.param(sizes, rows, marks=pytest.mark.slow if (rows == 4) == (i < 2) else pytest.mark.soak, id=f"{sizes}-{rows}")
        for i, sizes in enumerate(SIZES)
        for rows in (1, 4)
    ],
)
def test_sharded_is_single(model, sizes: Any, rows: int) -> None:
    names = ("image", "mixed", "video", "long text")[:rows]
    expected = generate(model, batch(model, *names), max_new_tokens=16, eos_token_id=())
    cache = init_cache(model.config, rows, 96)
    logits, cache = jax.jit(prefill)(model, batch(model, *names), cache)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        spread = model.with_params(jax.device_put(model.params(), tree_shardings(model.params(), mesh)))
        np.testing.assert_array_equal(generate(spread, batch(model, *names), max_new_tokens=16, eos_token_id=()), expected)
        own = init_cache(model.config, rows, 96)
        if sizes.get("tensor"):
            assert own.k.sharding.shard_shape(own.k.shape)[3] == 1, "kv heads are spread over tensor"
        got, own = jax.jit(prefill, donate_argnums=2)(spread, batch(model, *names), own)
        np.testing.assert_allclose(got, logits, atol=LOGITS, rtol=0)
        assert isinstance(own, KVCache)
        with compilations(0):
            streamed = generate(spread, batch(model, *names), max_new_tokens=16, eos_token_id=(), on_token=lambda tokens: None)
    np.testing.assert_array_equal(streamed, expected)
