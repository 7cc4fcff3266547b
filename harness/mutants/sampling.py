"""Defects of how a law is made from logits and settings.

Letters: V vocabulary; z logits [V].
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.mutants.acceptance import DENSE
from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import samplers


@engine_mutant(samplers, "temperature", stage="law", spec=DENSE)
def temperature_comes_last(sampler: Any, temperature: Method) -> Method:
    """The temperature is applied after top-k, top-p and min-p, which look at the model's own law."""
    normalise, hot = sampler.normalise, [1.0]

    def later(z: Tensor, sampling: Any) -> Any:
        hot[:] = [sampling.temperature or 1.0]
        return z - z.max() if sampling.temperature > 0 else temperature(z, sampling)

    sampler.normalise = lambda z: normalise(z / hot[0])
    return later


@engine_mutant(samplers, "temperature", stage="law", origin="vllm#3063", spec=DENSE)
def temperature_divides_in_half_precision(_: Any, temperature: Method) -> Method:
    """Logits are divided in float16, where small temperatures overflow."""

    def halved(z: Tensor, sampling: Any) -> Any:
        if sampling.temperature == 0:
            return temperature(z, sampling)
        return (z.half() / torch.tensor(sampling.temperature).half()).double()

    return halved


@engine_mutant(samplers, "temperature", stage="settings", origin="transformers serve 5.23.0", spec=DENSE)
def temperature_is_ignored(_: Any, temperature: Method) -> Method:
    """Only 0 and not 0 are told apart."""
    return lambda z, sampling: z if sampling.temperature > 0 else temperature(z, sampling)


@engine_mutant(samplers, "top_k", stage="law", spec=DENSE)
def top_k_keeps_one_more(_: Any, __: Method) -> Method:
    """k + 1 tokens stay."""

    def more(z: Tensor, sampling: Any) -> Tensor:
        if not 0 < sampling.top_k < len(z) - 1:
            return z
        return z.masked_fill(z < z.topk(sampling.top_k + 1).values[-1], -torch.inf)

    return more


@engine_mutant(samplers, "top_k", stage="law", spec=DENSE)
def top_k_drops_what_is_equal(_: Any, __: Method) -> Method:
    """Exactly k tokens stay, by the order in which a sort leaves equal ones."""

    def exact(z: Tensor, sampling: Any) -> Tensor:
        if not 0 < sampling.top_k < len(z):
            return z
        kept = z.sort(descending=True, stable=True).indices[: sampling.top_k]
        return torch.full_like(z, -torch.inf).index_copy(0, kept, z[kept])

    return exact


@engine_mutant(samplers, "top_k", stage="law", spec=DENSE)
def top_k_minus_1_counts_from_the_end(_: Any, top_k: Method) -> Method:
    """top_k -1 leaves out the least probable token in place of none."""

    def counted(z: Tensor, sampling: Any) -> Any:
        return z.masked_fill(z == z.min(), -torch.inf) if sampling.top_k < 0 else top_k(z, sampling)

    return counted


@engine_mutant(samplers, "top_k", stage="fault", spec=DENSE)
def top_k_must_not_exceed_the_vocabulary(_: Any, top_k: Method) -> Method:
    """More tokens than there are cannot be asked for."""

    def strict(z: Tensor, sampling: Any) -> Any:
        z.topk(max(sampling.top_k, 1))
        return top_k(z, sampling)

    return strict


@engine_mutant(samplers, "top_p", stage="law", spec=DENSE)
def top_p_drops_the_token_that_reaches_it(_: Any, __: Method) -> Method:
    """Tokens stay while their sum is at most top_p: the one that passes it is left out."""

    def short(z: Tensor, sampling: Any) -> Tensor:
        ordered, order = z.sort(descending=True, stable=True)
        beyond = ordered.softmax(0).cumsum(0) > sampling.top_p
        beyond[0] = False
        return z.index_fill(0, order[beyond], -torch.inf)

    return short


@engine_mutant(samplers, "top_p", stage="law", origin="TensorRT-LLM#1590", spec=DENSE)
def top_p_goes_past_the_token_that_reaches_it(_: Any, __: Method) -> Method:
    """A sum that equals top_p is taken not to reach it."""

    def past(z: Tensor, sampling: Any) -> Tensor:
        ordered, order = z.sort(descending=True, stable=True)
        sums = ordered.softmax(0).cumsum(0)
        count = int(torch.searchsorted(sums, sums.new_tensor(sampling.top_p + 1e-9), right=True)) + 1
        return z.index_fill(0, order[count:], -torch.inf)

    return past


@engine_mutant(samplers, "top_p", stage="law", spec=DENSE)
def top_p_is_ignored_near_0(_: Any, top_p: Method) -> Method:
    """A top_p of 0 is taken to be unset."""
    return lambda z, sampling: top_p(z, sampling) if sampling.top_p > 0 else z


@engine_mutant(samplers, "top_k", stage="law", spec=DENSE)
def top_p_sums_before_top_k(sampler: Any, top_k: Method) -> Method:
    """top_p looks at the law before top_k, though it comes after it."""
    top_p, whole = sampler.top_p, list[Tensor]()

    def remembered(z: Tensor, sampling: Any) -> Any:
        whole[:] = [z]
        return top_k(z, sampling)

    def earlier(z: Tensor, sampling: Any) -> Tensor:
        return z.masked_fill(top_p(whole[0], sampling) == -torch.inf, -torch.inf)

    sampler.top_p = earlier
    return remembered


@engine_mutant(samplers, "min_p", stage="law", spec=DENSE)
def min_p_is_absolute(_: Any, __: Method) -> Method:
    """Tokens of probability min_p or more stay, whatever the largest is; if there are none, all."""

    def absolute(z: Tensor, sampling: Any) -> Tensor:
        few = z.softmax(0) < sampling.min_p
        return z if bool(few.all()) else z.masked_fill(few, -torch.inf)

    return absolute


@engine_mutant(samplers, "min_p", stage="fault", spec=DENSE)
def min_p_1_leaves_nothing(_: Any, min_p: Method) -> Method:
    """Only tokens more probable than min_p asks for stay, and at 1 there is none."""
    return lambda z, sampling: (
        z.masked_fill(z <= z.max() + math.log(sampling.min_p), -torch.inf)
        if sampling.min_p > 0
        else min_p(z, sampling)
    )


@engine_mutant(samplers, "min_p", stage="settings", spec=DENSE)
def min_p_is_ignored(_: Any, __: Method) -> Method:
    """min_p is accepted and has no effect."""
    return lambda z, _sampling: z


@engine_mutant(samplers, "repetition_penalty", stage="law", spec=DENSE)
def repetition_rewards_the_unlikely(_: Any, penalty: Method) -> Method:
    """Every logit of a token seen is divided, so that negative ones rise."""
    return lambda z, sampling, seen: penalty(z.abs(), sampling, seen) * z.sign()


@engine_mutant(samplers, "repetition_penalty", stage="law", spec=DENSE)
def repetition_forgets_the_prompt(_: Any, penalty: Method) -> Method:
    """The last token seen alone is penalised."""
    return lambda z, sampling, seen: penalty(z, sampling, seen[-1:])


@engine_mutant(samplers, "presence_penalty", stage="law", spec=DENSE)
def presence_counts(_: Any, __: Method) -> Method:
    """The presence penalty is subtracted once for each time."""

    def counted(z: Tensor, sampling: Any, generated: Any) -> Any:
        times = torch.bincount(torch.tensor(list(generated), dtype=torch.int64), minlength=len(z))
        return z - sampling.presence_penalty * times

    return counted


@engine_mutant(samplers, "frequency_penalty", stage="law", spec=DENSE)
def frequency_counts_once(_: Any, __: Method) -> Method:
    """The frequency penalty is subtracted once, however often a token came."""

    def once(z: Tensor, sampling: Any, generated: Any) -> Any:
        times = torch.bincount(torch.tensor(list(generated), dtype=torch.int64), minlength=len(z))
        return z - sampling.frequency_penalty * times.clamp(max=1)

    return once


@engine_mutant(samplers, "logit_bias", stage="law", spec=DENSE)
def biases_are_multiplied(_: Any, __: Method) -> Method:
    """A bias scales probability by 1 + bias in place of adding to the logit."""

    def scaled(z: Tensor, sampling: Any) -> Tensor:
        z = z.clone()
        for token, bias in sampling.logit_bias:
            z[token] += math.log(max(1 + bias, 1e-9))
        return z

    return scaled


@engine_mutant(samplers, "logit_bias", stage="settings", spec=DENSE)
def biases_are_ignored(_: Any, __: Method) -> Method:
    """logit_bias is accepted and has no effect."""
    return lambda z, _sampling: z


@engine_mutant(samplers, "min_tokens", stage="law", spec=DENSE)
def least_length_counts_the_prompt(_: Any, least: Method) -> Method:
    """min_tokens is compared with prompt and completion together."""
    return lambda z, request, generated: least(z, request, (*request.prompt, *generated))


@engine_mutant(samplers, "min_tokens", stage="law", spec=DENSE)
def least_length_is_one_less(_: Any, least: Method) -> Method:
    """The end may come one token before min_tokens."""
    return lambda z, request, generated: least(z, request, (*generated, 0))


@engine_patched(stage="law", spec=DENSE)
def biases_come_after_penalties(engine: Any) -> None:
    """Biases are added to logits that were penalised before."""
    sampler = engine.sampler
    logit_bias, frequency = sampler.logit_bias, sampler.frequency_penalty
    sampler.logit_bias = lambda z, _sampling: z
    sampler.frequency_penalty = lambda z, sampling, seen: logit_bias(frequency(z, sampling, seen), sampling)


@engine_patched(stage="law", spec=DENSE)
def presence_comes_after_the_temperature(engine: Any) -> None:
    """The presence penalty is subtracted from logits that were divided by the temperature."""
    sampler, generated = engine.sampler, list[Any]()
    presence, temperature = sampler.presence_penalty, sampler.temperature

    def later(z: Tensor, _: Any, seen: Any) -> Tensor:
        generated[:] = [seen]
        return z

    sampler.presence_penalty = later
    sampler.temperature = lambda z, sampling: presence(temperature(z, sampling), sampling, generated[0])


@engine_patched(stage="law", spec=DENSE)
def repetition_comes_after_presence(engine: Any) -> None:
    """The repetition penalty scales logits from which the others were subtracted."""
    sampler, text = engine.sampler, list[Any]()
    repetition, frequency = sampler.repetition_penalty, sampler.frequency_penalty

    def later(z: Tensor, _: Any, seen: Any) -> Tensor:
        text[:] = [seen]
        return z

    sampler.repetition_penalty = later
    sampler.frequency_penalty = lambda z, sampling, seen: repetition(
        frequency(z, sampling, seen), sampling, text[0]
    )


@engine_patched(stage="law", spec=DENSE)
def repetition_counts_the_padding(engine: Any) -> None:
    """Token 0, with which shorter prompts of a batch are padded, counts as seen."""
    sampler, prompt = engine.sampler, list[Any]()
    repetition, distribution = sampler.repetition_penalty, sampler.distribution

    def noted(logits: Tensor, request: Any, generated: Any) -> Any:
        prompt[:] = request.prompt
        return distribution(logits, request, generated)

    def padded(z: Tensor, sampling: Any, seen: Any) -> Any:
        longest = max((len(one.request.prompt) for one in engine.scheduler.running), default=0)
        return repetition(z, sampling, (*seen, 0) if len(prompt) < longest else seen)

    sampler.distribution, sampler.repetition_penalty = noted, padded


@engine_mutant(samplers, "temperature", stage="law", spec=DENSE)
def low_temperatures_are_greedy(_: Any, temperature: Method) -> Method:
    """A temperature below 0.2 is taken for 0."""
    return lambda z, sampling: temperature(
        z, sampling if sampling.temperature >= 0.2 else replace(sampling, temperature=0.0)
    )


@engine_mutant(samplers, "temperature", stage="greedy", spec=DENSE)
def greedy_compares_in_half_precision(_: Any, temperature: Method) -> Method:
    """The largest logit is sought after rounding to bfloat16."""
    return lambda z, sampling: temperature(z if sampling.temperature > 0 else z.bfloat16().double(), sampling)


@engine_mutant(samplers, "grammar", stage="law", spec=DENSE)
def grammar_forbids_by_a_finite_number(_: Any, grammar: Method) -> Method:
    """100 is subtracted from logits of tokens that the grammar does not allow."""
    return lambda z, *rest: torch.where(grammar(z, *rest) == -torch.inf, z - 100, z)


@engine_mutant(samplers, "allowed", stage="law", spec=DENSE)
def grammar_begins_anew_at_its_end(_: Any, allowed: Method) -> Method:
    """In a state that allows all tokens, those of the first state alone are allowed."""
    return lambda grammar, generated: (
        found if (found := allowed(grammar, generated)) is not None else allowed(grammar, ())
    )


@engine_patched(stage="law", spec=DENSE)
def min_p_comes_before_top_p(engine: Any) -> None:
    """top_p sums the probabilities of what min_p has left."""
    sampler = engine.sampler
    sampler.top_p, sampler.min_p = sampler.min_p, sampler.top_p
