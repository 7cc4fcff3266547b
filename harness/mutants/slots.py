"""Defects by which what one request asked for reaches another: rows of a batch whose state is not theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import engines, samplers
from harness.reference.engine.values import Request, Sampling

Choose = Callable[[Any, Any], Request]
"""From an engine and a sequence to the request by whose settings its token is decided."""


def deciding_by(engine: Any, choose: Choose) -> None:
    """Tokens are decided by the request that `choose` gives in place of the sequence's own."""
    targets = engine.verifier.targets
    deciding: list[Any] = []
    decide = engine.decide

    def changed(sequence: Any, *rest: Any) -> None:
        deciding[:] = [sequence]
        decide(sequence, *rest)

    def lawful(logits: Any, request: Request, *rest: Any) -> Any:
        chosen = choose(engine, deciding[0]).sampling
        return targets(logits, replace(request, sampling=chosen), *rest)

    engine.decide, engine.verifier.targets = changed, lawful


def own_but(sequence: Any, **fields: Any) -> Request:
    """The sequence's own request, with other values of some fields of its Sampling."""
    request: Request = sequence.request
    return replace(request, sampling=replace(request.sampling, **fields))


@engine_patched(stage="isolation", origin="lmms-eval#1325")
def last_requests_settings_for_all(engine: Any) -> None:
    """All tokens of a batch are drawn as its last request asks."""
    deciding_by(engine, lambda engine, _: latest(engine).request)


def latest(engine: Any) -> Any:
    """The sequence that came last of those that run."""
    return engine.scheduler.running[-1]


@engine_patched(stage="isolation")
def first_requests_temperature_for_all(engine: Any) -> None:
    """All tokens of a batch are drawn at the temperature of its first request."""

    def choose(engine: Any, sequence: Any) -> Request:
        first = engine.scheduler.running[0].request.sampling
        return own_but(sequence, temperature=first.temperature)

    deciding_by(engine, choose)


@engine_patched(stage="isolation")
def filters_are_those_of_the_widest(engine: Any) -> None:
    """A batch has one top-k and one top-p: those that leave the most tokens."""

    def choose(engine: Any, sequence: Any) -> Request:
        laws = [other.request.sampling for other in engine.scheduler.running]
        ks = [law.top_k for law in laws]
        return own_but(sequence, top_k=0 if 0 in ks else max(ks), top_p=max(law.top_p for law in laws))

    deciding_by(engine, choose)


@engine_patched(stage="isolation")
def least_probabilities_are_dropped_in_mixed_batches(engine: Any) -> None:
    """min-p works only where the whole batch asks for it."""

    def choose(engine: Any, sequence: Any) -> Request:
        every = all(other.request.sampling.min_p > 0 for other in engine.scheduler.running)
        return own_but(sequence, **({} if every else {"min_p": 0.0}))

    deciding_by(engine, choose)


@engine_patched(stage="isolation", origin="sglang#1001")
def penalties_are_those_of_the_next_row(engine: Any) -> None:
    """Penalties of a batch are gathered in another order than its rows."""

    def choose(engine: Any, sequence: Any) -> Request:
        running = engine.scheduler.running
        law = running[(running.index(sequence) + 1) % len(running)].request.sampling
        return own_but(
            sequence,
            repetition_penalty=law.repetition_penalty,
            presence_penalty=law.presence_penalty,
            frequency_penalty=law.frequency_penalty,
        )

    deciding_by(engine, choose)


@engine_patched(stage="isolation", origin="mlx-lm#1225")
def one_penalty_turns_all_off(engine: Any) -> None:
    """Whether penalties are applied is what the last request of the batch says."""

    def choose(engine: Any, sequence: Any) -> Request:
        law = latest(engine).request.sampling
        plain = replace(law, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0) == law
        off: dict[str, float] = dict.fromkeys(("presence_penalty", "frequency_penalty"), 0.0)
        return own_but(sequence, **(off | {"repetition_penalty": 1.0} if plain else {}))

    deciding_by(engine, choose)


@engine_patched(stage="isolation", origin="text-generation-inference#1765")
def one_penalty_is_for_all(engine: Any) -> None:
    """A repetition penalty of one request is applied to all that have none."""

    def choose(engine: Any, sequence: Any) -> Request:
        if sequence.request.sampling.repetition_penalty != 1:
            return own_but(sequence)
        found = [other.request.sampling.repetition_penalty for other in engine.scheduler.running]
        return own_but(sequence, repetition_penalty=max(found))

    deciding_by(engine, choose)


@engine_patched(stage="isolation", origin="vllm#5639")
def padding_is_penalised(engine: Any) -> None:
    """Rows shorter than the longest count the padding, token 0, as a token that was seen."""
    penalty, compute = engine.sampler.repetition_penalty, engine.compute
    longest = [0]

    def computing(rows: Sequence[Any]) -> Any:
        longest[0] = max(row.work.sequence.length for row in rows)
        return compute(rows)

    def changed(z: Any, sampling: Sampling, seen: Sequence[int]) -> Any:
        return penalty(z, sampling, (*seen, 0) if len(seen) < longest[0] else seen)

    engine.compute, engine.sampler.repetition_penalty = computing, changed


def by_row(engine: Any, *, moved: bool, keep: Callable[[Sampling], bool]) -> None:
    """Biases live in the rows of a dense batch: who ends is replaced by the last, and the row is used again.

    moved: whether the last one's bias comes with it. keep: for which newcomers the row's bias is not set.
    """
    rows: list[Any] = []
    biases: list[Any] = []
    leave = engine.scheduler.leave

    def leaving(sequence: Any) -> None:
        leave(sequence)
        if sequence in rows:
            row, last = rows.index(sequence), len(rows) - 1
            rows[row] = rows[last]
            if moved:
                biases[row] = biases[last]
            rows.pop()

    def choose(_: Any, sequence: Any) -> Request:
        if sequence not in rows:
            rows.append(sequence)
            law = sequence.request.sampling
            if len(biases) < len(rows):
                biases.append(law.logit_bias)
            elif not keep(law):
                biases[len(rows) - 1] = law.logit_bias
        return own_but(sequence, logit_bias=biases[rows.index(sequence)])

    engine.scheduler.leave = leaving
    deciding_by(engine, choose)


@engine_patched(stage="isolation", origin="vllm#51890")
def biases_stay_when_rows_move(engine: Any) -> None:
    """A row that moves to the place of one that ended finds the other's biases there."""
    by_row(engine, moved=False, keep=lambda _: False)


@engine_patched(stage="isolation")
def biases_are_copied_when_rows_move(engine: Any) -> None:
    """A row that moves leaves its biases behind for the next that comes and has none."""
    by_row(engine, moved=True, keep=lambda law: not law.logit_bias)


@engine_mutant(samplers, "allowed", stage="isolation")
def equal_grammars_share_a_state(_: Any, allowed: Method) -> Method:
    """Requests with the same grammar are in one state of it: that of who is farthest."""
    farthest: dict[Any, tuple[int, ...]] = {}

    def changed(grammar: Any, generated: Sequence[int]) -> Any:
        known = farthest.get(grammar, ())
        farthest[grammar] = tuple(generated) if len(generated) >= len(known) else known
        return allowed(grammar, farthest[grammar])

    return changed


@engine_patched(stage="isolation", origin="vllm#9423")
def grammars_advance_with_the_engine(engine: Any) -> None:
    """A grammar advances by one state in each pass, also while its request waits for its turn."""
    allowed, step = engine.sampler.allowed, engine.step
    passes, began = [0], {}

    def stepping() -> None:
        passes[0] += 1
        step()

    def changed(grammar: Any, generated: Sequence[int]) -> Any:
        if not generated:
            began[grammar] = passes[0]
            return allowed(grammar, generated)
        state = (passes[0] - began.get(grammar, 0)) % len(grammar.states)
        return tuple(token for token, _ in grammar.states[state]) or None

    engine.step, engine.sampler.allowed = stepping, changed


def ending_by(engine: Any, change: Callable[[Request, list[Request]], Request]) -> None:
    """Whether a completion ends is judged by a changed request: from its own and all that run."""
    end = engine.stopper.end

    def changed(request: Request, *rest: Any) -> Any:
        running = [sequence.request for sequence in engine.scheduler.running]
        return end(change(request, running), *rest)

    engine.stopper.end = changed


@engine_patched(stage="isolation")
def end_tokens_of_one_end_all(engine: Any) -> None:
    """An end token of any request of the batch ends each."""
    ending_by(engine, lambda own, all_: replace(own, eos=tuple(t for one in all_ for t in one.eos)))


@engine_patched(stage="isolation")
def stop_sequences_of_one_end_all(engine: Any) -> None:
    """A stop sequence of any request of the batch ends each."""
    ending_by(engine, lambda own, all_: replace(own, stop=tuple(s for one in all_ for s in one.stop)))


@engine_patched(stage="isolation")
def lengths_are_those_of_the_shortest(engine: Any) -> None:
    """A batch ends each answer at the smallest max_tokens of those that run."""
    ending_by(engine, lambda own, all_: replace(own, max_tokens=min(one.max_tokens for one in [own, *all_])))


@engine_mutant(samplers, "min_tokens", stage="isolation")
def least_lengths_are_for_all(_: Any, min_tokens: Method) -> Method:
    """The largest min_tokens that was asked for so far holds for all."""
    most = [0]

    def changed(z: Any, request: Request, generated: Sequence[int]) -> Any:
        most[0] = max(most[0], request.min_tokens)
        return min_tokens(z, replace(request, min_tokens=most[0]), generated)

    return changed


@engine_mutant(engines, "leave", stage="isolation")
def log_probabilities_only_if_all_ask(engine: Any, leave: Method) -> Method:
    """Log probabilities are given only where every request of the batch asked for them."""

    def changed(sequence: Any) -> None:
        others = [other for other in engine.scheduler.running if other is not sequence]
        leave(sequence)
        if not all(other.request.logprobs for other in others):
            sequence.completion = replace(sequence.completion, logprobs=None)

    return changed


def penalised_from(engine: Any, first: Callable[[Any], int]) -> None:
    """Repetition penalties see a request's tokens from the `first(sequence)`-th on."""
    penalty, decide = engine.sampler.repetition_penalty, engine.decide
    deciding: list[Any] = []

    def changed(sequence: Any, *rest: Any) -> None:
        deciding[:] = [sequence]
        decide(sequence, *rest)

    engine.decide = changed
    engine.sampler.repetition_penalty = lambda z, law, seen: penalty(z, law, seen[first(deciding[0]) :])


@engine_patched(stage="isolation")
def cached_tokens_are_not_penalised(engine: Any) -> None:
    """Penalties do not know the part of a prompt that was found in the cache."""
    penalised_from(engine, lambda sequence: int(sequence.cached_tokens))


@engine_patched(stage="isolation")
def only_last_chunks_are_penalised(engine: Any) -> None:
    """Penalties know of a prompt what its last chunk held."""
    advance, starts = engine.advance, dict[Any, int]()

    def changed(row: Any, logits: Any) -> None:
        sequence = row.work.sequence
        if not sequence.generated:
            starts[sequence] = sequence.computed - len(row.tokens)
        advance(row, logits)

    engine.advance = changed
    penalised_from(engine, lambda sequence: starts.get(sequence, 0))


@engine_patched(stage="isolation")
def stop_sequences_go_on_from_former_requests(engine: Any) -> None:
    """Stop sequences are looked for in what the former request ended with and the answer after it."""
    leave, ends_with = engine.scheduler.leave, engine.stopper.ends_with
    former: list[int] = []

    def leaving(sequence: Any) -> None:
        leave(sequence)
        former[:] = sequence.generated[-4:]

    engine.scheduler.leave = leaving
    engine.stopper.ends_with = lambda generated, stop: ends_with([*former, *generated], stop)
