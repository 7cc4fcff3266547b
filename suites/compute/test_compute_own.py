"""What an implementation computes in several ways, and after a pass of training: it must stay the same.

Black-box: the implementation is compared with itself, within what rounding explains twice.
Letters: B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import torch

from harness.conformance import Case, conformance, require
from harness.conformance.comparison import agree, finite, margin, note_share, ragged
from harness.conformance.gradients import language_model_loss
from harness.conformance.narrowing import Call, narrowed, parted
from harness.conformance.passes import forward, in_pieces, independent


@conformance(
    "compute.alternatives-agree",
    clause="architecture",
    needs=("forward", "alternatives"),
    kills=("idle-experts-answer", "rows-right-for-one-sequence", "weights-of-another-slot"),
    applies=independent,
    costly=True,
)
def test_alternatives_agree(case: Case) -> None:
    """Every way to compute a model gives the same logits.

    With and without padding, of one token and of many, in one pass and in steps on a cache.
    """
    model = case.model()
    batch, many, one = ragged(case, 19), case.tokens(2, 23), case.tokens(1, 1)
    empty = torch.cat([batch.mask, torch.zeros_like(batch.mask[:1])])
    beside = torch.cat([batch.tokens, batch.tokens[:1]])
    compare = [
        ("a ragged batch", batch.tokens, batch.mask),
        ("two sequences", many, None),
        ("two sequences and a mask without padding", many, torch.ones_like(many, dtype=torch.bool)),
        ("one token", one, None),
        ("a batch with a sequence of padding alone", beside, empty),
    ]
    others = dict(model.alternatives())
    case.note("alternatives", sorted(others))
    for label, tokens, mask in compare:
        bound = margin(case, model, tokens, mask=mask)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        note_share(case, bound.comparable[real])
        expected, compared = forward(model, tokens, mask=mask), bound.comparable & real
        call = Call(tokens, compared.flatten().nonzero()[:, 0], mask)
        for way, other in others.items():
            what = f"logits of {label} with {way}"
            found = forward(other, tokens, mask=mask)
            finite(found, what, where=real)
            with narrowed(case, parted(case, model, [(call, call)], other=other), otherwise=""):
                agree(found, expected, 2 * bound.radius, what=what, where=compared)
    bound = margin(case, model, many)
    expected = forward(model, many)
    for way, other in others.items():
        if "cache" not in other.capabilities:
            continue
        pieces = in_pieces(other, many, (13, 1, 9))
        what = f"logits in pieces of 13, 1 and 9 tokens with {way}"
        agree(pieces, expected, 2 * bound.radius, what=what, where=bound.comparable)


@conformance(
    "compute.training-leaves-eval-as-it-was",
    clause="architecture",
    needs=("forward", "train", "gradients"),
    kills=("training-wears-off-slowly",),
    applies=independent,
)
def test_training_leaves_eval_as_it_was(case: Case) -> None:
    """After forward and backward passes of training that change no weight, eval gives what it gave before."""
    model = case.model()
    batch = ragged(case)
    bound = margin(case, model, batch.tokens, mask=batch.mask)
    note_share(case, bound.comparable[batch.mask])
    before = forward(model, batch.tokens, mask=batch.mask)
    weights = {name: tensor.detach().clone() for name, tensor in model.parameters().items()}
    with model.training():
        for _ in range(2):
            logits = model.forward(batch.tokens, mask=batch.mask)
            model.gradients(language_model_loss(logits, batch))
    for name, tensor in model.parameters().items():
        require(torch.equal(tensor, weights[name]), f"{name} has changed without an update", stage="state")
    after = forward(model, batch.tokens, mask=batch.mask)
    where = bound.comparable & batch.mask
    agree(after, before, 2 * bound.radius, what="logits after training", where=where, stage="state")
