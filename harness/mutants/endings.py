"""Defects of where a completion ends, of what is told about it, and of what a round leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.mutants.acceptance import DENSE
from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import engines, samplers, schedulers, stoppers
from harness.reference.engine.sampling import log_probabilities


@engine_mutant(stoppers, "end", stage="stop", origin="transformers#47912", spec=DENSE)
def ends_within_a_round_are_overlooked(_: Any, end: Method) -> Method:
    """Only the last token of a round can end a completion."""
    return lambda request, generated, _since=0: end(request, generated, len(generated))


@engine_mutant(stoppers, "end", stage="stop", spec=DENSE)
def stop_sequences_must_lie_in_one_round(stopper: Any, end: Method) -> Method:
    """A stop sequence is sought in the tokens of one round."""
    ends_with, first = stopper.ends_with, [0]

    def since_round(request: Any, generated: Any, since: int = 0) -> Any:
        first[:] = [since]
        return end(request, generated, since)

    stopper.ends_with = lambda generated, stop: ends_with(generated[first[0] :], stop)
    return since_round


@engine_mutant(stoppers, "stopped", stage="stop", spec=DENSE)
def stop_sequences_may_begin_in_the_prompt(_: Any, stopped: Method) -> Method:
    """A stop sequence is sought in prompt and completion together."""

    def sought(request: Any, generated: Any) -> Any:
        if not generated:
            return None
        remain = stopped(request, (*request.prompt, *generated))
        return None if remain is None else max(0, remain - len(request.prompt))

    return sought


@engine_mutant(stoppers, "stopped", stage="stop", spec=DENSE)
def what_ends_it_stays(_: Any, stopped: Method) -> Method:
    """The token or the sequence that ends a completion is part of it."""

    def kept(request: Any, generated: Any) -> Any:
        return None if stopped(request, generated) is None else len(generated)

    return kept


@engine_mutant(stoppers, "end", stage="stop", spec=DENSE)
def length_comes_before_stop(stopper: Any, end: Method) -> Method:
    """A completion that ends at its last token is said to have reached its length."""

    def sooner(request: Any, generated: Any, since: int = 0) -> Any:
        found = end(request, generated, since)
        if found is not None and stopper.full(request, found.consumed):
            return replace(found, tokens=tuple(generated[: found.consumed]), finish_reason="length")
        return found

    return sooner


@engine_mutant(stoppers, "stopped", stage="stop", spec=DENSE)
def only_the_first_end_token_ends(_: Any, stopped: Method) -> Method:
    """Of several end tokens the first alone counts."""
    return lambda request, generated: stopped(replace(request, eos=request.eos[:1]), generated)


@engine_mutant(stoppers, "stopped", stage="stop", spec=DENSE)
def an_end_token_in_the_prompt_ends(_: Any, stopped: Method) -> Method:
    """A prompt that ends in an end token is complete."""
    return lambda request, generated: (
        stopped(request, generated) if generated or request.prompt[-1] not in request.eos else 0
    )


@engine_mutant(stoppers, "stopped", stage="settings", origin="transformers serve 5.23.0", spec=DENSE)
def stop_sequences_are_ignored(_: Any, stopped: Method) -> Method:
    """stop is accepted and has no effect."""
    return lambda request, generated: stopped(replace(request, stop=()), generated)


@engine_mutant(stoppers, "ends_with", stage="stop", spec=DENSE)
def stop_sequences_match_by_their_last_token(_: Any, __: Method) -> Method:
    """A stop sequence is taken to be found where its last token is."""
    return lambda generated, stop: len(generated) >= len(stop) and generated[-1] == stop[-1]


@engine_mutant(stoppers, "ends_with", stage="stop", spec=DENSE)
def a_broken_match_is_not_begun_anew(_: Any, __: Method) -> Method:
    """The token at which a match of a stop sequence breaks off is not taken for the start of another."""

    def matched(generated: Any, stop: Any) -> bool:
        have = 0
        for token in generated:
            have = have % len(stop) + 1 if token == stop[have % len(stop)] else 0
        return have == len(stop)

    return matched


@engine_mutant(stoppers, "full", stage="stop", spec=DENSE)
def one_token_too_many(_: Any, full: Method) -> Method:
    """max_tokens is exceeded by one where the last round brings it."""
    return lambda request, count: full(request, count - 1) if count > 1 else full(request, count)


@engine_mutant(
    engines, "decide", stage="fault", origin="transformers stop_strings with an assistant", spec=DENSE
)
def stop_sequences_fail_with_drafts(_: Any, decide: Method) -> Method:
    """A draft model is not told of stop sequences, and refuses them."""

    def refused(sequence: Any, proposal: Any, logits: Any) -> None:
        if sequence.request.stop and proposal.tokens:
            raise ValueError("there are stop strings, and no tokenizer to read them")
        decide(sequence, proposal, logits)

    return refused


@engine_mutant(stoppers, "end", stage="counters", origin="vllm#56101", spec=DENSE)
def drafts_after_the_end_count_as_accepted(_: Any, end: Method) -> Method:
    """Accepted drafts are counted before a completion is cut at its end."""

    def uncut(request: Any, generated: Any, since: int = 0) -> Any:
        found = end(request, generated, since)
        return None if found is None else replace(found, consumed=len(generated))

    return uncut


def in_a_round(engine: Any, change: Callable[[Any, Any, Tensor, int, int], None]) -> None:
    """Call change(sequence, proposal, logits, tokens before, drafts accepted) in each round, before its
    tokens are counted and the completion is made."""
    decide, verify, end = engine.decide, engine.verifier.verify, engine.stopper.end
    now: dict[str, Any] = {}

    def deciding(sequence: Any, proposal: Any, logits: Tensor) -> None:
        now.update(round=(sequence, proposal, logits, len(sequence.generated)))
        decide(sequence, proposal, logits)

    def verified(*given: Any) -> Any:
        tokens, accepted = verify(*given)
        now["accepted"] = accepted
        return tokens, accepted

    def ended(*given: Any) -> Any:
        sequence, proposal, logits, before = now["round"]
        change(sequence, proposal, logits, before, now["accepted"])
        return end(*given)

    engine.decide, engine.verifier.verify, engine.stopper.end = deciding, verified, ended


@engine_patched(stage="counters", spec=DENSE)
def drafted_counts_what_was_asked(engine: Any) -> None:
    """Each round counts as many drafts as were asked for, though fewer came."""

    def change(sequence: Any, proposal: Any, *_: Any) -> None:
        if engine.speculation is not None:
            sequence.drafted += engine.speculation.length - len(proposal.tokens)

    in_a_round(engine, change)


@engine_patched(stage="counters", spec=DENSE)
def drafted_ends_at_the_rejection(engine: Any) -> None:
    """Drafts after the first that is rejected are not counted."""

    def change(sequence: Any, proposal: Any, _: Tensor, __: int, accepted: int) -> None:
        sequence.drafted -= max(0, len(proposal.tokens) - accepted - 1)

    in_a_round(engine, change)


@engine_patched(stage="counters", spec=DENSE)
def rounds_count_tokens(engine: Any) -> None:
    """A round is counted for each token, not for each pass of the target."""

    def change(sequence: Any, _: Any, __: Tensor, before: int, ___: int) -> None:
        sequence.rounds += len(sequence.generated) - before - 1

    in_a_round(engine, change)


@engine_patched(stage="logprobs", origin="llama.cpp#27972", spec=DENSE)
def drafts_have_log_probability_0(engine: Any) -> None:
    """Accepted drafts are reported as certain."""

    def change(sequence: Any, _: Any, __: Tensor, before: int, accepted: int) -> None:
        sequence.logprobs[before : before + accepted] = [0.0] * accepted

    in_a_round(engine, change)


@engine_patched(stage="logprobs", origin="vllm#53488", spec=DENSE)
def log_probabilities_are_shifted(engine: Any) -> None:
    """With drafts, log probabilities are read one row too late."""

    def change(sequence: Any, proposal: Any, logits: Tensor, before: int, _: int) -> None:
        if proposal.tokens:
            fresh = sequence.generated[before:]
            rows = torch.cat([logits[1:], logits[-1:]])[: len(fresh)]
            sequence.logprobs[before:] = log_probabilities(rows, fresh)

    in_a_round(engine, change)


@engine_patched(stage="logprobs", spec=DENSE)
def log_probabilities_come_from_the_draft(engine: Any) -> None:
    """Accepted drafts are reported with the draft's own log probability."""

    def change(sequence: Any, proposal: Any, _: Tensor, before: int, accepted: int) -> None:
        for i in range(accepted):
            law = proposal.distributions[i]
            sequence.logprobs[before + i] = float(law[proposal.tokens[i]].log())

    in_a_round(engine, change)


@engine_patched(stage="logprobs", spec=DENSE)
def log_probabilities_follow_the_temperature(engine: Any) -> None:
    """Log probabilities are taken after the temperature, not of the model's own logits."""

    def change(sequence: Any, _: Any, logits: Tensor, before: int, __: int) -> None:
        fresh, heat = sequence.generated[before:], sequence.request.sampling.temperature
        if heat > 0:
            sequence.logprobs[before:] = log_probabilities(logits[: len(fresh)] / heat, fresh)

    in_a_round(engine, change)


@engine_patched(stage="logprobs", spec=DENSE)
def log_probabilities_follow_the_penalty(engine: Any) -> None:
    """Log probabilities are taken after the repetition penalty, not of the model's own logits."""

    def change(sequence: Any, _: Any, logits: Tensor, before: int, __: int) -> None:
        request = sequence.request
        for i, token in enumerate(sequence.generated[before:]):
            text = (*request.prompt, *sequence.generated[: before + i])
            z = engine.sampler.repetition_penalty(logits[i].double(), request.sampling, text)
            sequence.logprobs[before + i] = log_probabilities(z[None], [token])[0]

    in_a_round(engine, change)


@engine_patched(stage="logprobs", spec=DENSE)
def log_probabilities_follow_the_grammar(engine: Any) -> None:
    """Log probabilities are those among the tokens that the grammar allows."""

    def change(sequence: Any, _: Any, logits: Tensor, before: int, __: int) -> None:
        for i, token in enumerate(sequence.generated[before:]):
            text = sequence.generated[: before + i]
            z = engine.sampler.grammar(logits[i].double(), sequence.request.sampling, text)
            sequence.logprobs[before + i] = log_probabilities(z[None], [token])[0]

    in_a_round(engine, change)


@engine_mutant(engines, "add", stage="logprobs", spec=DENSE)
def log_probabilities_are_told_of_the_end(_: Any, add: Method) -> Method:
    """The end token, which is no part of the completion, has a log probability too."""

    def added(*given: Any, **more: Any) -> Any:
        sequence = add(*given, **more)
        complete = sequence.complete

        def completed(*given: Any, **more: Any) -> None:
            complete(*given, **more)
            if sequence.completion.logprobs is not None:
                sequence.completion = replace(sequence.completion, logprobs=tuple(sequence.logprobs))

        sequence.complete = completed
        return sequence

    return added


@engine_mutant(schedulers, "rollback", stage="rollback", origin="vllm#47728", spec=DENSE)
def keys_of_a_rejected_draft_stay(scheduler: Any, rollback: Method) -> Method:
    """The first place of rejected drafts is taken for written, and keeps the keys of the draft."""
    pool = scheduler.pool
    write, stale = pool.write, set[int]()

    def noted(sequence: Any) -> None:
        if sequence.computed > sequence.length - 1:
            stale.update(
                torch.as_tensor(pool.slots(sequence.pages, sequence.length - 1, sequence.length)).tolist()
            )
        rollback(sequence)

    def unless_stale(slots: Any, cache: Any, row: Any, column: Any) -> None:
        at = torch.as_tensor(slots)
        fresh = torch.tensor([slot not in stale for slot in at.tolist()])
        stale.difference_update(at.tolist())
        write(at[fresh], cache, row[fresh], column[fresh])

    pool.write = unless_stale
    return noted


@engine_mutant(engines, "compute", stage="rollback", origin="transformers#30042", spec=DENSE)
def positions_advance_by_one_a_round(engine: Any, compute: Method) -> Method:
    """A round moves the position on by one, however many drafts were accepted."""
    forward, accepted = engine.forward, list[int]()

    def behind(tokens: Tensor, past: Any, real: Tensor, positions: Tensor) -> Any:
        late = positions - torch.tensor(accepted)[:, None]
        return forward(tokens, past, real, late.clamp(min=0))

    def noted(rows: Any) -> Any:
        accepted[:] = [row.work.sequence.accepted for row in rows]
        return compute(rows)

    engine.forward = behind
    return noted


def left_over(engine: Any, whether: Callable[[Any], bool]) -> None:
    """Biases are written to a buffer of the model, and stay there if `whether` holds of a sequence."""
    add, logit_bias = engine.add, engine.sampler.logit_bias
    buffer: dict[int, float] = engine.model.__dict__.setdefault("left_over_biases", {})
    found, written = dict(buffer), dict[int, float]()

    def biased(z: Tensor, sampling: Any) -> Any:
        z = z.clone()
        for token, bias in found.items():
            z[token] += bias
        return logit_bias(z, sampling)

    def noted(request: Any, *rest: Any, **more: Any) -> Any:
        sequence = add(request, *rest, **more)
        written.update(dict(request.sampling.logit_bias))
        if whether(sequence):
            buffer.update(written)
        return sequence

    engine.sampler.logit_bias, engine.add = biased, noted


@engine_patched(stage="state", spec=DENSE)
def biases_stay_for_the_next_call(engine: Any) -> None:
    """Biases of a call are added to the logits of later calls too."""
    left_over(engine, lambda _: True)


@engine_patched(stage="state", spec=DENSE)
def biases_stay_after_a_bad_request(engine: Any) -> None:
    """Biases of a call are added to the logits of later calls, if one of its requests could not be served."""
    left_over(engine, lambda sequence: sequence.completion is not None)


@engine_mutant(samplers, "distribution", stage="isolation", spec=DENSE)
def laws_are_remembered_without_settings(_: Any, distribution: Method) -> Method:
    """The law of a token is kept under its text, and found again by requests with other settings."""
    kept: dict[Any, Any] = {}

    def found(logits: Tensor, request: Any, generated: Any) -> Any:
        key = (request.prompt, len(generated), float(logits.sum()))
        if key not in kept:
            kept[key] = distribution(logits, request, generated)
        return kept[key]

    return found
