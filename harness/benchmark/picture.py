"""Pictures of a serving run: who held which slot in every iteration, and how latencies are distributed.

Drawn by matplotlib, the extra `plot`, as SVG without a date, so that the same figures give the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.implementations.protocols import Unsupported
from harness.reference.engine import Iteration

HELD, FREE = -1, -2
"""A slot whose request has ended but whose batch has not; a slot that nobody holds."""
NUMBERED = 60
"""Iterations beyond which cells are too narrow for a number."""


def slots(timeline: Sequence[Iteration], count: int) -> list[list[int]]:
    """Per slot, the arrival that holds it in each iteration, or HELD or FREE.

    A request keeps its slot from one iteration to the next, and a new one takes the first free slot.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    holders = [FREE] * count
    for iteration in timeline:
        present = [one for one in iteration.running if one >= 0]
        held = iteration.running.count(-1)
        for number, holder in enumerate(holders):
            if holder not in present:
                stays = holder != FREE and held > 0
                held -= stays
                holders[number] = HELD if stays else FREE
        for new in present:
            if new not in holders:
                holders[holders.index(FREE)] = new
        for row, holds in zip(rows, holders, strict=True):
            row.append(holds)
    return rows


def timelines(path: Path, runs: Mapping[str, tuple[Sequence[Iteration], int]]) -> None:
    """Draw each run's slots over its iterations, one above the other on one time axis, into an SVG file.

    runs: title -> timeline and slots. Raises Unsupported without matplotlib.
    """
    plot = _pyplot()
    longest = max(len(timeline) for timeline, _ in runs.values())
    height = sum(0.35 * count + 0.9 for _, count in runs.values())
    figure, axes = plot.subplots(
        len(runs),
        1,
        figsize=(min(4 + 0.3 * longest, 14), height),
        squeeze=False,
        sharex=True,
        gridspec_kw={"height_ratios": [count for _, count in runs.values()]},
    )
    colours = plot.get_cmap("tab20").colors
    for axis, (title, (timeline, count)) in zip(axes[:, 0], runs.items(), strict=True):
        for row, holders in enumerate(slots(timeline, count)):
            for at, holder in enumerate(holders):
                if holder == FREE:
                    continue
                face = "0.93" if holder == HELD else colours[holder % len(colours)]
                axis.broken_barh([(at, 1)], (row, 0.86), facecolor=face, edgecolor="white", linewidth=0.5)
                if holder >= 0 and longest <= NUMBERED:
                    axis.text(at + 0.5, row + 0.43, str(holder + 1), ha="center", va="center", fontsize=7)
        axis.set(title=title, ylim=(count, 0), xlim=(0, longest), ylabel="slot")
        axis.set_yticks([row + 0.43 for row in range(count)], [str(row + 1) for row in range(count)])
        axis.title.set_fontsize(9)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel(
        "iteration; a number is the request in the slot, grey a slot held for a batch whose others go on"
    )
    _save(figure, path)


def latencies(path: Path, samples: Mapping[str, Sequence[float]]) -> None:
    """Draw the cumulative distribution of each figure's samples (seconds) into an SVG file.

    Raises Unsupported without matplotlib.
    """
    plot = _pyplot()
    shown = {name: values for name, values in samples.items() if values}
    figure, axes = plot.subplots(
        1, max(len(shown), 1), figsize=(3.2 * max(len(shown), 1), 2.8), squeeze=False
    )
    for axis, (name, values) in zip(axes[0], shown.items(), strict=False):
        axis.ecdf([1e3 * value for value in values])
        axis.set(xlabel=f"{name}, ms", ylim=(0, 1.02))
    axes[0, 0].set_ylabel("share at or below")
    _save(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise Unsupported("a picture needs matplotlib: pip install 'moe-harness[plot]'") from error
    mpl.use("Agg")
    # Without these two every file would differ from the last by random ids.
    mpl.rcParams.update({"svg.hashsalt": "moe-harness", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    _pyplot().close(figure)
