"""What must not matter to a token: its neighbours in the batch, its place, padding, idle experts, history.

Black-box: the implementation is compared with itself, within what rounding explains twice.
Letters: B sequences, S tokens per sequence, T = B * S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, conformance, require
from harness.conformance.capture import may_have_experts, traces
from harness.conformance.comparison import agree, finite, margin, note_share, ragged
from harness.conformance.narrowing import Call, narrowed, parted
from harness.conformance.passes import forward, independent
from harness.implementations.protocols import Unsupported
from harness.spec.architecture import Architecture


def dropless(architecture: Architecture | None) -> bool:
    """Applies to MoE without a capacity limit, under which tokens do compete for places."""
    return may_have_experts(architecture) and independent(architecture)


ONE = torch.tensor([0])
"""The one token of a call of one."""


@conformance(
    "routing.token-order-is-irrelevant",
    clause="architecture.moe",
    needs=("forward", "routing"),
    kills=(
        "token-order-matters",
        "single-token-not-normalised",
        "places-kept-without-drops",
    ),
    applies=dropless,
    costly=True,
)
def test_token_order_is_irrelevant(case: Case) -> None:
    """T sequences of one token, reordered, give the same logits, reordered; and one alone gives its own."""
    model = case.model()
    tokens = case.tokens(29, 1)
    order = case.drawn(torch.randperm(len(tokens), generator=case.generator()))
    bound = margin(case, model, tokens)
    note_share(case, bound.comparable)
    before, after = forward(model, tokens)[order], forward(model, tokens[order])
    moved = bound.pick(order)
    rows = moved.comparable[:, 0].nonzero()[:, 0]
    reordered = Call(tokens, order[rows]), Call(tokens[order], rows)
    with narrowed(case, parted(case, model, [reordered]), otherwise=""):
        agree(after, before, 2 * moved.radius, what="logits after reordering", where=moved.comparable)
    first = bound.pick(slice(0, 4))
    # One token at a time, as a decode step of one sequence is: many engines have a path of its own for it.
    alone = torch.cat([forward(model, token[None]) for token in tokens[:4]])
    before = forward(model, tokens)[:4]
    rows = first.comparable[:, 0].nonzero()[:, 0]
    own = [(Call(tokens, i[None]), Call(tokens[i][None], ONE)) for i in rows]
    with narrowed(case, parted(case, model, own), otherwise=""):
        agree(alone, before, 2 * first.radius, what="logits of a token alone", where=first.comparable)


@conformance(
    "routing.batch-is-irrelevant",
    clause="architecture.moe",
    needs=("forward", "routing"),
    kills=("softmax-over-tokens", "rows-right-for-one-sequence", "combines-over-the-batch"),
    applies=dropless,
)
def test_batch_is_irrelevant(case: Case) -> None:
    """A sequence alone gives the logits that it gives in a ragged batch."""
    model = case.model()
    batch = ragged(case)
    bound = margin(case, model, batch.tokens, mask=batch.mask)
    note_share(case, bound.comparable[batch.mask])
    together = forward(model, batch.tokens, mask=batch.mask)
    for row, real in enumerate(batch.mask):
        alone = forward(model, batch.solo(row))[0]
        own = bound.pick((row, real))
        if not own.comparable.any():
            continue  # not all of them: note_share has seen to that
        what = f"logits of sequence {row} alone"
        solo = batch.solo(row)
        rows = own.comparable.nonzero()[:, 0]
        at = row * batch.mask.shape[1] + real.nonzero()[rows, 0]
        pair = Call(batch.tokens, at, batch.mask), Call(solo, rows)
        with narrowed(case, parted(case, model, [pair]), otherwise=""):
            agree(alone, together[row][real], 2 * own.radius, what=what, where=own.comparable)


@conformance(
    "routing.padding-is-irrelevant",
    clause="architecture.moe",
    needs=("forward", "routing"),
    kills=("padding-is-attended", "padding-poisons"),
    applies=dropless,
)
def test_padding_is_irrelevant(case: Case) -> None:
    """Other ids at padding, and more padding on either side, change nothing for real tokens."""
    model = case.model()
    batch = ragged(case)
    other = torch.where(batch.mask, batch.tokens, case.tokens(*batch.tokens.shape))
    extra = case.tokens(len(other), 5)
    bound = margin(case, model, batch.tokens, mask=batch.mask)
    note_share(case, bound.comparable[batch.mask])
    before = forward(model, batch.tokens, mask=batch.mask)
    finite(before, "logits at real tokens", where=batch.mask)
    compared = bound.comparable & batch.mask
    after = forward(model, other, mask=batch.mask)
    rows = compared.flatten().nonzero()[:, 0]
    pair = Call(batch.tokens, rows, batch.mask), Call(other, rows, batch.mask)
    # Only attention leads from one token to the input of another's router.
    with narrowed(case, parted(case, model, [pair], between="mask"), otherwise=""):
        agree(after, before, 2 * bound.radius, what="logits with other ids at padding", where=compared)
    wider = torch.cat([extra[:, :2], other, extra[:, 2:]], dim=1)
    mask = torch.nn.functional.pad(batch.mask, (2, 3))
    after = forward(model, wider, mask=mask)[:, 2:-3]
    agree(after, before, 2 * bound.radius, what="logits with more padding", where=compared)


@conformance(
    "routing.idle-experts-are-harmless",
    clause="architecture.moe.n_experts",
    needs=("forward", "routing"),
    kills=(
        "idle-experts-answer",
        "idle-experts-poison",
        "experts-numbered-among-the-busy",
    ),
    applies=dropless,
)
def test_idle_experts_are_harmless(case: Case) -> None:
    """With one token most experts compute nothing, and its logits are those in a full batch."""
    model = case.model()
    few, many = case.tokens(1, 1), case.tokens(7, 1)
    batch = torch.cat([few, many])
    bound = margin(case, model, batch)
    note_share(case, bound.comparable[:1])
    poison()
    alone = forward(model, few)
    found = traces(model, few, architecture=case.architecture)
    n_experts = max(x.shape[-1] for t in found for x in (t.logits, t.scores) if x is not None)
    idle = [n_experts - len(t.indices.unique()) for t in found]
    case.note("idle_experts", idle)
    if min(idle) == 0:
        raise Unsupported(f"one token goes to all {n_experts} experts: none can be idle")
    own = bound.pick(slice(0, 1))
    what = "logits of one token alone"
    with narrowed(case, parted(case, model, [(Call(batch, ONE), Call(few, ONE))]), otherwise=""):
        finite(alone, what)
        agree(alone, forward(model, batch)[:1], 2 * own.radius, what=what, where=own.comparable)


def poison() -> None:
    """Leave NaN in freed memory of many sizes, where an uninitialised buffer may find it."""
    for size in (64, 256, 1024, 4096, 16384, 65536, 262144):
        for _ in range(4):
            torch.full((size,), torch.nan)


@conformance(
    "routing.calls-leave-no-trace",
    clause="architecture",
    needs=("forward", "routing", "parameters"),
    kills=(
        "jitter-in-eval",
        "bias-updated-in-eval",
        "input-overwritten",
        "history-in-rope",
        "losses-accumulate",
    ),
    applies=may_have_experts,
    costly=True,
)
def test_calls_leave_no_trace(case: Case) -> None:
    """A call gives the same after other calls, and changes neither its arguments nor the weights."""
    model = case.model()
    batch = ragged(case)
    longer = case.tokens(2, 41)
    bound = margin(case, model, batch.tokens, mask=batch.mask)
    note_share(case, bound.comparable[batch.mask])
    weights = {name: tensor.detach().clone() for name, tensor in model.parameters().items()}
    tokens, mask = batch.tokens.clone(), batch.mask.clone()
    before = forward(model, tokens, mask=mask)
    losses = _losses(model, batch.tokens, batch.mask)
    forward(model, longer)
    traces(model, longer)
    again = forward(model, tokens, mask=mask)
    require(torch.equal(tokens, batch.tokens), "the tokens that were passed in have changed", stage="state")
    require(torch.equal(mask, batch.mask), "the mask that was passed in has changed", stage="state")
    for name, tensor in model.parameters().items():
        require(torch.equal(tensor, weights[name]), f"{name} has changed in eval mode", stage="state")
    agree(
        again,
        before,
        2 * bound.radius,
        what="logits of the same call again",
        stage="state",
        where=bound.comparable & batch.mask,
    )
    for kind, value in _losses(model, batch.tokens, batch.mask).items():
        # Both calls round alike but for the order of sums: 39 terms of about 1 in float32.
        agree(
            value,
            losses[kind],
            1e-4 * (1 + abs(float(losses[kind]))),
            what=f"{kind} loss of the same call again",
            stage="state",
        )


def _losses(model: Any, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    if "auxiliary_loss" not in model.capabilities:
        return {}
    with torch.no_grad():
        return dict(model.auxiliary_loss(tokens, mask=mask))
