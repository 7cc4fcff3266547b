"""Everything theory says about one spec, as plain data: what `moe-harness describe` prints.

Letters: B sequences, S tokens of context per sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.spec import Architecture, Leaf, Spec, SpecError
from harness.spec.errors import sentence, show
from harness.spec.printed import interval, is_figure
from harness.theory import flops, memory, parameters, training
from harness.theory.bounds import corners

COUNTS = {"parameters.total": parameters.total, "parameters.active": parameters.active}
"""Quantities of claims that a counting convention may reproduce."""

LATENT_VARIANTS: tuple[flops.LatentAttention, ...] = ("recomputed", "absorbed")
"""Ways to decode with latent attention, beside the one with expanded keys and values."""


@dataclass(frozen=True)
class Table:
    """A table as data; whoever prints it chooses the format."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class Description:
    """`facts` is JSON-ready: nested dicts of ints, floats, strings and lists, described in `describe`."""

    name: str
    facts: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The facts, ready for json.dumps."""
        return dict(self.facts)

    def tables(self) -> tuple[Table, ...]:
        """The same for people."""
        return tuple(_unknown_tables(self.facts) if "unknowns" in self.facts else _tables(self.facts))


def describe(subject: Spec | Architecture, *, context: int = 2048, batch: int = 1) -> Description:
    """Counts of a spec (or of a bare architecture) for B = batch sequences of S = context tokens.

    Keys of the result:
    parameters.total, parameters.buffers, parameters.by_component, parameters.active_by_component;
    parameters.total_under.CONVENTION, parameters.active.CONVENTION (`parameters.CONVENTIONS`);
    flops.forward_per_token.{full,causal,decode} and flops.forward_per_token_by_component: means over a
      prefill of S tokens, and one decode step at S (latent attention: also decode_{recomputed,absorbed});
    flops.forward_pass.{full,causal}: all B x S tokens; flops.training.CONVENTION if the spec gives tokens;
    bytes.weights, bytes.kv_cache_per_token, bytes.kv_cache (B sequences of S tokens), all elements in dtype;
    published: parameter counts that sources print, with the conventions that reproduce them.
    For a spec with unknowns instead of all these:
    unknowns: path, domain and reason of each;
    bounds: least and largest value over all domains, no claim used; empty where an unknown is no dimension.

    Raises ValueError if context or batch is below 1, SpecError if the spec's [training] is unusable.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give a whole number of at least 1")
    facts: dict[str, Any] = {"name": "", "context": context, "batch": batch}
    if isinstance(subject, Architecture):
        facts |= {"dtype": subject.dtype} | _counts(subject, context, batch)
        return Description("", facts)
    facts |= {"name": subject.name, "title": subject.title, "digest": subject.digest}
    if subject.unknowns:
        facts |= {
            "unknowns": [_unknown(leaf) for leaf in subject.unknowns],
            "bounds": _bounds(subject, context, batch),
        }
        return Description(subject.name, facts)
    facts |= {"dtype": subject.architecture.dtype} | _counts(subject.architecture, context, batch)
    facts["published"] = list(_published(subject))
    if not isinstance(subject.training.get("tokens", []), list):  # a list holds values to try: none is known
        facts["flops"]["training"] = _training(subject, context)
    return Description(subject.name, facts)


def _counts(architecture: Architecture, context: int, batch: int) -> dict[str, Any]:
    """The part of the facts that an architecture alone decides."""
    full = flops.forward_by_component(architecture, 1, context)
    causal = flops.forward_by_component(architecture, 1, context, attention="causal")
    decode = {"decode": flops.token_by_component(architecture, context, attention="causal")}
    if architecture.attention.mla is not None:
        decode |= {
            f"decode_{mla}": flops.token_by_component(architecture, context, attention="causal", mla=mla)
            for mla in LATENT_VARIANTS
        }
    per_token = {
        "full": {name: _mean(count, context) for name, count in full.items()},
        "causal": {name: _mean(count, context) for name, count in causal.items()},
        **decode,
    }
    return {
        "parameters": {
            "total": parameters.total(architecture),
            "total_under": {name: parameters.total(architecture, name) for name in parameters.CONVENTIONS},
            "active": {name: parameters.active(architecture, name) for name in parameters.CONVENTIONS},
            "by_component": parameters.by_component(architecture),
            "active_by_component": parameters.active_by_component(architecture),
            "buffers": sum(parameters.buffers(architecture).values()),
        },
        "flops": {
            "forward_per_token": {
                "full": _mean(sum(full.values()), context),
                "causal": _mean(sum(causal.values()), context),
                **{name: sum(parts.values()) for name, parts in decode.items()},
            },
            "forward_per_token_by_component": per_token,
            "forward_pass": {
                "full": flops.forward_total(architecture, batch, context),
                "causal": flops.forward_total(architecture, batch, context, attention="causal"),
            },
        },
        "bytes": {
            "weights": memory.weight_bytes(architecture),
            "kv_cache_per_token": memory.kv_cache_bytes_per_token(architecture),
            "kv_cache": memory.kv_cache_bytes(architecture, context, batch),
        },
    }


def _mean(total: int, n: int) -> int | float:
    """total / n, as an integer where it is one."""
    quotient, rest = divmod(total, n)
    return total / n if rest else quotient


def _published(spec: Spec) -> Iterator[dict[str, Any]]:
    """Each parameter count that a source prints, with the conventions that reproduce it."""
    for claim in spec.claims:
        count = COUNTS.get(claim.quantity)
        if count is None:
            continue
        for reading in claim.readings:
            if not is_figure(reading.value):
                continue
            printed = interval(reading.value)
            names = parameters.conventions_matching(spec.architecture, printed.__contains__, count)
            yield {
                "claim": claim.id,
                "quantity": claim.quantity,
                "printed": reading.value,
                "unit": reading.unit,
                "sources": list(reading.sources),
                "reproduced_by": list(names),
            }


def _training(spec: Spec, context: int) -> dict[str, Any]:
    """FLOPs of the training run, under each convention, at the spec's training context if it has one."""
    tokens = _whole(spec, "tokens")
    length = context if isinstance(spec.training.get("context", []), list) else _whole(spec, "context")
    per_token = {
        name: training.flops_per_token(spec.architecture, length, name) for name in training.FLOP_CONVENTIONS
    }
    return {"tokens": tokens, "context": length} | {name: tokens * n for name, n in per_token.items()}


def _whole(spec: Spec, key: str) -> int:
    """A whole number of at least 1 from [training]; 14.8e12 is one."""
    value = spec.training[key]
    if value < 1 or value != int(value):
        right = "give a whole number of at least 1"
        raise SpecError(
            sentence(
                spec.path, spec.lines.get(f"training.{key}"), f"training.{key}", f"got {show(value)}", right
            )
        )
    return int(value)


def _unknown(leaf: Leaf) -> dict[str, Any]:
    domain = leaf.domain
    assert domain is not None  # the loader refuses an unknown without one
    stated: dict[str, Any] = {"values": list(domain.values)}
    if domain.of is not None:
        stated |= {"of": domain.of, "also": list(domain.also)}
    return {"path": leaf.path, "domain": stated, "why": leaf.why}


def _bounds(spec: Spec, context: int, batch: int) -> dict[str, list[int | float]]:
    """Dotted key of `_counts` -> [least, largest]; empty where an unknown is no dimension."""
    ends = corners(spec)
    if ends is None:
        return {}
    low, high = (dict(_flat(_counts(end, context, batch))) for end in ends)
    return {key: [low[key], high[key]] for key in low if "by_component" not in key}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _tables(facts: Mapping[str, Any]) -> Iterator[Table]:
    counts, work = facts["parameters"], facts["flops"]
    whole, active = counts["by_component"], counts["active_by_component"]
    rows = [(name, whole[name], active[name]) for name in whole if whole[name]]
    total = ("total", sum(whole.values()), sum(active.values()))
    yield Table("Parameters", ("component", "all", "active per token"), (*rows, total))

    yield Table(
        "Parameters under each convention",
        ("convention", "all", "active per token", "what is counted"),
        tuple(
            (name, counts["total_under"][name], count, parameters.CONVENTIONS[name].description)
            for name, count in counts["active"].items()
        ),
    )
    if facts.get("published"):
        yield Table(
            "Published figures and the conventions that reproduce them",
            ("claim", "printed", "reproduced under"),
            tuple(
                (one["claim"], f"{one['printed']} {one['unit']}", ", ".join(one["reproduced_by"]) or "none")
                for one in facts["published"]
            ),
        )
    parts = work["forward_per_token_by_component"]
    yield Table(
        f"Forward FLOPs per token at a context of {facts['context']:,}",
        ("component", *parts),
        (
            *(
                (name, *(part[name] for part in parts.values()))
                for name in flops.COMPONENTS
                if parts["full"][name]
            ),
            ("total", *(work["forward_per_token"][name] for name in parts)),
        ),
    )
    if "training" in work:
        run = work["training"]
        yield Table(
            f"Training FLOPs of {run['tokens']:,} tokens in sequences of {run['context']:,}",
            ("convention", "FLOPs", "what is counted"),
            tuple((name, run[name], rule) for name, rule in training.FLOP_CONVENTIONS.items()),
        )
    yield Table(
        "Bytes",
        ("what", "bytes"),
        (
            (f"weights, all of them in {facts['dtype']}", facts["bytes"]["weights"]),
            ("KV cache, one token", facts["bytes"]["kv_cache_per_token"]),
            (f"KV cache, {facts['batch']:,} x {facts['context']:,} tokens", facts["bytes"]["kv_cache"]),
        ),
    )


def _unknown_tables(facts: Mapping[str, Any]) -> Iterator[Table]:
    yield Table(
        "Unknown",
        ("leaf", "domain", "why"),
        tuple((one["path"], _span(one["domain"]), one["why"]) for one in facts["unknowns"]),
    )
    yield Table(
        "Between, over these domains alone",
        ("quantity", "least", "largest"),
        tuple((key, low, high) for key, (low, high) in facts["bounds"].items()),
    )


def _span(domain: Mapping[str, Any]) -> str:
    """A domain in a few words: its values, or how many there are between which ends."""
    values = [str(value) for value in domain["values"]]
    text = ", ".join(values) if len(values) <= 6 else f"{len(values)} values from {values[0]} to {values[-1]}"
    if "of" not in domain:
        return text
    return f"{text} x {domain['of']}" + "".join(f", or {value}" for value in domain["also"])
