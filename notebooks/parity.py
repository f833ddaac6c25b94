# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Are these the original's numbers?
#
# A checkpoint is converted and opened by this package and by `transformers`; both get the same pictures, clips and questions, in
# float32, and their answers are laid side by side. After that come the parts that ports of this model get wrong: positions over a
# picture, routing, DeepStack, the two GELUs.
#
# `make notebook` runs it on a small checkpoint with random weights (the numbers must agree, the words mean nothing), and
# `make notebook MODEL=directory` on any other, Hugging Face's or converted. One model is in memory at a time, 4 bytes a
# parameter; `WORK=directory` keeps the converted copy. Without torch the comparisons are left out, and each says so.

# %%
import gc
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke
from PIL import Image

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "examples" / "tiny_checkpoint.py").is_file())
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from tiny_checkpoint import write_checkpoint  # noqa: E402

from qvlmoe_jax import Batch, Processor, Qwen3VLMoeForConditionalGeneration, layers, moe, rope, text, vision  # noqa: E402
from qvlmoe_jax.checkpoint import HFWeights, open_weights  # noqa: E402
from qvlmoe_jax.param_tree import flatten  # noqa: E402

BOUND = 1e-4  # what the tests allow between two float32 logits (tests/tolerances.py)
TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
NO_TORCH = "torch is not installed, so there is nothing to compare with here: pip install '.[test]'"

OURS, THEIRS, SHADE = "#0b62a4", "#8a8a8a", "#eef1f4"
WARM = ("#a83232", "#d97b29", "#b08900")
plt.rcParams.update({"figure.dpi": 100, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Convert
#
# `python -m convert verify` compares every tensor in both directions, bit for bit.

# %%
given = Path(os.environ["MODEL"]).expanduser().resolve() if os.environ.get("MODEL") else None
scratch = tempfile.TemporaryDirectory()  # removed when the kernel ends
work = Path(os.environ.get("WORK") or scratch.name).resolve()
hf, converted = work / "hf", work / "jax"
if given is None:
    write_checkpoint(hf)
elif isinstance(open_weights(given), HFWeights):
    hf = given
else:
    converted = given


def convert(*arguments: Any) -> None:
    """`python -m convert ...`; its output without the directories' full names."""
    done = subprocess.run([sys.executable, "-m", "convert", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    print(f"$ python -m convert {' '.join(map(str, arguments))}\n{done.stdout.rstrip()}".replace(str(work), "WORK"))
    assert done.returncode == 0, done.stderr


if not converted.exists():
    convert("hf2jax", hf, converted)
if not hf.exists():
    convert("jax2hf", converted, hf)
convert("verify", hf, converted)

# %% [markdown]
# ## Pictures, a clip and questions
#
# A photograph, a drawing, and a ball that crosses eight frames. The processor turns messages into arrays under the names that
# Hugging Face's has; the same arrays go to both models.

# %%
cat = Image.open(ROOT / "examples" / "cat.png").convert("RGB")

y, x = np.mgrid[0:320, 0:224] / 224  # 224 wide, 320 high
sky = np.stack([0.95 - 0.35 * y, 0.55 + 0.15 * y, 0.35 + 0.4 * y], -1)
sun = ((x - 0.62) ** 2 + (y - 0.5) ** 2 < 0.2**2)[..., None]
hills = (y > 1.0 - 0.16 * np.sin(5 * x + 0.6))[..., None]
drawing = np.where(hills, [0.12, 0.32, 0.22], np.where(sun, [1.0, 0.9, 0.45], sky))
drawing = Image.fromarray((255 * drawing.clip(0, 1)).astype(np.uint8))

v, u = np.mgrid[0:96, 0:128]
ball = [(u - 16 * k - 8) ** 2 + (v - 76 + 3.8 * k * (7 - k)) ** 2 < 13**2 for k in range(8)]
ground = np.where(v[..., None] > 88, [70, 60, 50], [30, 50, 90])
clip = np.stack([np.where(disc[..., None], [235, 120, 40], ground) for disc in ball]).astype(np.uint8)


def user(*parts: Any) -> list[dict[str, Any]]:
    """One turn of strings, pictures and clips (arrays)."""

    def part(value: Any) -> dict[str, Any]:
        kind = "text" if isinstance(value, str) else "image" if isinstance(value, Image.Image) else "video"
        return {"type": kind, kind: value}

    return [{"role": "user", "content": [part(value) for value in parts]}]


ASK_CAT, ASK_CLIP = "What animal is this?", "What moves, and where to?"
CONVERSATIONS: dict[str, Any] = {
    "text": user("Name three rivers that reach the North Sea."),
    "picture": user(cat, ASK_CAT),
    "two pictures": user(drawing, cat, "Which of these was drawn?"),
    "clip": user(clip, ASK_CLIP),
    "picture and clip": user("First: ", cat, ASK_CAT, " Then: ", clip, ASK_CLIP),
    "two rows, padded left": [user("Good morning!"), user(cat, ASK_CAT)],
}
MIXED = "picture and clip"  # the prompt that the later sections look into

processor = Processor.from_pretrained(hf)
config: Any = processor.config  # None only where a directory has no config.json, and this one was just converted
inputs = {}
for name, conversation in CONVERSATIONS.items():
    clips: dict[str, Any] = {"video_metadata": {"fps": 2.0}} if "clip" in name else {}
    inputs[name] = processor.encode(conversation, padding_side="left", **clips)
    inputs[name]["mm_token_type_ids"] = 1 * (inputs[name]["input_ids"] == config.image_token_id) + 2 * (
        inputs[name]["input_ids"] == config.video_token_id
    )

figure, axes = plt.subplots(1, 6, figsize=(10, 2.6), width_ratios=[1.6, 0.9, 1, 1, 1, 1], layout="constrained")
shown = {"photograph": cat, "drawing": drawing, **{f"clip, frame {k}": clip[k] for k in (0, 2, 5, 7)}}
for ax, (title, picture) in zip(axes, shown.items(), strict=True):
    ax.imshow(picture)
    ax.set_title(title, fontsize=9)
    ax.axis("off")
plt.show()

for name, arrays in inputs.items():
    for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True):
        prompt = processor.decode(ids[mask == 1], skip_special_tokens=False)
        prompt = re.sub(r"(<\|(?:image|video)_pad\|>)\1+", lambda run: f"{run[1]}*{run[0].count(run[1])}", prompt)
        print(f"--- {name}, {mask.sum()} tokens\n{prompt}")

# %% [markdown]
# ## Ask both
#
# The original first; it leaves memory before ours is opened.


# %%
class Answer(NamedTuple):
    """Of one prompt, over its T columns: logits `[B,T,V]`; of the mixed prompt also hidden states `[L+1,B,T,D]`, the experts
    chosen in each MoE layer `[T,k]`, and the positions `[3,B,T]`."""

    logits: np.ndarray
    hidden: Any = None
    experts: Any = None
    positions: Any = None


is_moe = config.model_type == "qwen3_vl_moe" and "moe" in config.text_config.layer_kinds()
top_k = config.text_config.num_experts_per_tok if is_moe else 0


def ask_transformers(directory: Path) -> dict[str, Answer]:
    """Name of the prompt -> what transformers answers in float32."""
    import torch

    warnings.filterwarnings("ignore", "IProgress not found")  # about a progress bar that is switched off anyway
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"experts_implementation": "eager"} if config.model_type == "qwen3_vl_moe" else {}
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, **options).eval()
    answers = {}
    for name, arrays in inputs.items():
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        model.model.rope_deltas = None  # left over from the prompt before, and it would be used
        with torch.no_grad():
            out = model(
                **tensors,
                use_cache=False,
                output_hidden_states=name == MIXED,
                **({"output_router_logits": True} if name == MIXED and is_moe else {}),
            )
        extra = {}
        if name == MIXED:
            keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
            extra["positions"] = model.model.get_rope_index(**{key: tensors[key] for key in keys})[0].numpy()
            extra["hidden"] = np.stack([state.numpy() for state in out.hidden_states])
            if is_moe:
                extra["experts"] = [logits.topk(top_k).indices.numpy() for logits in out.router_logits]
        answers[name] = Answer(out.logits.numpy(), **extra)
    print(f"transformers {transformers.__version__}, {sum(p.numel() for p in model.parameters()):,} parameters in float32")
    return answers


theirs = ask_transformers(hf) if TORCH else {}
if not TORCH:
    print(NO_TORCH)
_ = gc.collect()


# %%
def load(directory: Path) -> Qwen3VLMoeForConditionalGeneration:
    return Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, dtype=jnp.float32)


if given is None:  # both ways to open a checkpoint give the same bits
    both = [flatten(load(directory).params()) for directory in (hf, converted)]
    assert both[0].keys() == both[1].keys()
    assert all(np.array_equal(both[0][path], both[1][path]) for path in both[0])
    print(f"{len(both[0])} parameters are equal, opened from Hugging Face's files and from the converted ones")
    del both

model = load(converted)


def patches(arrays: dict[str, np.ndarray]) -> int:
    return sum(len(arrays[key]) for key in ("pixel_values", "pixel_values_videos") if key in arrays)


def bucket(sizes: Any) -> int:
    return 1 << (max(sizes) - 1).bit_length()


# One static shape for all prompts, so that they share a compilation; what a prompt leaves empty is padding. All frames lie in
# one vision row: nothing but their numbers keeps them apart.
text_length = bucket(arrays["input_ids"].shape[1] for arrays in inputs.values())
row_patches = bucket(patches(arrays) for arrays in inputs.values())
batches = {
    name: Batch.from_hf(config, **arrays, text_length=text_length, vision_rows=1, row_patches=row_patches)
    for name, arrays in inputs.items()
}


def compiled() -> Any:
    """The forward pass, traced anew with the code as it is now (a bug below may have replaced a part)."""
    return jax.jit(lambda model, batch: model(batch, output_hidden_states=True))


forward = compiled()


def ask(batch: Batch, length: int, forward: Any = forward) -> Answer:
    """Logits and hidden states of the first `length` columns."""
    out = forward(model, batch)
    assert out.hidden_states is not None
    return Answer(np.asarray(out.logits)[:, :length], np.asarray(out.hidden_states)[:, :, :length])


def watch_router(batch: Batch, length: int) -> list[np.ndarray]:
    """The experts `[T,k]` that each MoE layer chose, by listening at its router."""
    heard: list[np.ndarray] = []

    def listening(logits: jax.Array, k: int) -> Any:
        probs, weights, experts = route(logits, k)
        jax.debug.callback(lambda chosen: heard.append(np.asarray(chosen)[:length]), experts, ordered=True)
        return probs, weights, experts

    route = moe.route
    with mock.patch.object(moe, "route", listening):
        jax.block_until_ready(jax.jit(lambda model, batch: model(batch).logits)(model, batch))
    jax.effects_barrier()
    return heard


ours = {name: ask(batch, inputs[name]["input_ids"].shape[1]) for name, batch in batches.items()}
T = inputs[MIXED]["input_ids"].shape[1]
ours[MIXED] = ours[MIXED]._replace(
    experts=watch_router(batches[MIXED], T) if is_moe else None, positions=np.asarray(batches[MIXED].position_ids)[:, :, :T]
)
print(f"jax {jax.__version__} on {jax.default_backend()}, {len(ours)} prompts")


# %%
def top_tokens(name: str, count: int = 4) -> None:
    """Prints the likeliest next tokens of the prompt's last row with both models' logits."""
    own = ours[name].logits[-1, -1].astype(np.float64)
    other = theirs[name].logits[-1, -1] if name in theirs else None
    print(f"{name:31}{'probability':>14}{'ours':>12}" + ("" if other is None else f"{'transformers':>14}{'difference':>13}"))
    for token in np.argsort(-own)[:count]:
        line = f"  {token:6} {processor.decode([token], skip_special_tokens=False)!r:22}"
        line += f"{np.exp(own[token] - own.max()) / np.exp(own - own.max()).sum():14.2%}{own[token]:12.6f}"
        print(line if other is None else line + f"{other[token]:14.6f}{own[token] - other[token]:13.1e}")


for name in ours:
    top_tokens(name)

# %% [markdown]
# ## Error at every position
#
# Each dot is the largest difference over the whole vocabulary at one position of a prompt; blue columns hold a picture or a
# frame, and rounding alone puts the dots near 1e-6. Dots that climbed towards the dashed line, or a step where a picture begins,
# would be a bug: the tests allow 1e-4.


# %%
def shade(ax: Any, kinds: np.ndarray) -> None:
    """Shades the runs of visual tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], kinds > 0, [0]]).astype(int)))
    for start, end in edges.reshape(-1, 2):
        ax.axvspan(start - 0.5, end - 0.5, color="#d8e6f3", lw=0, zorder=0)


errors, bounds = {}, {}
for name in theirs:
    difference = np.abs(ours[name].logits - theirs[name].logits).max(-1)
    errors[name] = np.where(inputs[name]["attention_mask"] == 1, difference, np.nan)  # padding means nothing
    # The bound is for logits that spread by about 1, as this checkpoint's do; a trained model's are larger, and so is rounding.
    bounds[name] = BOUND if given is None else BOUND * max(1.0, float(theirs[name].logits.std()))

if TORCH:
    figure, axes = plt.subplots(3, 2, figsize=(10, 6.6), layout="constrained", sharey=True)
    for ax, (name, error) in zip(axes.flat, errors.items(), strict=True):
        shade(ax, inputs[name]["mm_token_type_ids"][-1])
        for row, marker in zip(error, "ox", strict=False):
            ax.plot(np.maximum(row, 1e-8), marker, color=OURS, ms=3, label="row 1: text" if marker == "o" else "row 2: picture")
        ax.axhline(bounds[name], color="black", lw=0.8, ls="--")
        ax.set(yscale="log", ylim=(1e-8, 1e-3), xlim=(-1, error.shape[1]))
        ax.set_title(f"{name}: at most {np.nanmax(error):.1e}", loc="left", fontsize=9)
        if len(error) > 1:
            ax.legend(frameon=False, fontsize=8, loc="lower left", ncols=2, handletextpad=0.1)
    axes[0, 0].text(0, BOUND * 1.25, "bound, 1e-4" if given is None else "bound", fontsize=8)
    figure.supxlabel("position in the prompt", fontsize=9)
    figure.supylabel("largest |logit difference| to transformers", fontsize=9)
    plt.show()
    for name, error in errors.items():
        assert np.nanmax(error) <= bounds[name], f"{name}: {np.nanmax(error):.1e} is more than {bounds[name]:.1e}"
else:
    print(NO_TORCH)

# %% [markdown]
# ## Bugs to measure by
#
# Mistakes that ports of this model have made, each put into our model by replacing one function or one array.


# %%
class Bug(NamedTuple):
    """A `patch` of the code, or a `change` of the Batch."""

    patch: Any = None
    change: Callable[[Batch], Batch] | None = None


def without_levels(self: Any, *args: Any, deepstack: Any, **options: Any) -> Any:
    return decoder(self, *args, deepstack=None, **options)


def levels_at_vision_indexes(self: Any, *args: Any, deepstack: jax.Array, **options: Any) -> Any:
    taps = sorted(config.vision_config.deepstack_visual_indexes)
    spread = jnp.zeros((max(taps) + 1, *deepstack.shape[1:]), deepstack.dtype).at[jnp.array(taps)].set(deepstack)
    return decoder(self, *args, deepstack=spread, **options)


def unnormalised(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probs, k)
    return probs, weights.astype(logits.dtype), experts.astype(jnp.int32)


def norm_after_rotation(self: Any, x: jax.Array, rotary: Any, segment_ids: jax.Array) -> jax.Array:
    q, k = (norm(rope.rotate(proj(x), *rotary)) for norm, proj in ((self.q_norm, self.q_proj), (self.k_norm, self.k_proj)))
    return self.o_proj(text.attention(q, k, self.v_proj(x), segment_ids=segment_ids, causal=True, backend=self.backend))


def swapped(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda rows, gate_up, down, sizes, _: kernel(rows, gate_up[:, :, ::-1], down, sizes)


def replaced(batch: Batch, **fields: Any) -> Batch:
    return type(batch)(**(vars(batch) | fields))


def flat(batch: Batch) -> Batch:
    counted = np.maximum(np.cumsum(batch.segment_ids > 0, axis=1) - 1, 0)
    return replaced(batch, position_ids=np.broadcast_to(counted, batch.position_ids.shape).astype(np.int32))


decoder, gelu = text.Qwen3VLMoeTextModel.__call__, layers.gelu
patch = mock.patch.object
BUGS = {
    "positions: 1-D instead of M-RoPE": Bug(change=flat),
    "positions: M-RoPE in chunks": Bug(
        patch(rope, "mrope_axis", lambda sections, half: np.repeat(np.arange(3), sections)[:half])
    ),
    "attention: q/k norm after the rotation": Bug(patch(text.Qwen3VLMoeTextAttention, "__call__", norm_after_rotation)),
    "vision: frames attend to each other": Bug(
        change=lambda batch: replaced(batch, patch_segment_ids=np.minimum(batch.patch_segment_ids, 1))
    ),
    "vision: rows and columns swapped": Bug(
        change=lambda batch: replaced(batch, patch_coords=np.ascontiguousarray(batch.patch_coords[..., ::-1]))
    ),
    "vision: tanh GELU in the mergers": Bug(patch(vision, "gelu", lambda x, *, approximate: gelu(x, approximate=True))),
    "vision: exact GELU in the blocks": Bug(patch(vision, "gelu", lambda x, *, approximate: gelu(x, approximate=False))),
}
if config.vision_config.deepstack_visual_indexes:
    BUGS |= {
        "DeepStack: left out": Bug(patch(text.Qwen3VLMoeTextModel, "__call__", without_levels)),
        "DeepStack: at the vision layers' numbers": Bug(patch(text.Qwen3VLMoeTextModel, "__call__", levels_at_vision_indexes)),
    }
if is_moe:
    BUGS |= {
        "experts: gate and up swapped": Bug(
            mock.patch.dict(moe.KERNELS, {name: swapped(kernel) for name, kernel in moe.KERNELS.items()})
        ),
        "experts: weights not renormalised": Bug(patch(moe, "route", unnormalised)),
    }

wrong = {}
for name, bug in BUGS.items():
    if bug.patch is None:
        assert bug.change is not None
        wrong[name] = ask(bug.change(batches[MIXED]), T)
    else:
        with bug.patch:
            wrong[name] = ask(batches[MIXED], T, compiled())

yardstick = theirs.get(MIXED, ours[MIXED])
YARDSTICK = "transformers" if TORCH else "the model without the bug"
moved = {name: float(np.abs(answer.logits - yardstick.logits).max()) for name, answer in wrong.items()}

# %% [markdown]
# ## What each bug would have cost
#
# The bars are the largest logit difference over the prompt with the picture and the clip, on a logarithmic axis: what this
# package really differs by at the top, then each bug. Every bar that ends right of the dashed line is a mistake that the tests
# cannot miss; the shortest show why a looser bound, or a look at the likeliest token, would not do.

# %%
bars = dict(sorted(moved.items(), key=lambda item: item[1]))
if TORCH:
    bars = {"this package, as it is": float(np.nanmax(errors[MIXED])), **bars}
figure, ax = plt.subplots(figsize=(9, 0.3 * len(bars) + 0.9), layout="constrained")
colours = [OURS if name not in moved else WARM[1] if name.startswith("vision") else WARM[0] for name in bars]
ax.barh(list(bars), list(bars.values()), color=colours, left=0, height=0.66)
for row, value in enumerate(bars.values()):
    ax.text(max(value, 1e-7) * 1.15, row, f"{value:.1e}", va="center", fontsize=8)
ax.axvline(bounds.get(MIXED, BOUND), color="black", lw=0.8, ls="--")
ax.text(bounds.get(MIXED, BOUND) * 1.2, -0.85, "the tests' bound", fontsize=8, va="center")
ax.set(xscale="log", xlim=(1e-7, 100), ylim=(len(bars) - 0.4, -1.15), xlabel=f"largest |logit difference| to {YARDSTICK}")
ax.tick_params(axis="y", length=0)
plt.show()
if given is None:  # of other weights nothing is promised: at a usual initialisation some of these bugs vanish in rounding
    assert min(moved.values()) > BOUND, min(moved, key=lambda name: moved[name])

# %% [markdown]
# ## Error from layer to layer
#
# Each point is the error of one layer's output divided by the output's own size (root mean square), from the embeddings, where
# text tokens are equal bit for bit and so have no point, to the final norm. Rounding keeps its distance (blue); a bug in the
# vision tower is there from the embeddings on, one in the decoder begins in its own layer and stays, and a step further on is
# often one token that a small error has tipped to another expert.


# %%
def relative(hidden: np.ndarray, where: np.ndarray) -> np.ndarray:
    """`[L+1,B,T,D]` against the yardstick, over the columns `where` -> `[L+1]`."""
    truth = yardstick.hidden[:, 0][:, where].astype(np.float64)
    return np.sqrt(np.square(hidden[:, 0][:, where] - truth).mean((1, 2)) / np.square(truth).mean((1, 2)))


kinds = inputs[MIXED]["mm_token_type_ids"][0]
curves = {}
if TORCH:
    curves["this package, visual tokens"] = (relative(ours[MIXED].hidden, kinds > 0), OURS, "-")
    curves["this package, text tokens"] = (relative(ours[MIXED].hidden, kinds == 0), OURS, ":")
for name, colour in zip(
    ("DeepStack: left out", "positions: 1-D instead of M-RoPE", "vision: tanh GELU in the mergers"), WARM, strict=True
):
    if name in wrong:
        curves[f"bug, {name}"] = (relative(wrong[name].hidden, kinds >= 0), colour, "-")

figure, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
depth = len(yardstick.hidden)
for name, (values, colour, style) in curves.items():
    ax.plot(np.where(values > 0, values, np.nan), style, color=colour, lw=1.5, marker="o", ms=3.5, label=name)
ticks = np.unique(np.linspace(0, depth - 1, min(depth, 9)).round().astype(int))
names = {0: "embeddings", depth - 1: "final norm"}
ax.set_xticks(ticks, [names.get(t, f"layer {t - 1}") for t in ticks.tolist()])
ax.set(yscale="log", ylim=(1e-8, 10), ylabel=f"relative error to {YARDSTICK}")
ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
ax.grid(axis="y", color="#e6e6e6", lw=0.6)
plt.show()
for name, answer in wrong.items():
    if name in ("positions: 1-D instead of M-RoPE", "vision: tanh GELU in the mergers"):
        squared = np.square(answer.hidden[-1, 0].astype(np.float64) - yardstick.hidden[-1, 0]).sum(-1)
        worst = squared.argmax()
        print(f"{name}: column {worst} alone makes {squared[worst] / squared.sum():.0%} of the error at the final norm")
if not TORCH:
    print(NO_TORCH)

# %% [markdown]
# ## Positions over the picture
#
# Every token has three positions. Over a picture T stands still while H counts its rows and W its columns, so that tokens side by
# side are neighbours; below, the whole prompt: text counts up on all three, each picture or frame holds T and fans H and W out,
# and text goes on behind the largest of them, which is why 1-D positions (grey) run ahead.

# %%
merge = config.vision_config.spatial_merge_size
_, rows, columns = (int(n) for n in inputs[MIXED]["image_grid_thw"][0] // [1, merge, merge])
on_cat = np.flatnonzero(kinds == 1)[: rows * columns]
positions = ours[MIXED].positions[:, 0]
if TORCH:
    assert np.array_equal(ours[MIXED].positions, theirs[MIXED].positions), "other positions than transformers'"

outline = [withStroke(linewidth=2, foreground="black")]
every = max(1, int(np.ceil(max(rows, columns) / 12)))  # a large picture is labelled at every few tokens
extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
background = np.asarray(cat.convert("L"))
figure = plt.figure(figsize=(10, 6), layout="constrained")
grid = figure.add_gridspec(2, 3, height_ratios=[1.15, 1])
low, high = positions[:, on_cat].min(), positions[:, on_cat].max()
for axis, letter in enumerate("THW"):
    ax = figure.add_subplot(grid[0, axis])
    values = positions[axis, on_cat].reshape(rows, columns)
    ax.imshow(background, cmap="gray", extent=extent, vmin=-60, vmax=255)
    painted = ax.imshow(values, cmap="viridis", alpha=0.55, extent=extent, vmin=low, vmax=high)
    for r in range(0, rows, every):
        for c in range(0, columns, every):
            label: dict[str, Any] = dict(color="white", fontsize=7, ha="center", va="center", path_effects=outline)
            ax.text(c, r, str(values[r, c]), **label)
    ax.set_title(f"{letter} of the picture's {rows} x {columns} tokens", fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
ax = figure.add_subplot(grid[1, :])
shade(ax, kinds)
ax.plot(np.arange(T), color="#b9b9b9", lw=1, ls="--", label="1-D")
for axis, (letter, colour) in enumerate(zip("THW", (OURS, *WARM[:2]), strict=True)):
    ax.plot(positions[axis], ".", ms=3.5, color=colour, label=letter)
ax.set(xlim=(-1, T), xlabel="column of the prompt (shaded: picture, then the frames of the clip)", ylabel="position")
ax.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", markerscale=2)
plt.show()

# %% [markdown]
# ## Which experts the picture's patches go to
#
# Above, the first choice of each of the picture's tokens in some layers: its number, and a colour for the nine experts most
# chosen there. Below, the share of all choices that each expert gets from the picture (bars) and from the text (dots): the dotted
# line is an even spread, and experts that only one of the two uses are what training makes of this, or, here, chance.

# %%
if is_moe:
    moe_layers = [i for i, kind in enumerate(config.text_config.layer_kinds()) if kind == "moe"]
    chosen = ours[MIXED].experts
    assert chosen is not None and len(chosen) == len(moe_layers)
    E = config.text_config.num_experts
    picks = np.unique(np.linspace(0, len(moe_layers) - 1, min(4, len(moe_layers))).round().astype(int))
    palette = [plt.get_cmap("tab10")(i)[:3] for i in range(10) if i != 7]  # 7 is grey, which means "any other"
    figure, axes = plt.subplots(
        2, len(picks), figsize=(2.9 * len(picks), 4.6), layout="constrained", squeeze=False, height_ratios=[1.5, 1], sharey="row"
    )
    for pick, top, bottom in zip(picks.tolist(), *axes, strict=True):
        first = chosen[pick][on_cat, 0].reshape(rows, columns)
        counts = np.bincount(first.ravel(), minlength=E)
        ranked = np.argsort(-counts, kind="stable")[: min(len(palette), np.count_nonzero(counts))]
        colour = np.full((E, 3), 0.75)
        colour[ranked] = palette[: len(ranked)]
        top.imshow(background, cmap="gray", extent=extent, vmin=-60, vmax=255)
        top.imshow(colour[first], alpha=0.6, extent=extent)
        for r in range(0, rows, every):
            for c in range(0, columns, every):
                label: dict[str, Any] = dict(color="white", fontsize=6.5, ha="center", va="center", path_effects=outline)
                top.text(c, r, str(first[r, c]), **label)
        top.set_title(f"layer {moe_layers[pick]}: {len(np.unique(first))} of {E} are first", fontsize=9)
        top.set(xticks=[], yticks=[])
        top.spines[:].set_visible(False)
        shares = [np.bincount(chosen[pick][where].ravel(), minlength=E) for where in (on_cat, np.flatnonzero(kinds == 0))]
        bottom.bar(np.arange(E), shares[0] / shares[0].sum(), color=colour, width=0.8)
        bottom.plot(np.arange(E), shares[1] / shares[1].sum(), "o", color="black", ms=2.5)
        bottom.axhline(1 / E, color="black", lw=0.7, ls=":")
        bottom.set(xlabel="expert", xlim=(-0.7, E - 0.3))
    axes[1, 0].set_ylabel("share of all choices\n(bars: picture, dots: text)")
    plt.show()
    if TORCH:
        same = [np.mean(np.sort(a, -1) == np.sort(b, -1)) for a, b in zip(chosen, theirs[MIXED].experts, strict=True)]
        print(f"{np.mean(same):.3%} of the {top_k * T * len(same):,} choices in {len(same)} layers are transformers'")
        assert np.mean(same) > 0.999
    else:
        print(NO_TORCH)
else:
    print("this checkpoint is dense: it has no experts")

# %%
print(f"{len(errors)} prompts within the bound, {len(moved)} bugs measured" if TORCH else NO_TORCH)
