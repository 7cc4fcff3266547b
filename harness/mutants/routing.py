"""Defects of the router: projection, score, selection, combine weights, capacity.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Mutant, instead, routers
from harness.reference import ReferenceModel
from harness.reference.router import Routed, top
from harness.spec.architecture import Architecture, Router

Method = Callable[..., Any]


def _router(holds: Callable[[Router], bool]) -> Callable[[Architecture], bool]:
    """Applies to architectures whose router satisfies `holds`."""
    return lambda architecture: architecture.moe is not None and holds(architecture.moe.router)


BEFORE = _router(lambda r: r.order == "before_topk")
AFTER = _router(lambda r: r.order == "after_topk")
CORRECTED = _router(lambda r: r.correction_bias)
GROUPED = _router(lambda r: 1 < r.n_groups and r.topk_groups < r.n_groups)
BIASED = _router(lambda r: r.bias)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def _project_without_bias(router: Any, _: Method) -> Method:
    return lambda x: x.to(router.dtype) @ router.weight.to(router.dtype).T


def _bias_not_created(model: ReferenceModel) -> None:
    for router in routers(model):
        del router.bias
        router.bias = None
    original = model.load_weights

    def load(values: Any) -> None:
        original({name: value for name, value in values.items() if not name.endswith("router.bias")})

    model.load_weights = load  # type: ignore[method-assign]


def _project_in_bfloat16(router: Any, project: Method) -> Method:
    return lambda x: _rounded(project(x))


def _report_probabilities(moe: Any, forward: Method) -> Method:
    def changed(x: Tensor, real: Tensor) -> Routed:
        routed: Routed = forward(x, real)
        shown = routed.logits.softmax(-1)
        return Routed(shown, routed.scores, routed.selected, routed.indices, routed.weights)

    return changed


def _softmax_over_tokens(_: Any, __: Method) -> Method:
    return lambda logits: logits.softmax(0)


def _double_softmax(_: Any, score: Method) -> Method:
    return lambda logits: score(score(logits))


def _select_in_bfloat16(_: Any, select: Method) -> Method:
    return lambda scores, logits: select(_rounded(scores), _rounded(logits))


def _duplicate(_: Any, select: Method) -> Method:
    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        selected: Tensor = select(scores, logits)
        # Of every seventh token, so that most tokens are right.
        selected[::7, -1] = selected[::7, 0]
        return selected

    return changed


def _canary(_: Any, select: Method) -> Method:
    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        selected: Tensor = select(scores, logits)
        return selected[:, :1].expand_as(selected).contiguous()

    return changed


def _constant_top_k(router: Any, _: Method) -> Method:
    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        return top(logits if router.router.order == "after_topk" else scores, 2)

    return changed


def _worst(_: Any, select: Method) -> Method:
    return lambda scores, logits: select(-scores, -logits)


def _masked_at_zero(router: Any, _: Method) -> Method:
    def changed(scores: Tensor, _logits: Tensor) -> Tensor:
        choice = scores if router.correction_bias is None else scores + router.correction_bias
        return top(choice.masked_fill(~router.in_best_groups(choice), 0), router.top_k)

    return changed


def _group_max(router: Any, _: Method) -> Method:
    def changed(choice: Tensor) -> Tensor:
        grouped = choice.unflatten(-1, (router.router.n_groups, -1))
        best = top(grouped.amax(-1), router.router.topk_groups)
        chosen = torch.zeros(grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        return chosen[..., None].expand_as(grouped).flatten(-2)

    return changed


def _groups_ignored(router: Any, _: Method) -> Method:
    return lambda choice: torch.ones_like(choice, dtype=torch.bool)


def _correction_ignored(router: Any, select: Method) -> Method:
    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        return select(scores - router.correction_bias, logits)  # type: ignore[no-any-return]

    return changed


def _ties_at_random(_: Any, select: Method) -> Method:
    generator = torch.Generator().manual_seed(0)

    def changed(scores: Tensor, logits: Tensor) -> Tensor:
        # Experts are taken in a new order each time, so only exact ties are resolved otherwise.
        order = torch.randperm(scores.shape[-1], generator=generator)
        return order[select(scores[:, order], logits[:, order])]

    return changed


def _ties_select_one(router: Any, _: Method) -> Method:
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


def _always_normalised(_: Any, weigh: Method) -> Method:
    def changed(scores: Tensor, logits: Tensor, selected: Tensor) -> Tensor:
        weights: Tensor = weigh(scores, logits, selected)
        return weights / weights.sum(-1, keepdim=True)

    return changed


def _never_normalised(router: Any, _: Method) -> Method:
    def changed(scores: Tensor, _logits: Tensor, selected: Tensor) -> Tensor:
        return scores.gather(-1, selected) * router.router.scaling_factor  # type: ignore[no-any-return]

    return changed


def _softmax_of_selected(router: Any, _: Method) -> Method:
    def changed(_scores: Tensor, logits: Tensor, selected: Tensor) -> Tensor:
        return logits.gather(-1, selected).softmax(-1) * router.router.scaling_factor  # type: ignore[no-any-return]

    return changed


def _correction_in_weights(router: Any, weigh: Method) -> Method:
    return lambda scores, logits, selected: weigh(scores + router.correction_bias, logits, selected)


def _scaled_twice(router: Any, weigh: Method) -> Method:
    return lambda *stages: weigh(*stages) * router.router.scaling_factor


def _scaled_if_normalised(router: Any, weigh: Method) -> Method:
    factor = 1.0 if router.router.normalise else router.router.scaling_factor
    return lambda *stages: weigh(*stages) / factor


def _top_1_normalised(router: Any, weigh: Method) -> Method:
    def changed(scores: Tensor, logits: Tensor, selected: Tensor) -> Tensor:
        weights: Tensor = weigh(scores, logits, selected)
        return weights / weights.sum(-1, keepdim=True) if router.top_k == 1 else weights

    return changed


def _detached(_: Any, weigh: Method) -> Method:
    return lambda *stages: weigh(*stages).detach()


def _jitter(_: Any, forward: Method) -> Method:
    generator = torch.Generator().manual_seed(0)

    def changed(x: Tensor, real: Tensor) -> Any:
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 0.02 - 0.01
        return forward(x * (1 + noise), real)

    return changed


def _bias_updated(router: Any, forward: Method) -> Method:
    def changed(x: Tensor, real: Tensor) -> Any:
        routed = forward(x, real)
        load = torch.bincount(routed.selected.flatten(), minlength=router.n_experts).float()
        with torch.no_grad():
            router.correction_bias += 0.001 * torch.sign(load.mean() - load)
        return routed

    return changed


def _drops_nothing(_: Any, __: Method) -> Method:
    return lambda selected, weights, real: (selected, weights)


def _drops_the_first(_: Any, drop: Method) -> Method:
    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        indices, kept = drop(selected.flip(0), weights.flip(0), real.flip(0))
        return indices.flip(0), kept.flip(0)

    return changed


def _padding_takes_places(_: Any, drop: Method) -> Method:
    return lambda selected, weights, real: drop(selected, weights, torch.ones_like(real))


def _rounded_down(router: Any, drop: Method) -> Method:
    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        if router.router.capacity_factor is None:
            return drop(selected, weights, real)  # type: ignore[no-any-return]
        limit = int(real.sum() * router.top_k * router.router.capacity_factor / router.n_experts)
        hot = torch.zeros(len(selected), router.n_experts, dtype=torch.int64)
        hot = hot.scatter(-1, selected, 1) * real[:, None]
        place = (hot.cumsum(0) - 1).gather(-1, selected)
        kept = (place < limit) & real[:, None]
        return selected.where(kept, -1), weights.where(kept, 0)

    return changed


def _dropped_keep_weight(_: Any, drop: Method) -> Method:
    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        return drop(selected, weights, real)[0], weights

    return changed


def _renormalised_after_drop(_: Any, drop: Method) -> Method:
    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        indices, kept = drop(selected, weights, real)
        total = kept.sum(-1, keepdim=True)
        return indices, kept * weights.sum(-1, keepdim=True) / total.where(total > 0, 1)

    return changed


def _gradient_stops(_: Any, drop: Method) -> Method:
    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        indices, kept = drop(selected, weights, real)
        after = ((indices < 0).any(-1) & real).cumsum(0) > 0
        return indices, torch.where(after[:, None], kept.detach(), kept)

    return changed



MUTANTS = (
    Mutant("canary", instead(routers, "select", _canary), "select", "made for this", "every slot of a token goes to one expert", "mixtral-8x7b"),
    Mutant("duplicate-experts", instead(routers, "select", _duplicate), "select", "vllm#52679", "some tokens go to one expert twice", "mixtral-8x7b"),
    Mutant("router-bias-dropped", _bias_not_created, "param", "torchtitan#2319", "the router's bias does not exist and the checkpoint's is ignored", "gpt-oss-20b", BIASED),
    Mutant("router-bias-unused", instead(routers, "project", _project_without_bias), "proj", "torchtitan#2319", "the router's bias is loaded and not added", "gpt-oss-20b", BIASED),
    Mutant("router-in-bfloat16", instead(routers, "project", _project_in_bfloat16), "proj", "sglang#38719", "logits are cast to bfloat16", "mixtral-8x7b"),
    Mutant("router-reports-probabilities", instead(routers, "forward", _report_probabilities), "proj", "transformers#45120", "what is returned as logits are probabilities", "mixtral-8x7b"),
    Mutant("softmax-over-tokens", instead(routers, "score", _softmax_over_tokens), "score", "DeepSpeed#2110", "softmax over the tokens in place of the experts", "olmoe-1b-7b", _router(lambda r: r.score == "softmax" and r.order == "before_topk")),
    Mutant("double-softmax", instead(routers, "score", _double_softmax), "score", "transformers#45120", "the score function is applied twice", "olmoe-1b-7b", BEFORE),
    Mutant("scores-in-bfloat16", instead(routers, "score", lambda _, score: lambda logits: _rounded(score(logits))), "score", "Megatron-LM#2765", "scores are computed in bfloat16", "deepseek-v3"),
    Mutant("selection-in-bfloat16", instead(routers, "select", _select_in_bfloat16), "select", "sglang-jax#698", "top-k of scores that were cast to bfloat16", "mixtral-8x7b"),
    Mutant("top-k-constant", instead(routers, "select", _constant_top_k), "select", "MoLE#7", "K is 2 whatever the configuration says", "qwen3-30b-a3b", _router(lambda r: not r.correction_bias)),
    Mutant("selects-the-worst", instead(routers, "select", _worst), "select", "made for this", "the lowest scores win", "mixtral-8x7b"),
    Mutant("masked-groups-at-zero", instead(routers, "select", _masked_at_zero), "select", "vllm#13474", "experts of excluded groups stay in the running with 0", "deepseek-v3", GROUPED),
    Mutant("group-score-max", instead(routers, "in_best_groups", _group_max), "select", "vllm#13474", "a group is worth its best expert in place of its best two", "deepseek-v3", GROUPED),
    Mutant("groups-ignored", instead(routers, "in_best_groups", _groups_ignored), "select", "Megatron-LM#2801", "every group is allowed", "deepseek-v3", GROUPED),
    Mutant("correction-bias-ignored", instead(routers, "select", _correction_ignored), "select", "mlx-lm#1354", "the correction bias is not added", "deepseek-v3", CORRECTED),
    Mutant("ties-at-random", instead(routers, "select", _ties_at_random), "select", "vllm#54403", "equal logits are told apart differently on each run", "mixtral-8x7b", _router(lambda r: r.n_groups == 1 and not r.correction_bias)),
    Mutant("ties-select-one", instead(routers, "select", _ties_select_one), "select", "vllm#55514", "of equal logits only the first can be selected", "mixtral-8x7b", _router(lambda r: r.n_groups == 1)),
    Mutant("always-normalised", instead(routers, "weigh", _always_normalised), "weigh", "mlxcel#391", "weights are divided by their sum though the configuration says no", "olmoe-1b-7b", _router(lambda r: not r.normalise and r.order == "before_topk")),
    Mutant("never-normalised", instead(routers, "weigh", _never_normalised), "weigh", "torchtitan#1448", "weights are not divided by their sum", "deepseek-v3", _router(lambda r: r.normalise and r.order == "before_topk")),
    Mutant("softmax-before-topk", instead(routers, "weigh", _never_normalised), "weigh", "HabanaAI/vllm-fork#1852", "softmax over all experts and then top-k, not normalised", "gpt-oss-20b", AFTER),
    Mutant("softmax-of-the-selected", instead(routers, "weigh", _softmax_of_selected), "weigh", "Megatron-LM#894", "softmax after top-k: at K = 1 the weight is always 1", "olmoe-1b-7b", _router(lambda r: not r.normalise and r.order == "before_topk")),
    Mutant("correction-bias-in-weights", instead(routers, "weigh", _correction_in_weights), "weigh", "vllm#12002", "combine weights are taken from the biased scores", "deepseek-v3", CORRECTED),
    Mutant("scaling-twice", instead(routers, "weigh", _scaled_twice), "weigh", "vllm#24119", "the scaling factor is applied twice", "deepseek-v3"),
    Mutant("scaling-only-if-normalised", instead(routers, "weigh", _scaled_if_normalised), "weigh", "sglang-jax#1282", "weights that are not normalised are not scaled either", "olmoe-1b-7b"),
    Mutant("top-1-normalised", instead(routers, "weigh", _top_1_normalised), "weigh", "minimind#858", "at K = 1 the weight is divided by itself", "olmoe-1b-7b", _router(lambda r: not r.normalise and r.order == "before_topk")),
    Mutant("router-gradient-lost", instead(routers, "weigh", _detached), "gradient", "Megatron-LM 254c87400f", "combine weights are gathered without gradient", "mixtral-8x7b"),
    Mutant("jitter-in-eval", instead(routers, "forward", _jitter), "state", "transformers#28077", "the router's input is jittered in eval mode", "mixtral-8x7b"),
    Mutant("bias-updated-in-eval", instead(routers, "forward", _bias_updated), "state", "torchtitan#1226", "eval calls update the correction bias", "deepseek-v3", CORRECTED),
    Mutant("drops-nothing", instead(routers, "drop", _drops_nothing), "drop", "transformers#48293", "no token is ever dropped", "mixtral-8x7b"),
    Mutant("drops-the-first", instead(routers, "drop", _drops_the_first), "drop", "Megatron-LM 7968fd6532", "the latest tokens keep their place in place of the earliest", "mixtral-8x7b"),
    Mutant("padding-takes-places", instead(routers, "drop", _padding_takes_places), "drop", "transformers#28505", "padding fills the experts' capacity", "mixtral-8x7b"),
    Mutant("capacity-rounded-down", instead(routers, "drop", _rounded_down), "drop", "DeepSpeed#1827", "capacity is rounded down, to none for few tokens", "mixtral-8x7b"),
    Mutant("dropped-slots-keep-their-weight", instead(routers, "drop", _dropped_keep_weight), "drop", "transformers#48689", "a dropped slot keeps its weight", "mixtral-8x7b"),
    Mutant("drops-renormalise", instead(routers, "drop", _renormalised_after_drop), "drop", "DeepSpeed#7163", "what is left after drops is normalised again", "mixtral-8x7b"),
    Mutant("gradient-stops-at-the-first-drop", instead(routers, "drop", _gradient_stops), "gradient", "tutel#127", "tokens after the first dropped one give the router no gradient", "olmoe-1b-7b"),
)
