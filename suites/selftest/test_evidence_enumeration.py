"""Laws by enumeration: they equal what theory says, and what cannot be enumerated is said to be so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.evidence.enumeration import law
from harness.evidence.law import Law, generations
from harness.evidence.lazy import NotEnumerable
from harness.evidence.tape import Undetermined

P = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
Q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
EXACT = 1e-12
"""Thousands of roundings of float64, each of 1.1e-16 at most."""


def categorical(probabilities: Tensor) -> Law:
    """The law of one draw."""
    return Law({i: p for i, p in enumerate((probabilities / probabilities.sum()).tolist()) if p > 0})


def speculative(accept: Callable[[Tensor, Tensor], Tensor], residual: Tensor) -> int:
    """One position of speculative sampling with draft Q and target P."""
    token = int(torch.multinomial(Q, 1))
    if accept(P[token], Q[token]):
        return token
    return int(torch.multinomial(residual, 1))


def test_speculative_sampling_has_the_law_of_its_target() -> None:
    """A draft that is accepted with probability min(1, p / q), else redrawn from (p - q)+, has law p."""
    found = law(lambda: speculative(lambda p, q: torch.rand(()) < p / q, (P - Q).clamp(min=0)))
    assert found.tv(categorical(P)) < EXACT
    # three drafts of probability at least q are accepted at once or not; token 3 never is: 1 + 1 + 3 + 2
    assert found.paths == 7


@pytest.mark.parametrize("residual", [P, (P - Q).clamp(min=0).softmax(0)], ids=["target", "softmax"])
def test_a_wrong_residual_has_the_wrong_law(residual: Tensor) -> None:
    """A residual of p itself, or through softmax, moves the law by a distance that can be had by hand."""
    found = law(lambda: speculative(lambda p, q: torch.rand(()) < p / q, residual))
    kept = torch.minimum(P, Q)
    by_hand = categorical(kept + (1 - kept.sum()) * residual / residual.sum())
    assert found.tv(by_hand) < EXACT
    assert found.tv(categorical(P)) > 0.1
    assert by_hand.tv(categorical(P)) == pytest.approx(found.tv(categorical(P)), abs=EXACT)


def test_one_uniform_for_two_decisions_is_seen() -> None:
    """Two positions that share one uniform number have another joint law than two that do not."""

    def own() -> tuple[bool, bool]:
        u = torch.rand(2)
        return bool(u[0] < 0.5), bool(u[1] < 0.7)

    def shared() -> tuple[bool, bool]:
        u = torch.rand(())
        return bool(u < 0.5), bool(u < 0.7)

    both = Law({(a, b): 0.5 * (0.7 if b else 0.3) for a in (True, False) for b in (True, False)})
    assert law(own).tv(both) < EXACT
    found = law(shared)
    assert found.tv(Law({(True, True): 0.5, (False, True): 0.2, (False, False): 0.3})) < EXACT
    # each of the four outcomes moves by 0.15
    assert found.tv(both) == pytest.approx(0.3, abs=EXACT)
    worst = found.largest_difference(both)
    assert abs(worst.here - worst.there) == pytest.approx(0.15, abs=EXACT)
    assert (worst.here, worst.there) == (found[worst.outcome], both[worst.outcome])


COMPARISONS: list[Callable[[Tensor], Tensor]] = [
    lambda u: u < 0.25,
    lambda u: u <= torch.tensor([0.25]),
    lambda u: torch.gt(torch.tensor(0.25), u),
    lambda u: torch.tensor(0.25) >= u,
    lambda u: ~(u > 0.25),
    lambda u: ~(u >= 0.25),
    lambda u: 1 - u > 0.75,
    lambda u: -u > -0.25,
    lambda u: 2 * u - 1 < -0.5,
    lambda u: (u - 1) / 4 < -0.1875,
    lambda u: torch.sub(1, u, alpha=2) > 0.5,
    lambda u: torch.lt(u.view(1, 1).double().unsqueeze(0), 0.25).reshape(1),
    lambda u: u.expand(1).clone().to("cpu", torch.float64)[torch.tensor([0])] < 0.25,
    lambda u: torch.cat([u, u])[:1] < 0.25,
    lambda u: torch.stack([u, u]).unbind()[1] < 0.25,
    lambda u: u.item() < 0.25,
    lambda u: torch.searchsorted(torch.tensor([0.25, 2.0]), u) == 0,
    lambda u: torch.bucketize(u, torch.tensor([0.25])) == 0,
    lambda u: (torch.tensor([0.1, 0.25, 2.0]) < u).sum() < 2,
]
"""Ways to ask whether a uniform number [1] is below a quarter."""


@pytest.mark.parametrize("which", range(len(COMPARISONS)))
def test_every_form_of_a_comparison_has_the_same_law(which: int) -> None:
    """However a uniform number is moved, cast, scaled and compared, a quarter of it lies below 0.25."""
    assert law(lambda: bool(COMPARISONS[which](torch.rand(1)))).tv(Law({True: 0.25, False: 0.75})) < 1e-7


def test_nothing_compares_with_nan_and_the_impossible_takes_no_path() -> None:
    """0 / 0 accepts nothing; thresholds outside of [0, 1) have one answer."""
    assert law(lambda: bool(torch.rand(()) < torch.tensor(float("nan")))) == Law({False: 1.0})
    assert law(lambda: bool(torch.rand(()) * 0 < 0.0)) == Law({False: 1.0})
    found = law(lambda: bool(torch.rand(()) < float("inf")) and not bool(torch.rand(()) < 0))
    assert dict(found) == {True: 1.0}
    assert found.paths == 1


def gumbel() -> int:
    """log p + Gumbel noise from uniforms."""
    return int((P.log() - torch.log(-torch.log(torch.rand_like(P)))).argmax())


def race() -> int:
    """p / e, in place, as engines do."""
    noise = torch.empty_like(P)
    noise.exponential_()
    return int(P.clone().div_(noise).argmax(dim=-1))


def scaled() -> int:
    """The smallest of e / p."""
    noise = torch.empty(1, 4).exponential_()
    return int((noise / P).argmin(dim=-1, keepdim=True)[0, 0])


def inverse() -> int:
    """The inverse distribution function."""
    return int(torch.searchsorted(P.cumsum(0), torch.empty(1, dtype=torch.float64).uniform_()))


def in_place() -> int:
    """Gumbel noise made within one tensor, onto logits that it changes."""
    noise, logits = torch.empty_like(P), P.log()
    noise.exponential_().log_()
    noise.neg_()
    logits.add_(noise)
    return int(logits.argmax())


@pytest.mark.parametrize("draw", [gumbel, race, scaled, inverse, in_place])
def test_other_ways_to_draw_a_token_have_its_law(draw: Callable[[], int]) -> None:
    """Gumbel noise, exponential races and inverse distribution functions draw from p."""
    found = law(draw)
    assert found.tv(categorical(P)) < EXACT
    assert found.paths == 3


def test_multinomial_draws_rows_and_repetitions_independently() -> None:
    """[B, V] rows and several samples each, with and without replacement."""
    rows = torch.stack([P, Q])
    found = law(lambda: tuple(torch.multinomial(rows, 1).flatten().tolist()))
    assert found.tv(Law({(a, b): float(P[a] * Q[b]) for a in range(4) for b in range(4)})) < EXACT
    twice = law(lambda: tuple(P.multinomial(2, replacement=True).tolist()))
    assert twice[(0, 0)] == pytest.approx(0.25)
    apart = law(lambda: tuple(torch.multinomial(P, 2).tolist()))
    assert apart[(0, 1)] == pytest.approx(0.5 * 0.3 / 0.5)
    assert apart[(0, 0)] == 0


def test_what_torch_refuses_is_refused() -> None:
    """Weights without mass are an error of the program, in torch's own words."""
    with pytest.raises(RuntimeError, match="invalid multinomial distribution"):
        law(lambda: int(torch.multinomial(torch.zeros(3), 1)))


def seen_through_a_view() -> int:
    """Noise that is read through another name for its memory."""
    noise = torch.zeros(4)
    row = noise.view(1, 4)
    noise.exponential_()
    return int((P / row).argmax())


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: float((P / torch.rand(4)).sum()), "div"),
    (lambda: float(torch.rand(()).exp()), "exp"),
    (lambda: float(torch.rand(())), "_local_scalar_dense"),
    (lambda: bool(torch.rand(()) < torch.rand(())), "lt"),
    (lambda: int(torch.rand(()) * 4), "_local_scalar_dense"),
    (lambda: torch.rand(1).long().item(), "_to_copy"),
    (lambda: float(torch.randn(())), "randn"),
    (lambda: int(torch.nn.functional.gumbel_softmax(P.log()).argmax()), "gumbel_softmax"),
    (lambda: int(torch.zeros(2, 4)[0].exponential_().argmax()), "view of a tensor"),
    (seen_through_a_view, "view of a tensor"),
    (lambda: int(torch.multinomial(torch.ones(4).exponential_(), 1)), "multinomial"),
    (lambda: int(torch.empty(4).exponential_().argmax()), "argmax"),
    (lambda: int(torch.empty(4).exponential_().zero_().argmax()), "zero_"),
    (lambda: int(torch.zeros(4).copy_(torch.empty(4).exponential_()).argmin()), "copy_"),
    (lambda: int(P.expand(2, 4).div(torch.empty(1, 4).exponential_()).argmax(-1)[0]), "something else"),
]
"""Programs without a finite number of paths, and what the error names."""


@pytest.mark.parametrize("which", range(len(REFUSED)))
def test_what_cannot_be_enumerated_is_named(which: int) -> None:
    """An operator without a finite number of answers is an error that names it."""
    program, named = REFUSED[which]
    with pytest.raises(NotEnumerable, match=named):
        law(program)


def test_an_engine_that_catches_everything_cannot_hide_it() -> None:
    """An exception of the enumeration that the program swallows is raised at the end of the run."""

    def engine() -> str:
        try:
            return str(float(torch.rand(())))
        except RuntimeError:
            return "error"

    with pytest.raises(NotEnumerable):
        law(engine)


def test_exponentials_that_decide_two_races_are_refused() -> None:
    """A race that is run twice with the same noise has a joint law that is not enumerated."""

    def twice() -> tuple[int, int]:
        noise = torch.empty(4, dtype=torch.float64).exponential_()
        return int((P / noise).argmax()), int((Q / noise).argmax())

    with pytest.raises(NotEnumerable, match="something else too"):
        law(twice)


def test_a_program_with_memory_is_undetermined() -> None:
    """Probabilities or a number of draws that change from run to run are an error, not a law."""
    runs: list[int] = []

    def drifting() -> int:
        runs.append(0)
        return int(torch.multinomial(torch.tensor([1.0, len(runs)]), 1))

    with pytest.raises(Undetermined, match="no function of its draws"):
        law(drifting)
    calls: list[int] = []

    def shrinking() -> int:
        calls.append(0)
        return int(torch.multinomial(P, 1)) if len(calls) == 1 else 0

    with pytest.raises(Undetermined, match="made 1 draws or more"):
        law(shrinking)


def test_a_draw_that_escapes_is_noticed() -> None:
    """A random number that reached the global generator makes the law undetermined."""
    dropout = torch.nn.functional.dropout

    def escaping() -> bool:
        return bool(dropout(torch.ones(8), 0.5)[0] > 0)

    with pytest.raises(Undetermined, match="cannot be intercepted"):
        law(escaping)


def test_draws_under_other_names_are_followed() -> None:
    """A function imported from torch, with its own generator, on some paths only, is no way around."""
    kept, generator = torch.multinomial, torch.Generator().manual_seed(0)

    def program() -> tuple[int, ...]:
        first = int(torch.multinomial(P, 1))
        return (first, int(kept(Q, 1, generator=generator))) if first == 2 else (first,)

    found = law(program)
    assert found.of(lambda tokens: tokens[0]).tv(categorical(P)) < EXACT
    assert found[(2, 3)] == pytest.approx(0.08, abs=EXACT)
    assert torch.multinomial is kept


def test_other_threads_and_later_calls_draw_as_ever() -> None:
    """Interception holds in the calling thread, for the duration of the call."""
    drawn: list[float] = []

    def program() -> int:
        thread = threading.Thread(
            target=lambda: drawn.append(float(torch.rand((), generator=torch.Generator().manual_seed(1))))
        )
        thread.start()
        thread.join()
        return int(torch.multinomial(P, 1))

    assert law(program).paths == 3
    expected = float(torch.rand((), generator=torch.Generator().manual_seed(1)))
    assert drawn == [expected] * 3


def test_too_many_paths_and_pruned_ones_are_counted() -> None:
    """The search ends at `most_paths`; what is pruned is added to every distance."""

    def many() -> tuple[int, ...]:
        return tuple(int(torch.multinomial(Q, 1)) for _ in range(3))

    with pytest.raises(NotEnumerable, match="more than 10 paths"):
        law(many, most_paths=10)
    full, rough = law(many), law(many, prune=0.02)
    assert full.paths == 64
    assert rough.paths < 40
    assert rough.mass + rough.pruned == pytest.approx(1, abs=EXACT)
    assert rough.tv(full) == pytest.approx(rough.pruned, abs=EXACT)


def test_an_outcome_must_be_comparable() -> None:
    """A tensor equals nothing but itself, so it is refused as an outcome."""
    with pytest.raises(TypeError, match="return a number or a tuple"):
        law(lambda: torch.multinomial(P, 1))


def test_generations_follow_the_chain_rule() -> None:
    """The law of sequences from conditionals equals the enumerated one, with a stop rule."""
    table = {0: P, 1: Q, 2: Q.flip(0), 3: P.flip(0)}

    def following(prefix: tuple[int, ...]) -> Tensor:
        return table[prefix[-1]] if prefix else Q

    def ended(prefix: tuple[int, ...]) -> bool:
        return len(prefix) == 3 or 2 in prefix

    def program() -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        while not ended(tokens):
            tokens = (*tokens, int(torch.multinomial(following(tokens), 1)))
        return tokens

    target = generations(following, ended)
    assert target.mass == pytest.approx(1, abs=EXACT)
    assert law(program).tv(target) < EXACT
    assert target.expect(len) == pytest.approx(law(program).expect(len))
    assert target.of(lambda tokens: tokens[0]).tv(categorical(Q)) < EXACT
    with pytest.raises(ValueError, match="sum to"):
        generations(lambda _: [0.5, 0.4], ended)


def test_transformers_assisted_generation_has_the_law_of_plain_generation() -> None:
    """Plain and assisted sampling of a tiny llama follow the softmax of its logits."""
    transformers = pytest.importorskip("transformers")

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        made = transformers.LlamaForCausalLM(config).eval().double()
        made.lm_head.weight.data *= 20
        made.generation_config.eos_token_id = None
        return made

    target, draft = model(0), model(1)
    draft.generation_config.num_assistant_tokens = 2
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    prompt = torch.tensor([[1, 0]])

    @torch.no_grad()
    def generate(by: Any, **options: Any) -> tuple[int, ...]:
        mask = torch.ones_like(prompt)
        answer = by.generate(prompt, attention_mask=mask, do_sample=True, max_new_tokens=3, **options)
        return tuple(answer[0, 2:].tolist())

    @torch.no_grad()
    def following(prefix: tuple[int, ...]) -> Tensor:
        tokens = torch.cat([prompt, torch.tensor([prefix], dtype=torch.long)], dim=1)
        logits: Tensor = target(tokens).logits[0, -1]
        return logits.softmax(-1)

    exact = generations(following, lambda tokens: len(tokens) == 3)
    # generate() takes the softmax in float32, three times: 3 x 6e-8 of each probability
    assert law(lambda: generate(target)).tv(exact) < 1e-6
    assert law(lambda: generate(target, assistant_model=draft)).tv(exact) < 1e-6
    assert law(lambda: generate(draft)).tv(exact) > 0.1
