"""What an implementation computes: the right logits, and no more than it needs for them.

Letters: B sequences, S tokens per sequence, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch

from harness.conformance import Case, Void, conformance, require
from harness.conformance.capture import scaled, variants
from harness.conformance.comparison import agree, finite, margin, note_share, ragged
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.models import Pass, find_model
from harness.conformance.gradients import check_gradients
from harness.conformance.narrowing import located, narrowed
from harness.evidence.flops import FlopCounter
from harness.implementations.protocols import Unsupported
from harness.spec.architecture import Architecture
from harness.theory import flops


def has_architecture(architecture: Architecture | None) -> bool:
    """Applies where there is a spec to compare with."""
    return architecture is not None


def dropless(architecture: Architecture | None) -> bool:
    """Applies where every token is computed by K experts."""
    if architecture is None:
        return False
    return architecture.moe is None or architecture.moe.router.capacity_factor is None


def caches_what_it_multiplies(architecture: Architecture | None) -> bool:
    """Applies where a decode step has one cost: a latent cache may be expanded or absorbed, and a window
    layer may keep more than it needs."""
    return (
        dropless(architecture)
        and architecture is not None
        and (architecture.attention.mla is None and architecture.attention.window is None)
    )


@conformance(
    "compute.logits-equal-reference",
    clause="architecture",
    needs=("forward", "weights"),
    kills=(
        "unweighted-sum",
        "gate-and-up-swapped",
        "experts-in-string-order",
        "kv-heads-tiled",
        "final-norm-dropped",
    ),
    applies=has_architecture,
)
def test_logits_equal_reference(case: Case) -> None:
    """The logits of a ragged batch are those of the reference in float64, within what rounding explains."""
    architecture, weights = case.shape, case.weights()
    batch = ragged(case)
    model = case.model(weights=weights)
    bound = margin(case, model, batch.tokens, mask=batch.mask)
    assert bound.logits is not None
    compared = bound.comparable & batch.mask
    note_share(case, compared[batch.mask])
    with torch.no_grad():
        logits = model.forward(batch.tokens, mask=batch.mask)
    finite(logits, "logits at real tokens", where=batch.mask)
    seen = Seen[Pass]()
    with explained(seen, find_model(case)):
        one = Pass(architecture, weights, batch.tokens, logits, bound, batch.mask)
        seen.add(one)
        with located(case, model, one):
            used = agree(logits, bound.logits, bound.radius, what="logits", where=compared)
    case.note("share_of_tolerance", round(used, 4))
    require(logits.shape[-1] == architecture.vocab_size, "logits are not over the vocabulary")


@conformance(
    "compute.faint-input-equals-reference",
    clause="architecture.norm.eps",
    needs=("forward", "weights"),
    kills=("norm-eps-default",),
    applies=has_architecture,
)
def test_faint_input_equals_reference(case: Case) -> None:
    """So are those of embeddings so small that the epsilon of the norms decides."""
    # Mean squares of about 4e-6, between the usual epsilons of 1e-6 and 1e-5.
    weights = scaled(scaled(case.weights(), "embedding.weight", 2.0**-8), "positions.weight", 2.0**-8)
    tokens = case.tokens(3, 13)
    model = case.model(weights=weights)
    bound = margin(case, model, tokens, weights=weights)
    assert bound.logits is not None
    note_share(case, bound.comparable)

    def loud(aside: Case) -> None:
        plain = aside.weights()
        usual = margin(aside, model, tokens, weights=plain)
        assert usual.logits is not None
        again = aside.model(weights=plain)
        with torch.no_grad():
            found = again.forward(tokens)
        agree(found, usual.logits, usual.radius, what="logits", where=usual.comparable)

    with torch.no_grad():
        logits = model.forward(tokens)
    seen = Seen[Pass]()
    with explained(seen, find_model(case)):
        seen.add(Pass(case.shape, weights, tokens, logits, bound))
        # But for their epsilon norms do not see how loud their input is.
        with narrowed(case, loud, otherwise="norm"):
            agree(logits, bound.logits, bound.radius, what="logits", where=bound.comparable)


@conformance(
    "compute.dense-gradients-equal-reference",
    clause="architecture",
    needs=("forward", "weights", "gradients"),
    kills=(
        "tied-gradient-halved",
        "norm-gradient-lost",
        "tied-gradient-doubled",
    ),
    applies=lambda architecture: architecture is not None and architecture.moe is None,
    costly=True,
)
def test_dense_gradients_equal_reference(case: Case) -> None:
    """Without experts, the gradient of the language-model loss in every weight is that of the reference."""
    check_gradients(case, case.shape, case.weights(), "dense")


@conformance(
    "compute.variants-equal-reference",
    clause="architecture.moe",
    needs=("forward", "weights"),
    kills=(
        "transposed-if-square",
        "swapped-if-half-square",
        "top-1-normalised",
        "scaling-only-if-normalised",
        "shared-gate-dropped",
        "gate-clamped-below",
        "router-transposed-if-square",
        "combines-four-at-most",
    ),
    applies=lambda architecture: (
        dropless(architecture) and architecture is not None and architecture.moe is not None
    ),
    costly=True,
)
def test_variants_equal_reference(case: Case) -> None:
    """So are those of its neighbours: other K, square experts, a gated shared expert, scaled weights."""
    batch = ragged(case)
    passed_over, tokens_compared = [], 0
    seen = Seen[Pass]()
    with explained(seen, find_model(case)):
        for variant in list(variants(case)):
            try:
                model = case.model(variant.architecture, variant.weights)
            except Unsupported:
                passed_over.append(variant.label)
                continue
            bound = margin(
                case,
                model,
                batch.tokens,
                mask=batch.mask,
                architecture=variant.architecture,
                weights=variant.weights,
            )
            assert bound.logits is not None
            compared = bound.comparable & batch.mask
            if not compared.any():
                passed_over.append(f"{variant.label}: no token is comparable")
                continue
            tokens_compared += int(compared.sum())
            with torch.no_grad():
                logits = model.forward(batch.tokens, mask=batch.mask)
            one = Pass(variant.architecture, variant.weights, batch.tokens, logits, bound, batch.mask)
            seen.add(one)
            with located(case, model, one):
                agree(logits, bound.logits, bound.radius, what=f"{variant.label}: logits", where=compared)
    case.note("tokens_compared", tokens_compared)
    if not tokens_compared:
        raise Void("no variant could be compared: " + "; ".join(passed_over))
    if passed_over:
        case.note("not_expressible", passed_over)


def counted_flops(call: Callable[[], object]) -> int:
    """FLOPs of `call`; Void if it multiplies in a way that cannot be counted."""
    with torch.no_grad(), FlopCounter() as counter:
        call()
    if counter.unknown:
        raise Void(f"no FLOP formula for {', '.join(sorted(counter.unknown))}")
    return counter.total


@conformance(
    "compute.forward-flops-equal-theory",
    clause="architecture.moe.top_k",
    needs=("forward",),
    kills=("computes-every-expert", "shared-expert-dropped", "top-k-constant", "unembeds-twice"),
    applies=dropless,
    costly=True,
)
def test_forward_flops_equal_theory(case: Case) -> None:
    """A forward pass multiplies as much as theory says, to the FLOP, for K = 1, 2, 3."""
    batch, length = 3, 13
    moe = case.shape.moe
    for top_k in (None,) if moe is None else (1, 2, 3):
        architecture = case.twin(top_k=top_k)
        model = case.model(architecture)
        tokens = case.tokens(batch, length)
        counted = counted_flops(partial(model.forward, tokens))
        expected = flops.forward_total(architecture, batch, length)
        label = "dense" if top_k is None else f"top {top_k}"
        case.note(f"flops_{label.replace(' ', '_')}", counted)
        require(
            counted == expected,
            f"{label}: {counted} FLOP in place of {expected} ({counted - expected:+d})",
            stage="compute",
        )


@conformance(
    "compute.decode-flops-equal-theory",
    clause="architecture.attention",
    needs=("cache",),
    kills=("decode-recomputes-the-past", "computes-every-expert"),
    applies=caches_what_it_multiplies,
)
def test_decode_flops_equal_theory(case: Case) -> None:
    """One more token after a cached prefix multiplies as much as theory says, to the FLOP."""
    model = case.model()
    batch, past = 2, 11
    tokens, last = case.tokens(batch, past), case.tokens(batch, 1)
    with torch.no_grad():
        _, cache = model.extend(tokens, None)
    counted = counted_flops(partial(model.extend, last, cache))
    expected = flops.forward_total(case.shape, batch, 1, cached=past)
    case.note("flops", counted)
    require(
        counted == expected,
        f"{counted} FLOP in place of {expected} ({counted - expected:+d})",
        stage="compute",
    )


@conformance(
    "compute.decode-flops-stay-in-bounds",
    clause="architecture.attention",
    needs=("cache",),
    kills=("decode-recomputes-the-past", "latent-decode-recomputes-the-past"),
    applies=dropless,
)
def test_decode_flops_stay_in_bounds(case: Case) -> None:
    """However a cache is kept, one more token costs what theory's cheapest to dearest ways cost."""
    model = case.model()
    batch, past = 2, 23
    tokens, last = case.tokens(batch, past), case.tokens(batch, 1)
    with torch.no_grad():
        _, cache = model.extend(tokens, None)
    counted = counted_flops(partial(model.extend, last, cache))
    costs = [
        flops.forward_total(case.shape, batch, 1, cached=past, attention=pairs, mla=mla)
        for pairs in get_args(flops.Pairs)
        for mla in get_args(flops.LatentAttention)
    ]
    case.note("flops", counted)
    require(
        min(costs) <= counted <= max(costs),
        f"{counted} FLOP, where {min(costs)} to {max(costs)} are needed",
        stage="compute",
    )
