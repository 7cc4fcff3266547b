"""Defects of drafts: the law reported for them, what they were drawn from, and what a draft remembers.

A draft whose law is reported rightly is harmless, however bad; one whose law is not shifts the output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.mutants.acceptance import DENSE
from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import drafters, lookups, readers, translators, verifiers
from harness.reference.engine.drafting import FirstLayers, Remembered, cut
from harness.reference.engine.draws import Draws


@engine_mutant(drafters, "choose", stage="law", origin="transformers#30778", spec=DENSE)
def drafts_are_greedy(_: Any, __: Method) -> Method:
    """The draft's most probable token is proposed, with the law that it was not drawn from."""
    return lambda q, _draws: int(q.argmax())


@engine_mutant(drafters, "choose", stage="law", origin="transformers Gemma4Assistant, 5.23.0", spec=DENSE)
def early_exits_draft_greedily(drafter: Any, choose: Method) -> Method:
    """Drafts of the first layers, and they alone, are the most probable tokens, reported with their law."""
    model = getattr(drafter.reader, "model", None)
    return (lambda q, _draws: int(q.argmax())) if isinstance(model, FirstLayers) else choose


@engine_mutant(drafters, "law", stage="law", origin="transformers#47932", spec=DENSE)
def drafts_report_raw_laws(drafter: Any, law: Method) -> Method:
    """Drafts are drawn under the request's settings, and reported with the softmax of raw logits."""
    choose, warped = drafter.choose, list[Tensor]()

    def raw(logits: Tensor, *rest: Any) -> Tensor:
        warped[:] = [law(logits, *rest)]
        return logits.double().softmax(0)

    drafter.choose = lambda _, draws: choose(warped[0], draws)
    return raw


@engine_mutant(drafters, "law", stage="law", origin="z-lab/dflash#74", spec=DENSE)
def drafts_have_no_temperature(drafter: Any, law: Method) -> Method:
    """Drafts are drawn at temperature 1, and reported at the request's."""
    choose, drawn = drafter.choose, list[Tensor]()

    def cold(logits: Tensor, request: Any, generated: Any) -> Tensor:
        plain = replace(request, sampling=replace(request.sampling, temperature=1.0))
        drawn[:] = [law(logits, plain, generated)]
        return Tensor(law(logits, request, generated))

    drafter.choose = lambda _, draws: choose(drawn[0], draws)
    return cold


@engine_mutant(drafters, "propose", stage="law", spec=DENSE)
def drafts_report_the_law_of_the_place_before(_: Any, propose: Method) -> Method:
    """Each draft is reported with the law of the draft before it."""

    def shifted(*given: Any) -> Any:
        proposal = propose(*given)
        laws = proposal.distributions
        return replace(proposal, distributions=torch.cat([laws[:1], laws[:-1]]))

    return shifted


@engine_mutant(translators, "translate", stage="acceptance", origin="llama.cpp#3812", spec=DENSE)
def translations_are_shifted(_: Any, translate: Method) -> Method:
    """Token ids of a draft from the second on become the target's id of the token before."""
    return lambda logits: translate(torch.cat([logits[:, :1], logits[:, 1:].roll(1, -1)], -1))


@engine_mutant(drafters, "choose", stage="law", origin="vllm#10913", spec=DENSE)
def drafts_are_translated_after_their_law(drafter: Any, choose: Method) -> Method:
    """Where vocabularies differ, the token that is proposed is the one after that whose law is reported."""
    if not hasattr(drafter.reader, "translate"):
        return choose
    return lambda q, draws: (choose(q, draws) + 1) % len(q)


@engine_mutant(readers, "rollback", stage="acceptance", origin="llama.cpp#26478", spec=DENSE)
def drafts_forget_the_last_accepted_token(_: Any, rollback: Method) -> Method:
    """The draft's cache lacks a token that it takes for read."""

    def short(memory: Any, tokens: Any) -> Any:
        kept = rollback(memory, tokens)
        if kept is None or len(kept.tokens) < 2:
            return kept
        return Remembered(kept.tokens, cut(kept.cache, len(kept.tokens) - 1))

    return short


@engine_mutant(readers, "rollback", stage="acceptance", origin="transformers#30312", spec=DENSE)
def drafts_keep_what_was_rejected(_: Any, rollback: Method) -> Method:
    """The draft's cache is cut to a copy, and the old one goes on being used."""

    def uncut(memory: Any, tokens: Any) -> Any:
        kept = rollback(memory, tokens)
        return None if kept is None else Remembered(kept.tokens, memory.cache)

    return uncut


@engine_mutant(
    translators, "translate", stage="state", origin="transformers assisted generation, 5.23.0", spec=DENSE
)
def drafts_are_pruned_in_place(translator: Any, translate: Method) -> Method:
    """What the target lacks of a draft's vocabulary is cut out of the draft itself, for good."""
    model = translator.reader.model
    kept = [own for own, theirs in enumerate(translator.vocabulary) if theirs >= 0]

    def pruned(logits: Tensor) -> Any:
        matrix = model.embedding if model.unembedding is None else model.unembedding
        if model.__dict__.setdefault("pruned", False):
            spread = torch.full_like(logits, -torch.inf)
            logits = spread.index_copy(1, torch.tensor(kept), logits[:, : len(kept)])
        else:
            with torch.no_grad():
                matrix.weight[: len(kept)] = matrix.weight[kept]
            model.__dict__["pruned"] = True
        return translate(logits)

    return pruned


@engine_mutant(drafters, "propose", stage="acceptance", origin="llama.cpp#25345", spec=DENSE)
def speculation_is_silently_off(_: Any, propose: Method) -> Method:
    """Nothing is ever drafted, though speculation was asked for."""
    return lambda sequence, _count, draws: propose(sequence, 0, draws)


def blind(targets: Method, method: str) -> Method:
    """The target's laws, made while sampler.`method` sees nothing that came after the round began."""

    def changed(logits: Tensor, request: Any, generated: Any, tokens: Any, sampler: Any) -> Any:
        before = (*request.prompt, *generated) if method == "repetition_penalty" else tuple(generated)
        original = getattr(sampler, method)
        setattr(sampler, method, lambda z, about, _: original(z, about, before))
        try:
            return targets(logits, request, generated, tokens, sampler)
        finally:
            delattr(sampler, method)

    return changed


@engine_mutant(verifiers, "targets", stage="law", origin="vllm#9423", spec=DENSE)
def grammar_stands_still_over_drafts(_: Any, targets: Method) -> Method:
    """The grammar is not advanced with the drafts that are verified."""
    return blind(targets, "grammar")


@engine_mutant(verifiers, "targets", stage="law", spec=DENSE)
def repetition_overlooks_drafts(_: Any, targets: Method) -> Method:
    """The repetition penalty does not see drafts of the same round."""
    return blind(targets, "repetition_penalty")


@engine_mutant(verifiers, "targets", stage="law", spec=DENSE)
def presence_overlooks_drafts(_: Any, targets: Method) -> Method:
    """The presence penalty does not see drafts of the same round."""
    return blind(targets, "presence_penalty")


@engine_mutant(verifiers, "targets", stage="law", spec=DENSE)
def least_length_overlooks_drafts(_: Any, targets: Method) -> Method:
    """Whether min_tokens is reached is told by the tokens before the round."""
    return blind(targets, "min_tokens")


@engine_mutant(drafters, "propose", stage="seed", spec=DENSE)
def drafts_draw_from_a_copy(_: Any, propose: Method) -> Method:
    """Drafts are drawn by a copy of the generator that goes on to judge them with the same numbers."""

    def copied(sequence: Any, count: int, draws: Draws) -> Any:
        return propose(sequence, count, Draws(draws.generator.clone_state()))

    return copied


@engine_patched(stage="seed", spec=DENSE)
def seeded_requests_start_anew_each_round(engine: Any) -> None:
    """The generator of a request with a seed is seeded again in every round."""
    decide = engine.decide

    def seeded(sequence: Any, *rest: Any) -> None:
        if sequence.request.sampling.seed is not None:
            sequence.draws.generator.manual_seed(sequence.request.sampling.seed)
        decide(sequence, *rest)

    engine.decide = seeded


@engine_mutant(readers, "read", stage="acceptance", spec=DENSE)
def early_exit_skips_the_final_norm(reader: Any, read: Method) -> Method:
    """The first layers are read by the unembedding without the norm before it."""
    if not isinstance(reader.model, FirstLayers):
        return read
    norm: Any = reader.model.model.final_norm

    def bare(*given: Any, **more: Any) -> Any:
        norm.forward = lambda x, *_: x
        try:
            return read(*given, **more)
        finally:
            del norm.forward

    return bare


@engine_mutant(lookups, "following", stage="acceptance", spec=DENSE)
def lookup_goes_by_the_last_token(lookup: Any, following: Method) -> Method:
    """n-grams of one token alone are looked for."""
    lookup.ngram = 1
    return following


@engine_mutant(lookups, "following", stage="acceptance", spec=DENSE)
def lookup_finds_itself(_: Any, following: Method) -> Method:
    """What is proposed begins with the last token of the n-gram that was found."""
    return lambda tokens, count: (tokens[-1], *following(tokens, count))[:count] if count else ()
