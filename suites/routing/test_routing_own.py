"""What a router shows of itself, held against itself: no spec and no reference is needed.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.conformance import Case, Void, conformance, require
from harness.conformance.capture import may_have_experts, traces
from harness.conformance.comparison import finite, ragged
from harness.conformance.passes import independent
from harness.implementations.protocols import Routing, Unsupported
from harness.spec.architecture import Architecture

ROUNDING = 1e-5
"""Of logits and weights, relative to the largest: a hundred roundings in float32. What is nearer than that is
a tie."""


def dropless(architecture: Architecture | None) -> bool:
    """Applies to MoE without a capacity limit, under which a token may not get what it chose."""
    return may_have_experts(architecture) and independent(architecture)


def shown(case: Case) -> Iterator[tuple[Routing, Tensor]]:
    """Every MoE layer on two ragged batches: its trace and which tokens are real, [T] bool. Raises
    Unsupported if no layer shows its logits."""
    model, none = case.model(), True
    for batch in (ragged(case), ragged(case, 37)):
        for trace in traces(model, batch.tokens, mask=batch.mask, architecture=case.architecture):
            if trace.logits is not None:
                none = False
                yield trace, batch.mask.flatten()
    if none:
        raise Unsupported("the routing trace shows no logits")


@conformance(
    "routing.what-is-shown-as-logits-are-logits",
    clause="architecture.moe.router.score",
    needs=("routing",),
    kills=("router-reports-probabilities",),
    applies=may_have_experts,
)
def test_what_is_shown_as_logits_are_logits(case: Case) -> None:
    """What a router shows as its logits is no distribution: a loss would take the softmax of a softmax."""
    for trace, real in shown(case):
        assert trace.logits is not None
        logits = trace.logits[real].double()
        finite(logits, f"layer {trace.layer}: logits", stage="proj")
        if not (logits != logits[:1]).any():
            raise Void(f"layer {trace.layer}: every token has the same logits")
        sums = logits.sum(-1)
        within = bool(((logits >= 0) & (logits <= 1)).all())
        of = f"rows sum to {float(sums.amin()):.6g} to {float(sums.amax()):.6g}"
        require(
            not within,
            f"layer {trace.layer}: all of what is shown as logits is within 0 and 1, and its {of}: these are "
            "probabilities or scores",
            stage="proj",
        )
        normalised = bool((logits.logsumexp(-1).abs() < ROUNDING).all())
        require(
            not normalised or logits.shape[-1] == 1,
            f"layer {trace.layer}: what is shown as logits is the logarithm of probabilities",
            stage="proj",
        )


SCORES = {
    "logits": lambda x: x,
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "square root of softplus": lambda x: F.softplus(x).sqrt(),
}
"""What selections are made from, a bias apart; the last is DeepSeek-V4's."""


def a_bias_explains(scores: Tensor, chosen: Tensor, n_groups: int) -> bool:
    """Whether one bias for each expert makes the chosen [T, E] bool of every token its best by
    scores [T, E] plus bias, among the experts of those of n_groups groups of which it chose some.

    Each token says of a chosen i and a passed over j that b_j - b_i <= s_i - s_j: a system of differences,
    which has a solution if and only if no cycle of them has a negative sum (Bellman and Ford).
    """
    n_experts = scores.shape[-1]
    grouped = chosen.unflatten(-1, (n_groups, -1))
    open_to = grouped.any(-1, keepdim=True).expand_as(grouped).flatten(-2)
    least = torch.full((n_experts, n_experts), torch.inf, dtype=torch.float64)
    for expert in range(n_experts):
        mine = chosen[:, expert]
        ahead = (scores[:, expert, None] - scores).masked_fill(~open_to | chosen, torch.inf)[mine]
        if len(ahead):
            least[expert] = ahead.amin(0)
    least = least + ROUNDING * float(scores.abs().amax())
    for via in range(n_experts):
        least = torch.minimum(least, least[:, via, None] + least[None, via])
    return bool((least.diagonal() >= 0).all())


def explanation(logits: Tensor, chosen: Tensor) -> str | None:
    """The first of the known ways of selection under which chosen [T, E] follows from logits [T, E]."""
    n_experts = logits.shape[-1]
    for n_groups in (g for g in range(1, n_experts // 2 + 1) if n_experts % g == 0):
        for name, score in SCORES.items():
            if a_bias_explains(score(logits), chosen, n_groups):
                return name if n_groups == 1 else f"{name}, {n_groups} groups"
    return None


@conformance(
    "routing.selection-follows-from-the-logits",
    clause="architecture.moe.top_k",
    needs=("routing",),
    kills=("selects-the-worst", "selects-by-the-token-before"),
    applies=dropless,
)
def test_selection_follows_from_the_logits(case: Case) -> None:
    """The experts of every token are its best by the logits, but for one bias an expert, and groups."""
    for trace, real in shown(case):
        assert trace.logits is not None
        chosen = torch.zeros_like(trace.logits, dtype=torch.bool)
        inside = trace.indices.clamp(min=0, max=trace.logits.shape[-1] - 1)
        chosen.scatter_(-1, inside, True)
        # A slot without weight may stand for no expert at all.
        some = real if trace.weights is None else real & (trace.weights != 0).all(-1)
        if not some.any():
            raise Unsupported(f"layer {trace.layer}: no token has weight on all of its experts")
        found = explanation(trace.logits[some].double(), chosen[some])
        case.note(f"layer_{trace.layer}_selects_by", found)
        require(
            found is not None,
            f"layer {trace.layer}: no score of the logits, with one bias for each expert and with or without "
            f"groups, has the selected experts as the best of all {int(some.sum())} tokens",
            stage="select",
        )


def factors_explain(logits: Tensor, chosen: Tensor, weights: Tensor) -> bool:
    """Whether weights [T, K] of experts chosen [T, K] are a score of their logits [T, K] times one factor for
    each expert (Gemma 4's per_expert_scale) and one for each token (normalisation).

    The logarithm of two weights' ratio is then the difference of two experts' numbers, by least squares.
    """
    kept = (weights > 0).all(-1)
    if chosen.shape[1] < 2 or not kept.any():
        return False
    logits, chosen, weights = logits[kept], chosen[kept], weights[kept].log()
    hot = F.one_hot(chosen, int(chosen.max()) + 1).double()
    differences = (hot[:, 1:] - hot[:, :1]).flatten(0, 1)
    logs = {"softmax": logits, "sigmoid": F.logsigmoid(logits), "softplus": F.softplus(logits).log() / 2}
    if bool((logits > 0).all()):
        logs["shown"] = logits.log()
    for score in logs.values():
        ratios = (weights - score)[:, 1:] - (weights - score)[:, :1]
        found = torch.linalg.lstsq(differences, ratios.flatten()[:, None], driver="gelsd").solution
        # Weights in float32 of 1e-3 and more have logarithms to 1e-4.
        if float((differences @ found - ratios.flatten()[:, None]).abs().amax()) < 1e-3:
            return True
    return False


@conformance(
    "routing.weights-rise-with-the-logits",
    clause="architecture.moe.router",
    needs=("routing",),
    kills=("correction-bias-in-weights", "weights-in-ascending-order"),
    applies=dropless,
)
def test_weights_rise_with_the_logits(case: Case) -> None:
    """Weights are finite and not negative, and of a token's experts a higher logit has no lower weight.

    Unless each expert has a factor of its own, and all weights are a score of the logits times that.
    """
    some = False
    for trace, real in shown(case):
        assert trace.logits is not None
        if trace.weights is None:
            continue
        some = True
        weights = trace.weights[real].double()
        where = f"layer {trace.layer}"
        finite(weights, f"{where}: weights", stage="weigh")
        require(
            bool((weights >= 0).all()), f"{where}: a weight is {float(weights.amin()):.6g}", stage="weigh"
        )
        inside = trace.indices[real].clamp(min=0, max=trace.logits.shape[-1] - 1)
        logits = trace.logits[real].double().gather(-1, inside)
        above = logits[:, :, None] - logits[:, None, :] > ROUNDING * logits.abs().amax()
        below = weights[:, None, :] - weights[:, :, None] > ROUNDING * weights.abs().amax()
        counted = (weights[:, :, None] != 0) & (weights[:, None, :] != 0)
        wrong = above & below & counted
        if factors_explain(logits, inside, weights):
            continue
        if wrong.any():
            token, high, low = (int(i) for i in wrong.nonzero()[0])
            require(
                False,
                f"{where}: token {token} gives expert {int(inside[token, high])} with logit "
                f"{float(logits[token, high]):.6g} the weight {float(weights[token, high]):.6g}, and expert "
                f"{int(inside[token, low])} with {float(logits[token, low]):.6g} the weight "
                f"{float(weights[token, low]):.6g} ({int(wrong.any((1, 2)).sum())} of {len(weights)} tokens)",
                stage="weigh",
            )
    if not some:
        raise Unsupported("the routing trace shows no weights")


@conformance(
    "routing.balance-loss-hears-every-router",
    clause="architecture.auxiliary_loss.balance",
    needs=("auxiliary_loss", "gradients"),
    kills=("no-losses-if-every-layer-is-sparse", "balance-detached"),
    applies=lambda a: dropless(a) and (a is None or a.auxiliary_loss.balance != "none"),
)
def test_balance_loss_hears_every_router(case: Case) -> None:
    """The balance loss is positive, and has a gradient in the weights of every router."""
    model = case.model()
    batch = ragged(case)
    losses = model.auxiliary_loss(batch.tokens, mask=batch.mask)
    if "balance" not in losses:
        raise Unsupported("auxiliary_loss gives no 'balance'")
    value = losses["balance"]
    size = float(value.detach())
    require(size > 0, f"the balance loss is {size:.6g}", stage="loss")
    require(value.requires_grad, "the balance loss does not depend on the weights", stage="loss")
    gradients, heard = model.gradients(value), dict[str, bool]()
    for name in model.router_names():
        finite(gradients[name], f"gradient of {name}", stage="loss")
        # What is called a router may hold other weights too, which come after its choice.
        layer = next((part for part in name.split(".") if part.isdigit()), name)
        heard[layer] = heard.get(layer, False) or bool(gradients[name].any())
    for layer, some in heard.items():
        require(some, f"the balance loss has no gradient in the router of layer {layer}", stage="loss")
