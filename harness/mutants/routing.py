"""Defects of the router: projection, score, selection, combine weights.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Method, mutant, patched, routers
from harness.reference import ReferenceModel
from harness.reference.router import Routed, top
from harness.spec.architecture import Architecture, Router


def _router(holds: Callable[[Router], bool]) -> Callable[[Architecture], bool]:
    """Applies to architectures whose router satisfies `holds`."""
    return lambda architecture: architecture.moe is not None and holds(architecture.moe.router)


BEFORE = _router(lambda r: r.order == "before_topk")
AFTER = _router(lambda r: r.order == "after_topk")
CORRECTED = _router(lambda r: r.correction_bias)
GROUPED = _router(lambda r: r.n_groups > 1 and r.topk_groups < r.n_groups)
BIASED = _router(lambda r: r.bias)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@mutant(routers, "project", stage="proj", origin="torchtitan#2319", spec="gpt-oss-20b", applies=BIASED)
def router_bias_unused(router: Any, _: Method) -> Method:
    """The router's bias is loaded and not added."""
    return lambda x: x.to(router.dtype) @ router.weight.to(router.dtype).T


@patched(stage="param", origin="torchtitan#2319", spec="gpt-oss-20b", applies=BIASED)
def router_bias_dropped(model: ReferenceModel) -> None:
    """The router's bias does not exist and the checkpoint's is ignored."""
    for router in routers(model):
        del router.bias
        router.bias = None
    original = model.load_weights

    def load(values: Any) -> None:
        original({name: value for name, value in values.items() if not name.endswith("router.bias")})

    model.load_weights = load  # type: ignore[method-assign]


@mutant(routers, "project", stage="proj", origin="sglang#38719")
def router_in_bfloat16(_: Any, project: Method) -> Method:
    """Logits are cast to bfloat16."""
    return lambda x: _rounded(project(x))


@mutant(routers, "forward", stage="proj", origin="transformers#45120")
def router_reports_probabilities(_: Any, forward: Method) -> Method:
    """What is returned as logits are probabilities."""

    def changed(x: Tensor, real: Tensor) -> Routed:
        routed: Routed = forward(x, real)
        shown = routed.logits.softmax(-1)
        return Routed(shown, routed.scores, routed.selected, routed.indices, routed.weights)

    return changed


@mutant(
    routers,
    "score",
    stage="score",
    origin="DeepSpeed#2110",
    spec="olmoe-1b-7b",
    applies=_router(lambda r: r.score == "softmax" and r.order == "before_topk"),
)
def softmax_over_tokens(_: Any, __: Method) -> Method:
    """Softmax over the tokens in place of the experts."""
    return lambda logits: logits.softmax(0)


@mutant(routers, "score", stage="score", origin="Megatron-LM#2765", spec="deepseek-v3")
def scores_in_bfloat16(_: Any, score: Method) -> Method:
    """Scores are computed in bfloat16."""
    return lambda logits: _rounded(score(logits))


@mutant(routers, "score", stage="score", origin="Megatron-LM#2765", spec="deepseek-v3")
def scores_in_model_dtype(router: Any, score: Method) -> Method:
    """Scores are computed in the model's dtype, whatever the router's is."""
    return lambda logits: score(logits.to(router.weight.dtype)).to(logits.dtype)


@mutant(routers, "select", stage="select", origin="sglang-jax#698", spec="olmoe-1b-7b")
def selection_in_model_dtype(router: Any, select: Method) -> Method:
    """Top-k of scores in the model's dtype, whatever the router's is."""

    def changed(scores: Tensor, logits: Tensor) -> Any:
        narrow = router.weight.dtype
        return select(scores.to(narrow).to(scores.dtype), logits.to(narrow).to(logits.dtype))

    return changed


@mutant(routers, "score", stage="score", origin="transformers#45120", spec="olmoe-1b-7b", applies=BEFORE)
def double_softmax(_: Any, score: Method) -> Method:
    """The score function is applied twice."""
    return lambda logits: score(score(logits))


@mutant(routers, "select", stage="select", origin="sglang-jax#698")
def selection_in_bfloat16(_: Any, select: Method) -> Method:
    """Top-k of scores that were cast to bfloat16."""
    return lambda scores, logits: select(_rounded(scores), _rounded(logits))


@mutant(routers, "select", stage="select")
def duplicate_experts(_: Any, select: Method) -> Method:
    """Some tokens go to one expert twice."""

    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        selected: Tensor = select(scores, logits)
        # Of every seventh token, so that most tokens are right.
        selected[::7, -1] = selected[::7, 0]
        return selected

    return changed


@mutant(routers, "select", stage="select")
def canary(_: Any, select: Method) -> Method:
    """Every slot of a token goes to one expert."""

    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        selected: Tensor = select(scores, logits)
        return selected[:, :1].expand_as(selected).contiguous()

    return changed


@mutant(
    routers,
    "select",
    stage="select",
    origin="MoLE#7",
    spec="qwen3-30b-a3b",
    applies=_router(lambda r: not r.correction_bias),
)
def top_k_constant(router: Any, _: Method) -> Method:
    """K is 2 whatever the configuration says."""

    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        return top(logits if router.router.order == "after_topk" else scores, 2)

    return changed


@mutant(routers, "select", stage="select")
def selects_the_worst(_: Any, select: Method) -> Method:
    """The lowest scores win."""
    return lambda scores, logits: select(-scores, -logits)


@mutant(routers, "select", stage="select", origin="vllm#13474", spec="deepseek-v3", applies=GROUPED)
def masked_groups_at_zero(router: Any, _: Method) -> Method:
    """Experts of excluded groups stay in the running with 0."""

    def changed(scores: Tensor, _logits: Tensor) -> Tensor:
        choice = scores if router.correction_bias is None else scores + router.correction_bias
        return top(choice.masked_fill(~router.in_best_groups(choice), 0), router.top_k)

    return changed


@mutant(routers, "in_best_groups", stage="select", origin="vllm#13474", spec="deepseek-v3", applies=GROUPED)
def group_score_max(router: Any, _: Method) -> Method:
    """A group is worth its best expert in place of its best two."""

    def changed(choice: Tensor) -> Tensor:
        grouped = choice.unflatten(-1, (router.router.n_groups, -1))
        best = top(grouped.amax(-1), router.router.topk_groups)
        chosen = torch.zeros(grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        return chosen[..., None].expand_as(grouped).flatten(-2)

    return changed


@mutant(
    routers, "in_best_groups", stage="select", origin="Megatron-LM#2801", spec="deepseek-v3", applies=GROUPED
)
def groups_ignored(_: Any, __: Method) -> Method:
    """Every group is allowed."""
    return lambda choice: torch.ones_like(choice, dtype=torch.bool)


@mutant(routers, "select", stage="select", origin="mlx-lm#1354", spec="deepseek-v3", applies=CORRECTED)
def correction_bias_ignored(router: Any, select: Method) -> Method:
    """The correction bias is not added."""

    def changed(scores: Tensor, logits: Tensor) -> Any:
        return select(scores - router.correction_bias, logits)

    return changed


@mutant(
    routers,
    "select",
    stage="select",
    origin="vllm#54403",
    applies=_router(lambda r: r.n_groups == 1 and not r.correction_bias),
)
def ties_at_random(_: Any, select: Method) -> Method:
    """Equal logits are told apart differently on each run."""
    generator = torch.Generator().manual_seed(0)

    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        # Experts are taken in a new order each time, so only exact ties are resolved otherwise.
        order = torch.randperm(scores.shape[-1], generator=generator)
        return order[select(scores[:, order], logits[:, order])]

    return changed


@mutant(routers, "select", stage="select", origin="vllm#55514", applies=_router(lambda r: r.n_groups == 1))
def ties_select_one(router: Any, _: Method) -> Method:
    """Of equal logits only the first can be selected."""

    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        left = (logits if router.router.order == "after_topk" else scores).clone()
        if router.correction_bias is not None:
            left = left + router.correction_bias
        chosen = []
        for _slot in range(router.top_k):
            best = left.amax(-1, keepdim=True)
            chosen.append(left.argmax(-1))
            left = left.masked_fill(left == best, -torch.inf)
        return torch.stack(chosen, dim=-1)

    return changed


@mutant(routers, "weigh", stage="weigh", origin="HabanaAI/vllm-fork#1852", spec="gpt-oss-20b", applies=AFTER)
def softmax_before_topk(router: Any, _: Method) -> Method:
    """Softmax over all experts and then top-k, not normalised."""
    return lambda scores, _logits, selected: scores.gather(-1, selected) * router.router.scaling_factor


@mutant(
    routers,
    "weigh",
    stage="weigh",
    origin="mlxcel#391",
    spec="olmoe-1b-7b",
    applies=_router(lambda r: not r.normalise and r.order == "before_topk"),
)
def always_normalised(_: Any, weigh: Method) -> Method:
    """Weights are divided by their sum though the configuration says no."""

    def changed(scores: Tensor, logits: Tensor, selected: Tensor) -> Tensor:
        weights: Tensor = weigh(scores, logits, selected)
        return weights / weights.sum(-1, keepdim=True)

    return changed


@mutant(
    routers,
    "weigh",
    stage="weigh",
    origin="torchtitan#1448",
    spec="deepseek-v3",
    applies=_router(lambda r: r.normalise and r.order == "before_topk"),
)
def never_normalised(router: Any, _: Method) -> Method:
    """Weights are not divided by their sum."""

    def changed(scores: Tensor, _logits: Tensor, selected: Tensor) -> Any:
        return scores.gather(-1, selected) * router.router.scaling_factor

    return changed


@mutant(
    routers,
    "weigh",
    stage="weigh",
    spec="deepseek-v3",
    applies=_router(lambda r: r.normalise and r.order == "before_topk"),
)
def small_sums_not_normalised(router: Any, _: Method) -> Method:
    """The sum that weights are divided by is kept from being small."""

    def changed(scores: Tensor, _logits: Tensor, selected: Tensor) -> Any:
        weights = scores.gather(-1, selected)
        total = weights.sum(-1, keepdim=True).clamp(min=1e-3)
        return weights / total * router.router.scaling_factor

    return changed


@mutant(
    routers,
    "weigh",
    stage="weigh",
    origin="Megatron-LM#894",
    spec="olmoe-1b-7b",
    applies=_router(lambda r: not r.normalise and r.order == "before_topk"),
)
def softmax_of_the_selected(router: Any, _: Method) -> Method:
    """Softmax after top-k: at K = 1 the weight is always 1."""

    def changed(_scores: Tensor, logits: Tensor, selected: Tensor) -> Any:
        return logits.gather(-1, selected).softmax(-1) * router.router.scaling_factor

    return changed


@mutant(routers, "weigh", stage="weigh", origin="vllm#12002", spec="deepseek-v3", applies=CORRECTED)
def correction_bias_in_weights(router: Any, weigh: Method) -> Method:
    """Combine weights are taken from the biased scores."""
    return lambda scores, logits, selected: weigh(scores + router.correction_bias, logits, selected)


@mutant(routers, "weigh", stage="weigh", origin="vllm#24119", spec="deepseek-v3")
def scaling_twice(router: Any, weigh: Method) -> Method:
    """The scaling factor is applied twice."""
    return lambda *stages: weigh(*stages) * router.router.scaling_factor


@mutant(routers, "weigh", stage="weigh", origin="sglang-jax#1282", spec="olmoe-1b-7b")
def scaling_only_if_normalised(router: Any, weigh: Method) -> Method:
    """Weights that are not normalised are not scaled either."""
    factor = 1.0 if router.router.normalise else router.router.scaling_factor
    return lambda *stages: weigh(*stages) / factor


@mutant(
    routers,
    "weigh",
    stage="weigh",
    origin="minimind#858",
    spec="olmoe-1b-7b",
    applies=_router(lambda r: not r.normalise and r.order == "before_topk"),
)
def top_1_normalised(router: Any, weigh: Method) -> Method:
    """At K = 1 the weight is divided by itself."""

    def changed(scores: Tensor, logits: Tensor, selected: Tensor) -> Tensor:
        weights: Tensor = weigh(scores, logits, selected)
        return weights / weights.sum(-1, keepdim=True) if router.top_k == 1 else weights

    return changed


@mutant(routers, "weigh", stage="gradient", origin="Megatron-LM 254c87400f")
def router_gradient_lost(_: Any, weigh: Method) -> Method:
    """Combine weights are gathered without gradient."""
    return lambda *stages: weigh(*stages).detach()


@mutant(routers, "forward", stage="state", origin="transformers#28077")
def jitter_in_eval(_: Any, forward: Method) -> Method:
    """The router's input is jittered in eval mode."""
    generator = torch.Generator().manual_seed(0)

    def changed(x: Tensor, real: Tensor) -> Any:
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 0.02 - 0.01
        return forward(x * (1 + noise), real)

    return changed


@mutant(routers, "forward", stage="state", origin="torchtitan#1226", spec="deepseek-v3", applies=CORRECTED)
def bias_updated_in_eval(router: Any, forward: Method) -> Method:
    """Eval calls update the correction bias."""

    def changed(x: Tensor, real: Tensor) -> Any:
        routed = forward(x, real)
        load = torch.bincount(routed.selected.flatten(), minlength=router.n_experts).float()
        with torch.no_grad():
            router.correction_bias += 0.001 * torch.sign(load.mean() - load)
        return routed

    return changed
