"""Defects beyond what is asked first: long texts, many settings or entries, late rounds, a second preemption.

Letters: V vocabulary; z logits [V].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.mutants.acceptance import DENSE
from harness.mutants.defect import Method, engine_mutant
from harness.mutants.parts import engines, pools, samplers, schedulers, stoppers, translators, verifiers
from harness.reference.engine.draws import Draws


@engine_mutant(samplers, "top_k", stage="law", spec=DENSE)
def top_k_1_is_greedy(_: Any, top_k: Method) -> Method:
    """top_k 1 leaves the first of several best tokens."""

    def first(z: Tensor, sampling: Any) -> Any:
        if sampling.top_k != 1:
            return top_k(z, sampling)
        return torch.full_like(z, -torch.inf).index_fill(0, z.argmax()[None], 0.0)

    return first


@engine_mutant(samplers, "logit_bias", stage="law", spec=DENSE)
def biases_are_clamped(_: Any, logit_bias: Method) -> Method:
    """Biases beyond 30 count as 30."""

    def clamped(z: Tensor, sampling: Any) -> Any:
        pairs = tuple((token, min(max(bias, -30.0), 30.0)) for token, bias in sampling.logit_bias)
        return logit_bias(z, replace(sampling, logit_bias=pairs))

    return clamped


@engine_mutant(samplers, "repetition_penalty", stage="law", spec=DENSE)
def repetition_forgets_what_lies_far_back(_: Any, penalty: Method) -> Method:
    """The repetition penalty sees the last 64 tokens."""
    return lambda z, sampling, seen: penalty(z, sampling, seen[-64:])


@engine_mutant(samplers, "repetition_penalty", stage="law", spec=DENSE)
def repetition_is_never_rewarded(_: Any, penalty: Method) -> Method:
    """A repetition penalty below 1 is ignored."""
    return lambda z, sampling, seen: penalty(z, sampling, seen) if sampling.repetition_penalty > 1 else z


@engine_mutant(samplers, "presence_penalty", stage="law", spec=DENSE)
def presence_is_never_rewarded(_: Any, penalty: Method) -> Method:
    """A negative presence penalty is ignored."""
    return lambda z, sampling, seen: penalty(z, sampling, seen) if sampling.presence_penalty > 0 else z


@engine_mutant(samplers, "frequency_penalty", stage="law", spec=DENSE)
def frequency_counts_the_latest(_: Any, penalty: Method) -> Method:
    """The frequency penalty counts the last 16 generated tokens."""
    return lambda z, sampling, seen: penalty(z, sampling, seen[-16:])


@engine_mutant(samplers, "min_p", stage="law", spec=DENSE)
def min_p_is_off_beside_top_p(_: Any, min_p: Method) -> Method:
    """Where top_p is set min_p is ignored."""
    return lambda z, sampling: z if sampling.top_p < 1 else min_p(z, sampling)


@engine_mutant(samplers, "top_p", stage="law", spec=DENSE)
def top_p_near_1_is_off(_: Any, top_p: Method) -> Method:
    """A top_p above 0.9 leaves all tokens."""
    return lambda z, sampling: z if sampling.top_p > 0.9 else top_p(z, sampling)


@engine_mutant(samplers, "min_tokens", stage="law", spec=DENSE)
def least_length_yields_to_a_grammar(_: Any, min_tokens: Method) -> Method:
    """Under a grammar min_tokens is ignored."""

    def yielding(z: Tensor, request: Any, generated: Sequence[int]) -> Any:
        return z if request.sampling.grammar is not None else min_tokens(z, request, generated)

    return yielding


@engine_mutant(samplers, "allowed", stage="law", spec=DENSE)
def grammars_let_everything_end(sampler: Any, allowed: Method) -> Method:
    """End tokens are possible in every state of a grammar."""
    distribution, ends = sampler.distribution, list[int]()

    def noting(logits: Tensor, request: Any, generated: Sequence[int]) -> Any:
        ends[:] = request.eos
        return distribution(logits, request, generated)

    def wider(grammar: Any, generated: Sequence[int]) -> Any:
        found = allowed(grammar, generated)
        return tuple(dict.fromkeys((*found, *ends))) if found else found

    sampler.distribution = noting
    return wider


@engine_mutant(verifiers, "accepts", stage="law", spec=DENSE)
def late_rounds_are_lenient(verifier: Any, accepts: Method) -> Method:
    """After eight tokens a draft that would be rejected stands nine times out of ten."""
    targets, known = verifier.targets, [0]

    def counting(logits: Tensor, request: Any, generated: Sequence[int], *rest: Any) -> Any:
        known[0] = len(generated)
        return targets(logits, request, generated, *rest)

    def lenient(token: int, p: Tensor, q: Tensor, draws: Any) -> bool:
        if accepts(token, p, q, draws):
            return True
        return known[0] >= 8 and bool(p[token] > 0) and bool(draws.uniform() < 0.9)

    verifier.targets = counting
    return lenient


@engine_mutant(verifiers, "targets", stage="law", origin="vllm#7627", spec=DENSE)
def ties_in_windows_go_upwards(_: Any, targets: Method) -> Method:
    """What is drafted is verified with logits that rise by a hair from token to token."""

    def tilted(logits: Tensor, request: Any, generated: Sequence[int], tokens: Any, sampler: Any) -> Any:
        rise = 1e-10 * torch.arange(logits.shape[-1]) if len(tokens) else 0
        return targets(logits.double() + rise, request, generated, tokens, sampler)

    return tilted


@engine_mutant(stoppers, "stopped", stage="stop", spec=DENSE)
def end_tokens_are_three_at_most(_: Any, stopped: Method) -> Method:
    """Of the end tokens of a request the first three end it."""
    return lambda request, generated: stopped(replace(request, eos=request.eos[:3]), generated)


@engine_mutant(stoppers, "stopped", stage="stop", spec=DENSE)
def stop_sequences_are_four_at_most(_: Any, stopped: Method) -> Method:
    """Of the stop sequences of a request the first four end it."""
    return lambda request, generated: stopped(replace(request, stop=request.stop[:4]), generated)


@engine_mutant(stoppers, "ends_with", stage="stop", spec=DENSE)
def long_stop_sequences_match_by_their_end(_: Any, ends_with: Method) -> Method:
    """Only the last four tokens of a stop sequence are compared."""
    return lambda generated, stop: ends_with(generated, stop[-4:])


@engine_mutant(stoppers, "stopped", stage="stop", spec=DENSE)
def stop_sequences_are_off_beside_end_tokens(_: Any, stopped: Method) -> Method:
    """Where a request has end tokens its stop sequences are ignored."""

    def either(request: Any, generated: Sequence[int]) -> Any:
        return stopped(replace(request, stop=()) if request.eos else request, generated)

    return either


@engine_mutant(engines, "decide", stage="logprobs", spec=DENSE)
def log_probabilities_of_windows_follow_the_grammar(engine: Any, decide: Method) -> Method:
    """Where something was drafted, log probabilities are those under the request's grammar."""

    def masked(sequence: Any, proposal: Any, logits: Tensor) -> None:
        sampling, before = sequence.request.sampling, list(sequence.generated)
        decide(sequence, proposal, logits)
        if not proposal.tokens or sampling.grammar is None:
            return
        after = sequence.generated[len(before) :]
        for i, token in enumerate(after):
            row = engine.sampler.grammar(logits[i].double(), sampling, (*before, *after[:i]))
            sequence.logprobs[len(before) + i] = float(row.log_softmax(0)[token])
        done = sequence.completion
        if done is not None and done.logprobs is not None:
            told = tuple(sequence.logprobs[: len(done.tokens)])
            sequence.completion = replace(done, logprobs=told)

    return masked


@engine_mutant(engines, "decide", stage="counters", spec=DENSE)
def who_leaves_has_accepted_the_whole_window(_: Any, decide: Method) -> Method:
    """Of a client that leaves all drafts of its last round count as accepted."""

    def counted(sequence: Any, proposal: Any, logits: Tensor) -> None:
        before = sequence.accepted
        decide(sequence, proposal, logits)
        done = sequence.completion
        if done is not None and done.finish_reason == "cancelled":
            sequence.completion = replace(done, accepted=before + len(proposal.tokens))

    return counted


@engine_mutant(translators, "translate", stage="acceptance", origin="vllm#10913", spec=DENSE)
def translations_lack_the_last_entry(translator: Any, translate: Method) -> Method:
    """The last token of the draft's vocabulary is never proposed."""

    def short(logits: Tensor) -> Tensor:
        q: Tensor = translate(logits)
        last = translator.vocabulary[-1]
        return q if last < 0 else q.index_fill(1, torch.tensor([last]), -torch.inf)

    return short


@engine_mutant(schedulers, "preempt", stage="seed", origin="vllm#19940", spec=DENSE)
def seeds_start_again_after_a_second_preemption(_: Any, preempt: Method) -> Method:
    """A request that loses its pages for the second time draws from its seed anew."""

    def again(sequence: Any) -> None:
        preempt(sequence)
        seed = sequence.request.sampling.seed
        if sequence.preemptions >= 2 and seed is not None:
            sequence.draws = Draws(torch.Generator().manual_seed(seed))

    return again


@engine_mutant(schedulers, "preempt", stage="prefix", spec=DENSE)
def a_second_preemption_drops_the_salt(_: Any, preempt: Method) -> Method:
    """A request that loses its pages for the second time loses its salt with them."""

    def bare(sequence: Any) -> None:
        preempt(sequence)
        if sequence.preemptions >= 2:
            sequence.request = replace(sequence.request, salt="")

    return bare


def _without_salt(publish: Method, sequence: Any, since: int) -> None:
    request, sequence.request = sequence.request, replace(sequence.request, salt="")
    publish(sequence, since)
    sequence.request = request


@engine_mutant(schedulers, "publish", stage="prefix", origin="vllm#30931", spec=DENSE)
def salts_are_lost_after_the_prompt(_: Any, publish: Method) -> Method:
    """Pages that generated tokens complete are shared without the salt."""

    def bare(sequence: Any, since: int) -> None:
        if since >= len(sequence.request.prompt):
            _without_salt(publish, sequence, since)
        else:
            publish(sequence, since)

    return bare


@engine_mutant(schedulers, "publish", stage="prefix", spec=DENSE)
def salts_are_lost_after_the_first_chunk(_: Any, publish: Method) -> Method:
    """Pages of a prompt's later chunks are shared without the salt."""

    def bare(sequence: Any, since: int) -> None:
        if 0 < since < len(sequence.request.prompt):
            _without_salt(publish, sequence, since)
        else:
            publish(sequence, since)

    return bare


@engine_mutant(pools, "key", stage="prefix", origin="vllm#44701", spec=DENSE)
def salts_run_into_tokens(_: Any, __: Method) -> Method:
    """The characters of a salt stand before the tokens, with nothing between them."""
    return lambda tokens, salt: ("", (*map(ord, salt), *tokens))


@engine_mutant(pools, "key", stage="prefix", spec=DENSE)
def long_salts_are_cut(_: Any, key: Method) -> Method:
    """The first 64 characters of a salt count."""
    return lambda tokens, salt: key(tokens, salt[:64])


@engine_mutant(pools, "key", stage="prefix", origin="vllm#12621", spec=DENSE)
def prefixes_are_told_apart_by_their_last_pages(pool: Any, key: Method) -> Method:
    """Of a prefix its length and its last two pages are compared."""
    return lambda tokens, salt: key((len(tokens), *tokens[-2 * pool.page_size :]), salt)


@engine_mutant(pools, "slots", stage="pages", spec=DENSE)
def page_numbers_have_seven_bits(_: Any, slots: Method) -> Method:
    """Page 128 is taken for page 0."""
    return lambda pages, start, end: slots([page % 128 for page in pages], start, end)


@engine_mutant(engines, "draws_of", stage="seed", spec=DENSE)
def seeds_have_eight_bits(_: Any, draws_of: Method) -> Method:
    """Only the last eight bits of a seed count."""

    def lower(request: Any) -> Any:
        seed = request.sampling.seed
        short = None if seed is None else seed % (1 << 8)
        return draws_of(replace(request, sampling=replace(request.sampling, seed=short)))

    return lower


@engine_mutant(engines, "draws_of", stage="seed", spec=DENSE)
def seeds_have_three_digits(_: Any, draws_of: Method) -> Method:
    """Seeds that are equal modulo 1000 are one."""

    def short(request: Any) -> Any:
        seed = request.sampling.seed
        rest = None if seed is None else seed % 1000
        return draws_of(replace(request, sampling=replace(request.sampling, seed=rest)))

    return short
