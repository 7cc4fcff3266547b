"""Defects of shared prefixes: under which key a page is found, when it is shared, what a hit leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import engines, pools, schedulers
from harness.reference.trace import Cache
from harness.spec.architecture import Architecture


def has_windows(architecture: Architecture) -> bool:
    """The defect shows where some layers attend to a window."""
    return architecture.attention.window is not None


@engine_mutant(pools, "key", stage="prefix", origin="vllm#44701")
def salt_is_no_part_of_the_key(_: Any, key: Method) -> Method:
    """Prefixes are shared among tenants."""
    return lambda tokens, _salt: key(tokens, "")


@engine_mutant(pools, "key", stage="prefix", origin="vllm#30931")
def adapters_share_prefixes(_: Any, key: Method) -> Method:
    """A salt keeps tenants apart, and adapters not."""
    return lambda tokens, salt: key(tokens, "" if salt.startswith("adapter:") else salt)


@engine_mutant(pools, "key", stage="prefix")
def salts_are_cut_short(_: Any, key: Method) -> Method:
    """Salts that begin alike, by their first six letters, are one."""
    return lambda tokens, salt: key(tokens, salt[:6])


@engine_mutant(pools, "key", stage="prefix")
def salts_ignore_case_and_blanks(_: Any, key: Method) -> Method:
    """Salts are normalised like words: blanks around them and capital letters are lost."""
    return lambda tokens, salt: key(tokens, salt.strip().lower())


@engine_mutant(pools, "key", stage="prefix", origin="openvino.genai#3722")
def prefixes_are_told_apart_by_4_bits(_: Any, key: Method) -> Method:
    """A page is found by 4 bits of a hash, and its tokens are not compared."""
    return lambda tokens, salt: key([len(tokens), hash(tuple(tokens)) & 0xF], salt)


@engine_mutant(pools, "key", stage="prefix", origin="vllm#12621")
def prefixes_are_told_apart_by_8_bits(_: Any, key: Method) -> Method:
    """A page is found by 8 bits of a hash, and its tokens are not compared."""
    return lambda tokens, salt: key([len(tokens), hash(tuple(tokens)) & 0xFF], salt)


@engine_mutant(pools, "key", stage="prefix")
def pages_are_found_without_what_precedes(pool: Any, key: Method) -> Method:
    """A page's key holds its own tokens, not those before it."""
    return lambda tokens, salt: key([len(tokens), *tokens[-pool.page_size :]], salt)


@engine_mutant(pools, "key", stage="prefix")
def prefixes_are_told_apart_by_their_sum(_: Any, key: Method) -> Method:
    """A page's key is the sum of all tokens up to its end."""
    return lambda tokens, salt: key([len(tokens), sum(tokens)], salt)


@engine_mutant(pools, "key", stage="prefix")
def prefixes_are_told_apart_by_their_ends(_: Any, key: Method) -> Method:
    """A page's key is the first and the last token of the prefix."""
    return lambda tokens, salt: key([len(tokens), tokens[0], tokens[-1]], salt)


@engine_mutant(pools, "find", stage="prefix")
def half_a_page_is_a_hit(pool: Any, find: Method) -> Method:
    """A page whose first half has the right tokens is shared as if all of it had."""

    def changed(tokens: Sequence[int], salt: str) -> list[int]:
        found: list[int] = find(tokens, salt)
        start, size = len(found) * pool.page_size, pool.page_size
        sought = tuple(tokens[: start + size // 2])
        if len(tokens) > start + size:
            for (known_salt, known), page in pool.shared.items():
                alike = known[: len(sought)] == sought and len(known) == start + size
                if alike and known_salt == salt:
                    return [*found, page]
        return found

    return changed


@engine_mutant(pools, "find", stage="fault")
def whole_prompt_is_a_hit(pool: Any, find: Method) -> Method:
    """A prompt that is cached whole leaves nothing to compute, so that its answer never starts."""
    return lambda tokens, salt: find([*tokens, 0] if len(tokens) % pool.page_size == 0 else tokens, salt)


@engine_mutant(schedulers, "place", stage="prefix", origin="sglang#38140")
def prompts_are_shared_before_they_are_computed(scheduler: Any, place: Method) -> Method:
    """Pages of a prompt are shared as soon as it has them."""

    def changed(sequence: Any) -> bool:
        placed: bool = place(sequence)
        if placed:
            share(scheduler, sequence, len(sequence.request.prompt))
        return placed

    return changed


@engine_mutant(schedulers, "leave", stage="prefix", origin="sglang#38355")
def what_was_given_up_is_shared(scheduler: Any, leave: Method) -> Method:
    """A request that ends in the middle of its prompt shares all pages of the prompt."""

    def changed(sequence: Any) -> None:
        if sequence.pages:
            share(scheduler, sequence, len(sequence.request.prompt))
        leave(sequence)

    return changed


def share(scheduler: Any, sequence: Any, upto: int) -> None:
    """Publish the pages of a sequence's first tokens, whatever lies in them."""
    size = scheduler.pool.page_size
    for page in range(min(upto // size, len(sequence.pages))):
        scheduler.pool.publish(
            sequence.pages[page], sequence.tokens[: (page + 1) * size], sequence.request.salt
        )


@engine_mutant(schedulers, "rollback", stage="prefix", origin="sglang#23392")
def rejected_drafts_are_shared(scheduler: Any, rollback: Method) -> Method:
    """A page that a window completed is copied to the shared store before its rejected part is redone."""
    pool = scheduler.pool

    def changed(sequence: Any) -> None:
        size, end = pool.page_size, sequence.length
        if end % size == 0 and sequence.computed >= end and pool.free:
            copy, page = pool.take(), sequence.pages[end // size - 1]
            for store in (*pool.keys, *pool.values):
                store[copy * size : (copy + 1) * size] = store[page * size : (page + 1) * size]
            pool.publish(copy, sequence.tokens, sequence.request.salt)
            pool.release([copy])
        rollback(sequence)

    return changed


def on_first_pass(engine: Any, compute: Method, change: Any) -> Method:
    """compute(rows) whose positions are change(starts [B, 1], positions): starts are the tokens found in the
    cache for rows that begin after a hit, else 0."""
    forward = engine.forward

    def changed(rows: Sequence[Any]) -> Any:
        sequences = [row.work.sequence for row in rows]
        hit = [s.computed == s.cached_tokens and not s.generated for s in sequences]
        begins = [s.cached_tokens if yes else 0 for s, yes in zip(sequences, hit, strict=True)]
        starts = torch.tensor(begins)[:, None]

        def moved(tokens: Tensor, past: Cache, real: Tensor, positions: Tensor) -> Any:
            return forward(tokens, past, real, change(starts, positions))

        engine.forward = moved
        return compute(rows)

    return changed


@engine_mutant(engines, "compute", stage="prefix", origin="tenstorrent/vllm#415")
def positions_after_a_hit_start_at_0(engine: Any, compute: Method) -> Method:
    """What follows a cached prefix is computed as if it stood at the beginning."""
    return on_first_pass(engine, compute, lambda starts, positions: (positions - starts).clamp(min=0))


@engine_mutant(engines, "compute", stage="prefix")
def positions_after_a_hit_are_one_less(engine: Any, compute: Method) -> Method:
    """What follows a cached prefix stands one place too early."""
    return on_first_pass(engine, compute, lambda starts, positions: positions - (starts > 0).long())


@engine_patched(stage="prefix", origin="kvcached#446", spec="gpt-oss-20b", applies=has_windows)
def pages_behind_the_window_are_dropped_though_shared(engine: Any) -> None:
    """Layers with a window drop what lies behind it, while a shorter request may still find it."""
    publish = engine.scheduler.publish

    def changed(sequence: Any, since: int) -> None:
        publish(sequence, since)
        drop_behind_window(engine, sequence)

    engine.scheduler.publish = changed


@engine_patched(stage="rollback", origin="vllm#47728", spec="gpt-oss-20b", applies=has_windows)
def windows_move_on_with_rejected_drafts(engine: Any) -> None:
    """Layers with a window drop what lies behind that of the last draft, though it was rejected."""
    rollback = engine.scheduler.rollback

    def changed(sequence: Any) -> None:
        drop_behind_window(engine, sequence)
        rollback(sequence)

    engine.scheduler.rollback = changed


def drop_behind_window(engine: Any, sequence: Any) -> None:
    """Blank, in layers with a window, the keys and values that no token after the computed ones sees."""
    a, pool = engine.model.architecture, engine.pool
    slots = pool.slots(sequence.pages, 0, max(0, sequence.computed - a.attention.window + 1))
    for layer in filter(a.is_window_layer, range(a.n_layers)):
        pool.keys[layer][slots] = 0
        pool.values[layer][slots] = 0


@engine_mutant(schedulers, "place", stage="counters")
def cached_tokens_are_counted_short(scheduler: Any, place: Method) -> Method:
    """The first page that was found in the cache is not counted."""

    def changed(sequence: Any) -> bool:
        placed: bool = place(sequence)
        sequence.cached_tokens = max(sequence.cached_tokens - scheduler.pool.page_size, 0)
        return placed

    return changed


@engine_mutant(schedulers, "place", stage="counters")
def cached_tokens_are_counted_when_recomputed(_: Any, place: Method) -> Method:
    """What a preempted request finds of its own answer counts as found of its prompt."""

    def changed(sequence: Any) -> bool:
        placed: bool = place(sequence)
        if placed:
            sequence.cached_tokens = sequence.computed
        return placed

    return changed


@engine_patched(stage="counters")
def sharing_cannot_be_turned_off(engine: Any) -> None:
    """Prefixes are shared whatever the limits say."""
    engine.scheduler.limits = replace(engine.scheduler.limits, prefix_sharing=True)


@engine_mutant(pools, "find", stage="prefix")
def only_first_pages_are_found(_: Any, find: Method) -> Method:
    """Of a known prefix the first page is used."""
    return lambda tokens, salt: find(tokens, salt)[:1]


@engine_mutant(pools, "evict", stage="prefix")
def latest_prefixes_are_given_up(pool: Any, evict: Method) -> Method:
    """A full pool gives up what was used last."""

    def changed() -> None:
        if pool.cached:
            pool.cached.move_to_end(next(reversed(pool.cached)), last=False)
        evict()

    return changed


@engine_mutant(pools, "release", stage="prefix")
def beginnings_are_given_up_first(_: Any, release: Method) -> Method:
    """Of a prefix the first page is evicted first, without which the others are never found."""
    return lambda pages: release(list(reversed(pages)))


@engine_mutant(pools, "find", stage="prefix")
def without_a_salt_all_are_found(pool: Any, find: Method) -> Method:
    """A request without a salt finds the prefixes of every tenant."""

    def changed(tokens: Sequence[int], salt: str) -> Any:
        salts = [salt] if salt else ["", *(known for known, _ in pool.shared)]
        return max((find(tokens, one) for one in salts), key=len)

    return changed


@engine_mutant(schedulers, "publish", stage="prefix")
def salts_are_those_of_the_batch(scheduler: Any, publish: Method) -> Method:
    """What a batch computes is shared under the salt of its last request."""

    def changed(sequence: Any, since: int) -> None:
        own, running = sequence.request, scheduler.running
        sequence.request = replace(own, salt=running[-1].request.salt if running else own.salt)
        publish(sequence, since)
        sequence.request = own

    return changed


@engine_mutant(schedulers, "publish", stage="prefix")
def last_tokens_are_shared_before_they_are_fed(scheduler: Any, publish: Method) -> Method:
    """A page is shared when the last of its tokens is decided, though an answer may end with that."""

    def changed(sequence: Any, since: int) -> None:
        publish(sequence, since)
        size, end = scheduler.pool.page_size, sequence.length
        if end % size == 0 and end // size <= len(sequence.pages):
            scheduler.pool.publish(sequence.pages[end // size - 1], sequence.tokens, sequence.request.salt)

    return changed
