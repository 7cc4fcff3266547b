"""Units that sources print, and what a slip between two of them would make of a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A figure in this unit is `factor` times as many of `dimension`."""

    dimension: str
    factor: float = 1.0


_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}

UNITS: Mapping[str, Unit] = {
    **{f"{prefix}FLOP": Unit("FLOP", factor) for prefix, factor in _PREFIXES.items()},
    **{f"{prefix}FLOP/s": Unit("FLOP/s", factor) for prefix, factor in _PREFIXES.items()},
    **{f"{prefix}B": Unit("B", factor) for prefix, factor in _PREFIXES.items()},
    "FLOP/byte": Unit("FLOP/byte"),
    "USD": Unit("USD"),
    "US cents": Unit("USD", 0.01),
    "$ cents": Unit("USD", 0.01),  # the sign says dollars, the word says cents: taken at its word
    "x": Unit("x"),
    "%": Unit("x", 0.01),
    "parameters": Unit("parameters"),
    "tokens": Unit("tokens"),
    "Ki tokens": Unit("tokens", 1024.0),
    "tokens each of two": Unit("tokens", 2.0),
    "tokens/s": Unit("tokens/s"),
    "days": Unit("days"),
    "GPUs": Unit("GPUs"),
    "layers": Unit("layers"),
    "experts": Unit("experts"),
    "heads": Unit("heads"),
    "ways": Unit("ways"),
    "epochs": Unit("epochs"),
    "stages": Unit("stages"),
    "sequences": Unit("sequences"),
}
"""Bytes are decimal, as data sheets print them: 1 GB is 1e9 B."""

TERMS: Mapping[str, str] = {
    **dict.fromkeys(("total", "active", "parameters", "experts", "active_experts"), "parameters"),
    **dict.fromkeys(("attention", "attention_other", "rest", "embeddings", "feed_forward"), "parameters"),
    **dict.fromkeys(("expert_biases", "active_matrices", "baseline", "held"), "parameters"),
    **dict.fromkeys(("tokens", "batch_tokens", "context", "batch"), "tokens"),
    **dict.fromkeys(("bandwidth", "network_bandwidth"), "B/s"),
    **dict.fromkeys(("weight_bytes", "gradient_bytes", "optimizer_bytes", "per_parameter"), "B/parameter"),
    **dict.fromkeys(("vision_bytes", "text_bytes"), "B/token"),
    **dict.fromkeys(
        ("tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel", "ways"), "ways"
    ),
    **dict.fromkeys(("text_epochs", "code_epochs"), "epochs"),
    **dict.fromkeys(("words_per_minute", "known_words_per_minute"), "words/min"),
    **dict.fromkeys(("tokens_per_second", "known_tokens_per_second"), "tokens/s"),
    **dict.fromkeys(("n_layers", "n_moe_layers", "layers"), "layers"),
    **dict.fromkeys(("n_heads", "n_kv_heads", "heads"), "heads"),
    **dict.fromkeys(("n_experts", "top_k"), "experts"),
    "scores": "FLOP",
    "bytes_per_parameter": "B/parameter",
    "bytes_per_element": "B/element",
    "gpu_memory": "B",
    "gpu_hour_usd": "USD/h",
    "gpus": "GPUs",
    "days": "days",
    "peak_flops": "FLOP/s",
    **dict.fromkeys(("mtbf", "interval", "period"), "s"),
}
"""Of the names in formulas; the others count dimensions, or are pure numbers."""

COUNTED = frozenset({"layers", "experts", "heads", "ways", "epochs", "sequences"})
"""Whole things that are few enough to be counted: a figure is only itself, never a rounding."""

_EXCHANGED: Mapping[str, tuple[str, ...]] = {
    "FLOP": ("FLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"),
    "FLOP/s": ("FLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"),
    "B": ("MB", "GB", "TB"),
    "USD": ("USD", "US cents"),
    "x": ("x", "%"),
}


def slips(printed: str, dimension: str, exact: bool) -> tuple[tuple[str, Unit], ...]:
    """What a writer may have meant in place of the `printed` unit: how to read it, and its meaning.

    Within FLOP, bytes, money and ratios these are the units in use; elsewhere a factor of a thousand, if
    theory is `exact`: a mere bound admits whatever lies far enough on its one side.
    """
    unit = UNITS[printed] if printed else Unit(dimension)
    names = _EXCHANGED.get(unit.dimension)
    if names is None and not exact:
        return ()
    if names is None:
        return (
            ("a thousand times larger", Unit(dimension, unit.factor * 1e3)),
            ("a thousand times smaller", Unit(dimension, unit.factor / 1e3)),
        )
    meant = [(name, UNITS[name]) for name in names if UNITS[name].dimension == dimension]
    return tuple((f"as {name}", one) for name, one in meant if one != unit)
