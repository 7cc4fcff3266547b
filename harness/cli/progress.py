"""A line on stderr that says how far a command is: only for what takes longer than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DELAY_S = 2.0
"""What is over sooner shows nothing, and imports nothing for it."""
EVERY_S = {True: 0.5, False: 10.0}
"""Between two updates: on a terminal, and where each of them stays to be read."""

COUNTED = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
UNCOUNTED = "{desc} [{elapsed}{postfix}]"


@dataclass
class Progress:
    """How far the work is."""

    what: str
    total: int | None
    done: int = 0
    detail: str = ""

    def step(self, detail: str = "", *, done: int = 1) -> None:
        """Another `done` steps are over; `detail` says what comes next."""
        self.done += done
        self.detail = detail


@contextmanager
def progress(what: str, total: int | None = None, detail: str = "") -> Iterator[Progress]:
    """Show how far `what` is until the block ends: `total` steps, or as many as there will be."""
    state, over, since = Progress(what, total, detail=detail), threading.Event(), time.time()
    thread = threading.Thread(target=_show, args=(state, over, since), name="progress", daemon=True)
    thread.start()
    try:
        yield state
    finally:
        over.set()
        thread.join()


def _show(state: Progress, over: threading.Event, since: float) -> None:
    """The line moves of its own accord, also in the middle of one long step."""
    if over.wait(DELAY_S) or sys.stderr is None:
        return
    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()
    with tqdm(
        desc=state.what,
        total=state.total,
        file=sys.stderr,
        leave=not is_terminal,
        delay=1e-9,  # not at once: it would say that nothing is done
        bar_format=COUNTED if state.total else UNCOUNTED,
    ) as line:
        line.start_t = since
        ended = False
        while not ended:
            line.n = state.done
            line.set_postfix_str(state.detail)
            ended = over.wait(EVERY_S[is_terminal])
        line.n = state.done
