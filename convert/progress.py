"""What a long copy shows: a bar on a terminal, a line now and then elsewhere; and how much memory it took."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

LINE_SECONDS = 10.0


def human_bytes(size: float) -> str:
    """`1.24 GB`: decimal units, as disks are sold and hubs print."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def anonymous_bytes() -> int:
    """This process's memory that is not a mapped file: what can run out. 0 where /proc does not say."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")), 0)


class Progress:
    """Counts bytes towards `total`.

    Attributes:
      peak: most anonymous memory seen, in bytes.
    """

    def __init__(self, total: int, report: Callable[[str], None], *, already: int = 0):
        self.total, self.count, self.peak = total, already, anonymous_bytes()
        self._report, self._already = report, already
        self._start = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=already, unit="B", unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, size: int) -> None:
        """`size` more bytes are done. Any thread may say it."""
        with self._lock:
            self._add(size)

    def _add(self, size: int) -> None:
        self.count += size
        self.peak = max(self.peak, anonymous_bytes())
        if self._bar is not None:
            self._bar.update(size)
            return
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS:
            self._said = now
            rate = (self.count - self._already) / (now - self._start)
            left = (self.total - self.count) / max(rate, 1.0)
            self._report(
                f"{human_bytes(self.count)} of {human_bytes(self.total)} ({100 * self.count / self.total:.0f} %), "
                f"{human_bytes(rate)}/s, {left:.0f} seconds left"
            )
