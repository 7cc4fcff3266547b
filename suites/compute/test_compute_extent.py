"""What small shapes and first calls hide: many tokens, many layers, every id, other magnitudes, history.

Letters: B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from harness.conformance import Case, conformance, require
from harness.conformance.capture import scaled
from harness.conformance.comparison import agree, finite, margin, note_share, ragged
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.models import Pass, find_model
from harness.conformance.narrowing import HALF_THE_DIGITS, narrowed
from harness.conformance.passes import forward, independent
from harness.spec.architecture import Architecture


def has_architecture(architecture: Architecture | None) -> bool:
    """Applies where there is a spec to compare with."""
    return architecture is not None


def check_logits(
    case: Case,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    what: str,
    *,
    stage: str = "",
) -> None:
    """Raise Violation unless the logits of tokens [B, S] are the reference's, but for rounding."""
    model = case.model(architecture, weights)
    bound = margin(case, model, tokens, architecture=architecture, weights=weights)
    assert bound.logits is not None
    note_share(case, bound.comparable)
    logits = forward(model, tokens)
    finite(logits, what, stage=stage)
    seen = Seen[Pass]()
    with explained(seen, find_model(case)):
        seen.add(Pass(architecture, weights, tokens, logits, bound))
        agree(logits, bound.logits, bound.radius, what=what, where=bound.comparable, stage=stage)


ROWS = 16
"""Tokens of a call that fill no block."""


@conformance(
    "compute.many-tokens-equal-reference",
    clause="architecture.vocab_size",
    needs=("forward", "weights"),
    kills=("rows-beyond-a-block-lost", "token-0-is-padding", "last-token-id-unknown", "sees-few-tokens"),
    applies=has_architecture,
    costly=True,
)
def test_many_tokens_equal_reference(case: Case) -> None:
    """The logits of 630 tokens, among them every id of the vocabulary, are those of the reference."""
    architecture = case.one_layer("full")
    size = architecture.vocab_size
    # Beyond the usual blocks of 16 to 64 rows an expert, 256 tokens and 512 slots.
    order = torch.randperm(size, generator=case.generator()).repeat(630 // size + 1)
    tokens = case.drawn(order[:630].view(9, 70))
    weights = case.weights(architecture, std=0.2)

    def every_id(aside: Case) -> None:
        # Even ids have one embedding, odd ids another: what comes after it gets the same from all of them.
        table = weights["embedding.weight"].clone()
        table[::2], table[1::2] = table[0], table[1]
        model = aside.model(architecture, weights | {"embedding.weight": table})
        with torch.no_grad():
            for first in (0, 1):
                ids = torch.arange(first, size, 2)[:, None]
                logits = torch.cat([model.forward(some) for some in ids.split(ROWS)])
                apart = HALF_THE_DIGITS * float(logits.abs().amax())
                agree(logits, logits[:1].expand_as(logits), apart, what="logits of an id", stage="embed")

    def few(aside: Case) -> None:
        check_logits(aside, architecture, weights, tokens[:1, :ROWS], "logits of few tokens")

    def one_sequence(aside: Case) -> None:
        check_logits(aside, architecture, weights, tokens[:1], "logits of one sequence", stage="mask")

    with narrowed(case, every_id, few, one_sequence, otherwise="combine"):
        check_logits(case, architecture, weights, tokens, "logits of many tokens")


LAYER = re.compile(r"^layers\.\d+\.")
"""The number of a layer, in the name of a weight."""


@conformance(
    "compute.many-layers-equal-reference",
    clause="architecture.n_layers",
    needs=("forward", "weights"),
    kills=("layers-in-string-order",),
    applies=has_architecture,
    costly=True,
)
def test_many_layers_equal_reference(case: Case) -> None:
    """The logits of a model of 12 layers, numbered with one digit and two, are those of the reference."""
    architecture = case.twin(n_layers=12)
    tokens = case.tokens(3, 9)
    weights = case.weights(architecture, std=0.2)
    alike = {name: weights.get(LAYER.sub("layers.0.", name), value) for name, value in weights.items()}

    def whichever_is_which(aside: Case) -> None:
        check_logits(aside, architecture, alike, tokens, "logits of 12 layers that are alike")

    with narrowed(case, whichever_is_which, otherwise="param"):
        check_logits(case, architecture, weights, tokens, "logits of 12 layers")


@conformance(
    "compute.square-matrices-equal-reference",
    clause="architecture.ffn",
    needs=("forward", "weights"),
    kills=("dense-transposed-if-square",),
    applies=lambda architecture: architecture is not None and architecture.ffn is not None,
)
def test_square_matrices_equal_reference(case: Case) -> None:
    """So are those of a model whose dense feed-forward is as wide as its residual stream."""
    architecture = case.twin(ffn__d_ff=case.shape.d_model)
    tokens = case.tokens(3, 9)

    def not_square(aside: Case) -> None:
        check_logits(aside, case.shape, aside.weights(), tokens, "logits with matrices that are not square")

    # The same is computed with either: what differs is how weights are told from their transposes.
    with narrowed(case, not_square, otherwise="param"):
        check_logits(case, architecture, case.weights(architecture), tokens, "logits with square matrices")


def louder(weights: Mapping[str, Tensor], factor: float, *names: str) -> dict[str, Tensor]:
    """The weights, with those of exactly these names multiplied."""
    return {name: value * factor if name in names else value for name, value in weights.items()}


FAINT_OUTPUTS = (
    ".o.weight",
    ".o.bias",
    ".down.weight",
    ".down.bias",
    ".down",
    ".down_bias",
)
"""Endings of the names of all that layers write into the residual stream."""
FAINT_PROJECTIONS = (".q.weight", ".k.weight", ".q.bias", ".k.bias", ".q_a.weight", ".kv_a.weight")
"""Endings of the names of all that a norm inside of attention reads the product of."""


@conformance(
    "compute.every-norm-has-its-epsilon",
    clause="architecture.norm.eps",
    needs=("forward", "weights"),
    kills=("final-norm-eps-default", "qk-norm-eps-default", "latent-norm-eps-default"),
    applies=has_architecture,
    costly=True,
)
def test_every_norm_has_its_epsilon(case: Case) -> None:
    """Where what any norm reads is so faint that its epsilon decides, logits are those of the reference."""
    tokens = case.tokens(3, 13)

    def loud(aside: Case) -> None:
        check_logits(aside, case.shape, aside.weights(), tokens, "logits of loud input")

    # Mean squares of 1e-7 to 1e-5, around the usual epsilons, in the stream and in the latents.
    for label, endings, factor in (
        ("a faint residual stream", FAINT_OUTPUTS, 2.0**-12),
        ("faint queries, keys and latents", FAINT_PROJECTIONS, 2.0**-11),
    ):
        weights = case.weights()
        for ending in endings:
            weights = scaled(weights, ending, factor)
        if endings is FAINT_OUTPUTS:
            weights = louder(weights, 2.0**-8, "embedding.weight", "positions.weight")
        # But for their epsilon norms do not see how loud their input is.
        with narrowed(case, loud, otherwise="norm"):
            check_logits(case, case.shape, weights, tokens, f"logits of {label}")


@conformance(
    "compute.large-logits-equal-reference",
    clause="architecture",
    needs=("forward", "weights"),
    kills=("logits-clipped",),
    applies=has_architecture,
)
def test_large_logits_equal_reference(case: Case) -> None:
    """Nothing limits logits of some hundreds, nor a residual stream of some thousands."""
    large = louder(case.weights(), 2.0**10, "embedding.weight", "positions.weight")
    weights, tokens = louder(large, 2.0**6, "unembedding.weight"), case.tokens(3, 9)

    def same_stream(aside: Case) -> None:
        check_logits(aside, case.shape, large, tokens, "logits of a large residual stream")

    with narrowed(case, same_stream, otherwise="unembed"):
        check_logits(case, case.shape, weights, tokens, "large logits")


@conformance(
    "compute.earlier-calls-do-not-matter",
    clause="architecture",
    needs=("forward",),
    kills=("mask-kept-by-shape", "history-in-rope", "reseeds-the-global-generator"),
    applies=independent,
    costly=True,
)
def test_earlier_calls_do_not_matter(case: Case) -> None:
    """After calls of the same shape and of others a call gives what it gives in a fresh model."""
    first, longer = ragged(case), case.tokens(2, 41)
    tokens = case.tokens(*first.tokens.shape)
    other = first.mask.roll(1, 0)
    used, fresh = case.model(), case.model()
    bound = margin(case, fresh, tokens, mask=other)
    note_share(case, bound.comparable[other])
    with torch.random.fork_rng(devices=[]):
        # A state that no call would seed it with by chance.
        torch.default_generator.manual_seed(case.generator().initial_seed())
        before = torch.random.get_rng_state()
        forward(used, first.tokens, mask=first.mask)
        forward(used, first.tokens)
        forward(used, longer)
        after = forward(used, tokens, mask=other)
        same = torch.equal(before, torch.random.get_rng_state())
    require(same, "a call in eval mode draws from torch's global generator, or seeds it", stage="state")
    what = "logits after other calls"
    expected = forward(fresh, tokens, mask=other)
    agree(after, expected, 2 * bound.radius, what=what, where=bound.comparable & other, stage="state")
