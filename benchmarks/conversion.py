"""How fast, and in how much memory, a checkpoint with the true 30B-A3B layer shapes converts, beside `cp` of the same files.

    python -m benchmarks.conversion --layers 3 --rounds 3 --dir /tmp/conversion

Each round copies, converts there and converts back, in that order; each timed with a `sync` after it, from a quiet disk.
Commands run as a user would run them: their own processes, imports included. Peak anonymous memory is what the commands print.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.true_widths import true_widths
from qvlmoe_jax.config import Qwen3VLMoeConfig
from qvlmoe_jax.hf import expand
from qvlmoe_jax.shards import write_shards

BF16 = np.dtype(ml_dtypes.bfloat16)
ROOT = Path(__file__).parents[1]


def write_source(directory: Path, layers: int) -> int:
    """A checkpoint of random bits. Returns its bytes."""
    directory.mkdir(parents=True)
    config = true_widths(layers)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    rows = {row.key: row for row in expand(Qwen3VLMoeConfig.from_hf(config))}
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 16, 1 << 24, dtype=np.uint16)

    def blocks(key: str) -> Any:
        left = int(np.prod(rows[key].hf_shape))
        while left:
            size = min(left, noise.size - 4099)
            start = int(rng.integers(0, 4099))
            yield noise[start : start + size].view(BF16)
            left -= size

    write_shards(directory, {key: (BF16, row.hf_shape) for key, row in rows.items()}, blocks, max_shard_bytes=5 * 10**9)
    return sum(2 * int(np.prod(row.hf_shape)) for row in rows.values())


def touch_free_memory() -> None:
    """Takes all of it and gives it back.

    A virtual machine's host takes back what its guest does not use, and the next to write there waits for it: a minute's rest
    made `cp` three times as slow. So that no command pays for what another found ready.
    """
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return
    size = int(fields["MemFree"].split()[0]) * 1024 - (1 << 29)
    if size > 0:
        with mmap.mmap(-1, size) as memory:
            for page in range(0, size, mmap.PAGESIZE):
                memory[page] = 1


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds of a command and a sync after it, and what it printed."""
    os.sync()
    touch_free_memory()
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    os.sync()
    return time.perf_counter() - start, done.stdout


def peak(output: str) -> str:
    """The peak anonymous memory that a command printed."""
    found = re.search(r"peak anonymous memory ([\d.,]+ \w+)", output)
    return found[1] if found else "not printed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("conversion_benchmark"))
    args = parser.parse_args()
    base = args.dir.resolve()
    source, copy, converted, back = (base / name for name in ("hf", "copy", "jax", "back"))
    size = write_source(source, args.layers)
    convert = [sys.executable, "-m", "convert"]
    jobs = {
        "cp": (["cp", "-r", str(source), str(copy)], copy),
        "hf2jax": ([*convert, "hf2jax", str(source), str(converted)], converted),
        "jax2hf": ([*convert, "jax2hf", str(converted), str(back)], back),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    memory = {"cp": "-"}
    for round_ in range(args.rounds):
        for name, (command, made) in jobs.items():
            taken, output = timed(command)
            seconds[name].append(taken)
            if name != "cp":
                memory[name] = peak(output)
            print(f"round {round_ + 1}: {name} {taken:.1f} s, {size / taken / 1e9:.2f} GB/s, {memory[name]}", flush=True)
            if name != "hf2jax":
                shutil.rmtree(made)
        shutil.rmtree(converted)
    print(f"\n{size:,} bytes, {args.layers} layers of 30B-A3B; Python {platform.python_version()}, {os.cpu_count()} CPUs")
    print("| command | seconds (median of each) | GB/s | of cp's rate | peak anonymous memory |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        ratios = statistics.median(a / b for a, b in zip(seconds["cp"], values, strict=True))
        middle = statistics.median(values)
        print(f"| {name} | {middle:.1f} | {size / middle / 1e9:.2f} | {100 * ratios:.0f} % | {memory[name]} |")
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
