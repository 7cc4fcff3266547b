"""What a step of training adds up: micro-batches, scaled losses, activations computed twice, padding.

Letters: B sequences, S tokens per sequence, T real tokens.

Over micro-batches these losses are sums, each with its weight: the language-model loss summed over tokens
(1), the z-loss, a mean over tokens (real tokens of the part over T), and the balance loss "sequence", a mean
over sequences (sequences over B). "switch" and "huggingface" multiply two means of the batch: of those no sum
of parts is the whole, and they are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, Void, conformance, require
from harness.conformance.case import replaced
from harness.conformance.comparison import Ragged, agree, margin, ragged
from harness.conformance.narrowing import HALF_THE_DIGITS
from harness.conformance.passes import independent
from harness.conformance.training import FACTOR, alike, recomputing, same_tensors, summed_loss
from harness.spec.architecture import Architecture

NEEDS = ("train", "gradients", "forward", "weights")
Loss = Callable[[Any, Ragged], Tensor]


def dropless(architecture: Architecture | None) -> bool:
    """Applies where a token does not compete with others for an expert's places."""
    return architecture is not None and independent(architecture)


def losses_of(case: Case, model: Any) -> dict[str, Loss]:
    """The losses that the model has, by name."""
    found: dict[str, Loss] = {
        "language-model": lambda model, batch: summed_loss(
            model.forward(batch.tokens, mask=batch.mask), batch
        )
    }
    if "auxiliary_loss" in model.capabilities:
        tokens = case.tokens(1, 2)
        with torch.no_grad():
            kinds = sorted(model.auxiliary_loss(tokens))
        for kind in kinds:
            found[kind] = lambda model, batch, kind=kind: model.auxiliary_loss(  # type: ignore[misc]
                batch.tokens, mask=batch.mask
            )[kind].reshape(())
    return found


def settled(case: Case, model: Any, length: int = 11) -> Ragged:
    """Five sequences, padded on all sides, of which rounding can change no token's experts."""
    for _ in range(10):
        batch = ragged(case, length, pads=((0, 4), (3, 0), (1, 2), (0, 0), (0, 7)))
        bound = margin(case, model, batch.tokens, mask=batch.mask)
        if bool(bound.comparable[batch.mask].all()):
            return batch
    raise Void("ten batches in a row have a token whose experts rounding may change")


def learned(model: Any, loss: Loss, batch: Ragged) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss in training mode, and its gradients by name."""
    with model.training():
        value = loss(model, batch)
        return value.detach().double(), {n: g.double() for n, g in model.gradients(value).items()}


def share(case: Case, kind: str, part: Ragged, whole: Ragged) -> float | None:
    """The weight of a part of the batch in a loss; None where the loss is no sum over parts."""
    match kind:
        case "language-model":
            return 1.0
        case "z":
            return float(part.mask.sum()) / float(whole.mask.sum())
        case "balance" if case.shape.auxiliary_loss.balance == "sequence":
            return len(part.mask) / len(whole.mask)
        case _:
            return None


@conformance(
    "training.micro-batches-add-up",
    clause="architecture.auxiliary_loss",
    needs=NEEDS,
    kills=(
        "balance-shrinks-with-the-batch",
        "balance-gradient-scaled-by-the-batch",
        "balance-grows-with-the-batch",
        "z-gradient-grows-with-tokens",
        "router-learns-from-one-shard",
    ),
    applies=dropless,
    costly=True,
)
def test_micro_batches_add_up(case: Case) -> None:
    """The gradient of a batch is the sum of its parts', each loss with the weight of its convention."""
    model = case.model()
    batch = settled(case, model)
    left_out = []
    for kind, loss in losses_of(case, model).items():
        for cut in (1, 3):
            parts = [Ragged(batch.tokens[rows], batch.mask[rows]) for rows in (slice(cut), slice(cut, None))]
            shares = [w for part in parts if (w := share(case, kind, part, batch)) is not None]
            if not shares:
                left_out.append(kind)
                break
            value, whole = learned(model, loss, batch)
            found = list(zip(shares, (learned(model, loss, part) for part in parts), strict=True))
            total = torch.stack([w * v for w, (v, _) in found]).sum()
            what = f"{kind} loss of {cut} and {len(batch.mask) - cut} sequences"
            agree(total, value, HALF_THE_DIGITS * float(value.abs()), what=what, stage="loss")
            summed = {n: torch.stack([w * g[n] for w, (_, g) in found]).sum(0) for n in whole}
            same_tensors(summed, whole, f"gradient of the {what} in", "gradient")
    if left_out:
        case.note("no_sum_over_parts", left_out)


@conformance(
    "training.a-scaled-loss-scales-its-gradient",
    clause="architecture",
    needs=NEEDS,
    kills=("gradients-ignore-the-scale",),
    applies=dropless,
    costly=True,
)
def test_a_scaled_loss_scales_its_gradient(case: Case) -> None:
    """Three times a loss has three times its gradient, and a sum of losses the sum of theirs."""
    model = case.model()
    batch = ragged(case)
    losses = losses_of(case, model)
    found = {kind: learned(model, loss, batch)[1] for kind, loss in losses.items()}
    for kind, loss in losses.items():
        _, tripled = learned(model, lambda m, b, loss=loss: 3 * loss(m, b), batch)  # type: ignore[misc]
        expected = {name: 3 * g for name, g in found[kind].items()}
        same_tensors(tripled, expected, f"gradient of three times the {kind} loss in", "gradient")
    _, together = learned(model, lambda m, b: sum(loss(m, b) for loss in losses.values()), batch)  # type: ignore[arg-type,return-value]
    total = {name: torch.stack([g[name] for g in found.values()]).sum(0) for name in together}
    same_tensors(together, total, "gradient of the sum of all losses in", "gradient")


@conformance(
    "training.padding-teaches-nothing",
    clause="architecture",
    needs=NEEDS,
    kills=("balance-counts-padding", "padding-is-attended"),
    applies=dropless,
    costly=True,
)
def test_padding_teaches_nothing(case: Case) -> None:
    """Other ids at padding change no loss and no gradient: what no real token reaches learns nothing."""
    model = case.model()
    batch = settled(case, model)
    other = Ragged(torch.where(batch.mask, batch.tokens, case.tokens(*batch.tokens.shape)), batch.mask)
    for kind, loss in losses_of(case, model).items():
        (value, before), (found, after) = (learned(model, loss, one) for one in (batch, other))
        # No loss of real tokens counts others: only attention leads from those to their logits.
        what, stage = f"{kind} loss with other ids at padding", "mask" if kind == "language-model" else "loss"
        agree(found, value, HALF_THE_DIGITS * float(value.abs()), what=what, stage=stage)
        same_tensors(after, before, f"with other ids at padding, gradient of the {kind} loss in", "gradient")


@conformance(
    "training.a-pass-leaves-no-trace",
    clause="architecture",
    needs=NEEDS,
    kills=("losses-remember-training",),
    applies=dropless,
    costly=True,
)
def test_a_pass_leaves_no_trace(case: Case) -> None:
    """A pass in training has the losses and gradients that it has after others, and in eval mode."""
    model = case.model()
    batch, longer = ragged(case), ragged(case, 21)
    losses = losses_of(case, model)
    for kind, loss in losses.items():
        value, before = learned(model, loss, batch)
        learned(model, loss, longer)
        again, after = learned(model, loss, batch)
        with torch.no_grad():
            quiet = loss(model, batch).double()
        for label, found in (("a second time", again), ("in eval mode", quiet)):
            what = f"{kind} loss {label}"
            agree(found, value, HALF_THE_DIGITS * float(value.abs()), what=what, stage="state")
        same_tensors(after, before, f"a second time, gradient of the {kind} loss in", "state")


@conformance(
    "training.recomputation-changes-nothing",
    clause="architecture",
    needs=(*NEEDS, "recompute"),
    kills=("losses-counted-again", "checkpointing-cuts-the-graph", "recomputation-draws-new-noise"),
    applies=dropless,
    costly=True,
)
def test_recomputation_changes_nothing(case: Case) -> None:
    """Losses and gradients are the same where activations are computed twice, with noise and without."""
    quiet = case.shape
    noisy = []
    if quiet.moe is not None:
        # Every token goes to all experts, so that noise moves weights and no selection.
        everywhere = {
            "moe__top_k": quiet.moe.n_experts,
            "moe__router__n_groups": 1,
            "moe__router__topk_groups": 1,
        }
        noisy = [replaced(quiet, everywhere | {"moe__router__jitter": FACTOR})]
    for architecture in (quiet, *noisy):
        batch = ragged(case)
        names = list(losses_of(case, case.model(architecture, case.weights(architecture))))

        def passes(model: Any, *, again: bool, batch: Ragged = batch) -> list[tuple[Tensor, Any]]:
            with recomputing(model, again):
                return [learned(model, loss, batch) for loss in losses_of(case, model).values()]

        once, twice, repeated = (
            alike(case, architecture, lambda model, again=again: passes(model, again=again))  # type: ignore[misc]
            for again in (False, False, True)
        )
        for kind, (value, gradients), (second, _), (found, again) in zip(
            names, once, twice, repeated, strict=True
        ):
            if not torch.equal(value, second):
                require(architecture is not quiet, f"two fresh models differ in the {kind} loss")
                case.note("noise", "cannot be drawn a second time")
                break
            what = f"{kind} loss, computed a second time"
            agree(found, value, HALF_THE_DIGITS * float(value.abs()), what=what, stage="recompute")
            same_tensors(again, gradients, f"gradient of the {what}, in", "recompute")
