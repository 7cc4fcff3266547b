"""Defects by which requests of one batch disturb each other: padding, positions, rounding, and chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import engines
from harness.reference.engine.draws import Draws
from harness.reference.trace import Cache
from harness.spec.architecture import Architecture


def rotates(architecture: Architecture) -> bool:
    """The defect shows where positions are rotations."""
    return architecture.attention.rope is not None


@engine_mutant(engines, "forward", stage="isolation", origin="unsloth#3699")
def positions_are_those_of_the_longest(_: Any, forward: Method) -> Method:
    """All rows of a batch stand where the longest one does."""

    def changed(tokens: Tensor, past: Cache, real: Tensor, positions: Tensor) -> Any:
        return forward(tokens, past, real, positions.amax(0, keepdim=True).expand_as(positions))

    return changed


@engine_mutant(engines, "forward", stage="isolation", origin="nnsight#672")
def padding_of_a_batch_is_attended(_: Any, forward: Method) -> Method:
    """Short rows attend to the padding that makes them as long as the longest."""

    def changed(tokens: Tensor, past: Cache, real: Tensor, positions: Tensor) -> Any:
        return forward(tokens, Cache(past.layers, torch.ones_like(past.real)), real, positions)

    return changed


@engine_mutant(engines, "forward", stage="isolation", origin="llama.cpp#24823", applies=rotates)
def rope_is_chosen_by_the_longest(_: Any, forward: Method) -> Method:
    """Where any row of a batch is beyond 64 tokens, the angles of all rows are those for long texts."""

    def changed(tokens: Tensor, past: Cache, real: Tensor, positions: Tensor) -> Any:
        long = int(positions.max()) >= 64
        return forward(tokens, past, real, positions / 2 if long else positions)

    return changed


@engine_mutant(engines, "forward", stage="pages", applies=rotates)
def cached_keys_keep_their_old_angles(_: Any, forward: Method) -> Method:
    """Angles are rescaled as a text grows beyond 16 tokens, and those of the keys in the cache are not."""

    def changed(tokens: Tensor, past: Cache, real: Tensor, positions: Tensor) -> Any:
        return forward(tokens, past, real, positions * 16 / (positions + 1).clamp(min=16))

    return changed


@engine_mutant(engines, "compute", stage="isolation", origin="text-generation-inference#1411")
def rows_are_taken_to_be_equally_long(_: Any, compute: Method) -> Method:
    """Logits of a batch are found as if every row had fed as many tokens as the first."""

    def changed(rows: Sequence[Any]) -> list[Tensor]:
        found: list[Tensor] = compute(rows)
        flat, size = torch.cat(found), len(found[0])
        starts = (min(i * size, len(flat) - len(part)) for i, part in enumerate(found))
        return [flat[start : start + len(part)] for start, part in zip(starts, found, strict=True)]

    return changed


@engine_mutant(engines, "forward", stage="isolation", origin="vllm#32480")
def batches_are_summed_in_half_precision(_: Any, forward: Method) -> Method:
    """The kernel for more than one row keeps 8 bits of each logit, the one for a single row all of them."""

    def changed(tokens: Tensor, *rest: Any) -> Any:
        logits, cache = forward(tokens, *rest)
        return (logits.bfloat16().to(logits.dtype) if len(tokens) > 1 else logits), cache

    return changed


@engine_mutant(engines, "forward", stage="isolation", origin="vllm#45683")
def keys_of_batches_are_rounded(_: Any, forward: Method) -> Method:
    """Keys and values are rounded to 8 bits where a pass has more than 16 tokens."""

    def changed(tokens: Tensor, *rest: Any) -> Any:
        logits, cache = forward(tokens, *rest)
        if tokens.numel() <= 16:
            return logits, cache
        layers = (
            replace(one, keys=one.keys.bfloat16().to(one.keys), values=one.values.bfloat16().to(one.values))
            for one in cache.layers
        )
        return logits, Cache(tuple(layers), cache.real)

    return changed


@engine_mutant(engines, "compute", stage="isolation")
def neighbours_answers_are_swapped(_: Any, compute: Method) -> Method:
    """In a full batch of four the last two rows get each other's logits."""

    def changed(rows: Sequence[Any]) -> list[Tensor]:
        found: list[Tensor] = compute(rows)
        if len(found) >= 4 and len(found[-1]) == len(found[-2]):
            found[-1], found[-2] = found[-2], found[-1]
        return found

    return changed


@engine_mutant(engines, "leave", stage="isolation")
def static_batches_end_together(engine: Any, leave: Method) -> Method:
    """In a static batch the first that ends ends all."""

    def changed(sequence: Any) -> None:
        leave(sequence)
        if engine.limits.batching == "static" and sequence.completion.finish_reason == "length":
            for other in engine.scheduler.running:
                most = min(other.request.max_tokens, len(other.generated) + 1)
                other.request = replace(other.request, max_tokens=most)

    return changed


@engine_mutant(engines, "draws_of", stage="seed")
def unseeded_requests_start_alike(_: Any, draws_of: Method) -> Method:
    """Each request without a seed draws from a new generator, the same for all."""

    def changed(request: Any) -> Any:
        fresh = Draws(torch.Generator().manual_seed(0))
        return fresh if request.sampling.seed is None else draws_of(request)

    return changed


@engine_mutant(engines, "draws_of", stage="seed")
def equal_seeds_share_a_generator(_: Any, draws_of: Method) -> Method:
    """Requests of one seed draw from one generator by turns."""
    known: dict[int, Any] = {}

    def changed(request: Any) -> Any:
        seed = request.sampling.seed
        return draws_of(request) if seed is None else known.setdefault(seed, draws_of(request))

    return changed


@engine_mutant(engines, "draws_of", stage="seed", origin="vllm#6034")
def seeds_are_forgotten(engine: Any, _: Method) -> Method:
    """Requests with a seed draw from the engine's own generator."""
    return lambda _request: engine.draws


@engine_mutant(engines, "draws_of", stage="seed")
def seeds_depend_on_the_order(engine: Any, _: Method) -> Method:
    """A request's seed is added to its number in the engine."""

    def changed(request: Any) -> Any:
        seed = request.sampling.seed
        number = 0 if seed is None else seed + engine.requests - 1
        return engine.draws if seed is None else Draws(torch.Generator().manual_seed(number))

    return changed


@engine_patched(stage="seed", origin="vllm#9441")
def generators_advance_on_a_copy(engine: Any) -> None:
    """Beside requests without a seed, those with one draw from copies, and their generators stand still."""
    decide = engine.decide

    def changed(sequence: Any, *rest: Any) -> None:
        own = sequence.draws
        mixed = any(other.request.sampling.seed is None for other in engine.scheduler.running)
        if sequence.request.sampling.seed is not None and mixed:
            sequence.draws = Draws(torch.Generator().set_state(own.generator.get_state()))
        decide(sequence, *rest)
        sequence.draws = own

    engine.decide = changed


@engine_patched(stage="seed")
def seeds_are_consumed_by_prompts(engine: Any) -> None:
    """A request with a seed draws once for each chunk of its prompt, so that chunks decide what it draws."""
    advance = engine.advance

    def changed(row: Any, logits: Tensor) -> None:
        sequence = row.work.sequence
        if not sequence.generated and sequence.computed < sequence.length:
            sequence.draws.uniform()
        advance(row, logits)

    engine.advance = changed


@engine_mutant(engines, "draws_of", stage="seed")
def seeds_depend_on_the_salt(_: Any, draws_of: Method) -> Method:
    """The length of its salt is added to a request's seed."""

    def changed(request: Any) -> Any:
        seed = request.sampling.seed
        moved = None if seed is None else seed + len(request.salt)
        return draws_of(replace(request, sampling=replace(request.sampling, seed=moved)))

    return changed


@engine_mutant(engines, "draws_of", stage="seed")
def seeds_depend_on_log_probabilities(_: Any, draws_of: Method) -> Method:
    """Who asks for log probabilities is given the tokens of the next seed."""

    def changed(request: Any) -> Any:
        seed = request.sampling.seed
        moved = None if seed is None else seed + request.logprobs
        return draws_of(replace(request, sampling=replace(request.sampling, seed=moved)))

    return changed


@engine_mutant(engines, "draws_of", stage="seed")
def seed_0_is_no_seed(engine: Any, draws_of: Method) -> Method:
    """A seed of 0 is taken for none."""
    return lambda request: draws_of(request) if request.sampling.seed else engine.draws


@engine_mutant(engines, "forward", stage="pages", applies=rotates)
def positions_end_before_the_context(engine: Any, forward: Method) -> Method:
    """A table of positions is four too short, and all tokens beyond stand at its end."""
    last = engine.model.architecture.max_positions - 5

    def changed(tokens: Tensor, past: Cache, real: Tensor, positions: Tensor) -> Any:
        return forward(tokens, past, real, positions.clamp(max=last))

    return changed


@engine_mutant(engines, "add", stage="pages")
def the_last_place_is_lost_in_company(engine: Any, add: Method) -> Method:
    """A request that comes while others run may not use the last place of the context."""

    def changed(request: Any, **rest: Any) -> Any:
        most = engine.model.architecture.max_positions - 1 - len(request.prompt)
        if engine.scheduler.running and 0 < most < request.max_tokens:
            return add(replace(request, max_tokens=most), **rest)
        return add(request, **rest)

    return changed
