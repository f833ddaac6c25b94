"""A process that runs one command line after another, each in a forked child with a cap on memory and time.

Reads one JSON object a line, `{"argv", "log"}`, and answers `{"status", "peak", "err"}`: the exit status (negative: the signal
that ended it, "hang" after SECONDS), the largest resident size in bytes, and what it said on stderr. Forking spares every case
the seconds that importing jax and Orbax takes; nothing here may start a thread before the last fork.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS = 60.0
ADDRESS_SPACE = 8 << 30
"""XLA's threads reserve a gigabyte or two of it; what a damaged file asks for must not fit into the rest."""


def load(directory: str) -> int:
    """`from_pretrained`, with the exit status of a command."""
    from qvlmoe_jax import ModelClass
    from qvlmoe_jax.errors import QvlmoeError

    try:
        ModelClass.from_pretrained(directory)
    except QvlmoeError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _child(argv: list[str], log: Path) -> None:
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        from convert.__main__ import main

        status = load(argv[1]) if argv[0] == "load" else main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(argv: list[str], log: Path) -> dict[str, Any]:
    child = os.fork()
    if not child:
        _child(argv, log)
    deadline, hung = time.monotonic() + SECONDS, False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline and not hung:
            hung = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    code = "hang" if hung else os.waitstatus_to_exitcode(status)
    return {"status": code, "peak": usage.ru_maxrss * 1024, "err": (log / "err").read_text(errors="replace")}


def main() -> None:
    import jax  # noqa: F401
    import tensorstore  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401

    import qvlmoe_jax.model  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(run(case["argv"], Path(case["log"]))), flush=True)


if __name__ == "__main__":
    main()
