"""Pages: what is shared is exactly what was asked for, and what is held is never given away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.reference import build
from harness.reference.engine.pages import PagePool
from suites.selftest.controls import generator, small

SIZE = 4


def pool(pages: int = 6, name: str = "mixtral-8x7b") -> PagePool:
    """A pool of pages of 4 tokens."""
    return PagePool(small(name), pages, SIZE, device=torch.device("cpu"), dtype=torch.float64)


def published(pages: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Pages taken for the whole pages of `tokens`, published and released."""
    taken = [pages.take() for _ in range(len(tokens) // SIZE)]
    for i, page in enumerate(taken):
        pages.publish(page, tokens[: (i + 1) * SIZE], salt)
    pages.release(taken)
    return taken


@pytest.mark.parametrize(("length", "shared"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (20, 2)])
def test_whole_pages_before_the_last_token_are_found(length: int, shared: int) -> None:
    """A prefix is found up to its last whole page, and never the page of the last token itself."""
    pages, tokens = pool(), list(range(20))
    taken = published(pages, tokens[:8])
    assert pages.find(tokens[:length], "") == taken[:shared]


def test_a_page_is_found_by_all_that_stands_before_it() -> None:
    """Equal tokens in a page are not enough: the tokens before it and the salt are compared too."""
    pages = pool()
    published(pages, [1, 2, 3, 4, 5, 6, 7, 8], salt="one")
    assert len(pages.find([1, 2, 3, 4, 5, 6, 7, 8, 9], "one")) == 2
    assert pages.find([1, 2, 3, 4, 5, 6, 7, 8, 9], "other") == []
    assert pages.find([5, 6, 7, 8, 9], "one") == []
    assert len(pages.find([1, 2, 3, 4, 0, 6, 7, 8, 9], "one")) == 1


def test_the_last_page_of_the_oldest_prefix_is_evicted_first() -> None:
    """Pages that nobody holds go in the order of their last use, and of one prefix from its end."""
    pages = pool(4)
    old, new = published(pages, list(range(8))), published(pages, list(range(10, 18)))
    assert [pages.take() for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert not pages.shared
    with pytest.raises(LookupError, match="all 4 pages are held"):
        pages.take()


def test_a_page_in_use_is_not_evicted() -> None:
    """A shared page stays as long as one of several sequences holds it."""
    pages = pool(2)
    (page,) = published(pages, [1, 2, 3, 4])
    pages.hold(page)
    pages.hold(page)
    pages.release([page])
    other = pages.take()
    with pytest.raises(LookupError):
        pages.take()
    pages.release([page])
    assert pages.take() == page
    assert other != page


def test_the_first_page_of_a_key_stays() -> None:
    """A second page of the same tokens is not shared, and is free when it is released."""
    pages = pool()
    (first,), (second,) = published(pages, [1, 2, 3, 4]), published(pages, [1, 2, 3, 4])
    assert pages.find([1, 2, 3, 4, 5], "") == [first]
    assert second in pages.free


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3"])
def test_what_is_written_is_gathered(name: str) -> None:
    """Keys and values of sequences of different lengths come back bit by bit, from pages in any order."""
    architecture = small(name)
    model, pages = build(architecture, dtype=torch.float64, generator=generator(1)), pool(name=name)
    tokens = torch.randint(architecture.vocab_size, (2, 9), generator=generator(2))
    with torch.no_grad():
        _, cache = model.extend(tokens, None)
    held, lengths = [[4, 0, 3], [2, 5]], [9, 6]
    for row in range(2):
        columns = torch.arange(lengths[row])
        pages.write(pages.slots(held[row], 0, lengths[row]), cache, torch.full_like(columns, row), columns)
    gathered = pages.gather(held, lengths)
    assert gathered.real.sum(1).tolist() == lengths
    for have, want in zip(gathered.layers, cache.layers, strict=True):
        assert torch.equal(have.keys[gathered.real], want.keys[gathered.real])
        assert torch.equal(have.values[gathered.real], want.values[gathered.real])


def test_padding_of_a_gathered_batch_is_zero() -> None:
    """Not even a NaN in another sequence's page reaches a row that is shorter than the batch."""
    pages = pool()
    for layer in (*pages.keys, *pages.values):
        layer.fill_(torch.nan)
    gathered = pages.gather([[0, 1], [2]], [5, 0])
    for layer in gathered.layers:
        assert layer.keys[0].isnan().all()
        assert (layer.keys[1] == 0).all()
        assert (layer.values[1] == 0).all()


MOVES = st.lists(st.tuples(st.sampled_from(["take", "share", "publish", "release"]), st.integers(0, 50)))


@settings(max_examples=200, deadline=None)
@given(MOVES)
def test_every_page_is_free_or_cached_or_held(moves: list[tuple[str, int]]) -> None:
    """Whatever is asked of a pool, its pages add up, and references count the holders."""
    pages, held = pool(5), list[list[int]]()
    for move, which in moves:
        tokens = [which % 3] * SIZE
        if move == "take" and pages.available:
            held.append([pages.take()])
        elif move == "share":
            held.append(pages.find([*tokens, 0], ""))
            for page in held[-1]:
                pages.hold(page)
        elif move == "publish" and held and held[which % len(held)]:
            pages.publish(held[which % len(held)][0], tokens, "")
        elif move == "release" and held:
            pages.release(held.pop(which % len(held)))
        counted = [sum(page in holder for holder in held) for page in range(5)]
        assert pages.references == counted
        idle = [*pages.free, *pages.cached]
        assert sorted(idle) == [page for page in range(5) if not counted[page]]
        assert pages.used == 5 - len(idle)
        assert {page: key for key, page in pages.shared.items()} == pages.key_of
        assert not set(pages.free) & set(pages.key_of)
