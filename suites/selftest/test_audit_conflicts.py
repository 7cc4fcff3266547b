"""Minimal conflicts and leave-one-out optima against brute force."""

from __future__ import annotations

import math
import random
import time
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest

from harness.audit import audit
from harness.audit.conflicts import members_of, minimal_conflicts
from harness.audit.deciders import deciders, steps
from harness.audit.optima import Optima
from harness.spec.printed import interval
from harness.theory import parameters
from suites.selftest.small_specs import BASE, claim, spec


def subsets(n):
    """All sets of n members, as bits."""
    return [sum(1 << i for i in kept) for size in range(n + 1) for kept in combinations(range(n), size)]


@pytest.mark.parametrize("seed", range(40))
def test_minimal_conflicts_are_the_minimal_sets_that_no_pattern_contains(seed):
    """The minimal conflicts are exactly the unsatisfied sets of which every proper subset is satisfied."""
    draw = random.Random(seed)
    n = draw.randint(1, 7)
    patterns = [draw.getrandbits(n) for _ in range(draw.randint(1, 8))]
    broken = [s for s in subsets(n) if not any(p & s == s for p in patterns)]
    expected = {s for s in broken if not any(other != s and other & s == other for other in broken)}
    found = minimal_conflicts(patterns, (1 << n) - 1)
    assert set(found) == expected
    assert len(found) == len(set(found))


def test_a_pattern_that_holds_everything_leaves_no_conflict():
    """Where all members hold at some completion, there is no conflict."""
    assert minimal_conflicts([0b01, 0b11], 0b11) == []


def test_members_are_the_positions_of_the_set_bits():
    """A set's members are the places of its bits."""
    assert members_of(0b10110) == [1, 2, 4]


def block(names, kinds, patterns):
    """What `Optima` reads of a block: claims and patterns."""
    tests = [SimpleNamespace(claim=SimpleNamespace(id=name, kind=kinds[name])) for name in names]
    return SimpleNamespace(tests=tests, patterns=np.array(sorted(set(patterns)), dtype=np.int64))


def brute(blocks, kinds, claim):
    """Every combination of one pattern per block, scored as the definition says."""
    best, winners = None, []

    def scored(choice):
        held = {}
        for one, pattern in zip(blocks, choice, strict=True):
            for place, test in enumerate(one.tests):
                name = test.claim.id
                held[name] = held.get(name, True) and bool(pattern >> place & 1)
        others = [name for name, holds in held.items() if holds and name != claim]
        return (
            sum(kinds[name] == "claim" for name in others),
            sum(kinds[name] == "assumption" for name in others),
        )

    choices = [()]
    for one in blocks:
        choices = [(*choice, pattern) for choice in choices for pattern in one.patterns.tolist()]
    for choice in choices:
        score = scored(choice)
        if best is None or score > best:
            best, winners = score, []
        if score == best:
            winners.append(choice)
    return winners


@pytest.mark.parametrize("seed", range(200))
def test_optima_are_those_of_all_combinations_of_completions(seed):
    """What is admitted without a claim is what an exhaustive search over all blocks together admits."""
    draw = random.Random(seed)
    names = [f"c{i}" for i in range(7)]
    kinds = {name: draw.choice(["claim", "claim", "assumption"]) for name in names}
    blocks = []
    for _ in range(draw.randint(1, 4)):
        own = draw.sample(names, draw.randint(1, 5))
        blocks.append(block(own, kinds, [draw.getrandbits(len(own)) for _ in range(draw.randint(1, 6))]))
    claim = draw.choice([test.claim.id for test in blocks[0].tests])
    for place, admitted in Optima(blocks).admitted(claim).items():
        assert set(admitted.tolist()) == {choice[place] for choice in brute(blocks, kinds, claim)}


def test_many_small_blocks_that_share_claims_are_cheap():
    """40 blocks in a ring, each sharing claims with its neighbours, of which a third cannot hold together."""
    draw = random.Random(5)
    names = [f"c{i}" for i in range(80)]
    kinds = dict.fromkeys(names, "claim")
    blocks = []
    for i in range(40):
        own = [names[(2 * i + k) % 80] for k in range(4)]
        patterns = [draw.getrandbits(4) for _ in range(8)] + [0b1111] * (i % 3 > 0)
        blocks.append(block(own, kinds, patterns))
    optima = Optima(blocks)
    start = time.perf_counter()
    found = [optima.admitted(name) for name in names]
    # 0.3 s here for 80 optima of 40 coupled blocks, where all subsets of 80 claims would never end
    assert time.perf_counter() - start < 20
    assert all(len(patterns) for one in found for patterns in one.values())


AXES = {"gpus": [10, 20, 40], "days": [1, 2, 5], "gpu_hour_usd": [1, 2, 3], "context": [1, 2]}
TRAINING = "".join(f"{name} = {values}\n" for name, values in AXES.items())
QUANTITIES = {
    "training.cost": lambda gpus, days, gpu_hour_usd, context: gpus * days * 24 * gpu_hour_usd,
    "training.gpus": lambda gpus, days, gpu_hour_usd, context: gpus,
    "training.days": lambda gpus, days, gpu_hour_usd, context: days,
    "training.gpu_hour_usd": lambda gpus, days, gpu_hour_usd, context: gpu_hour_usd,
    "training.context": lambda gpus, days, gpu_hour_usd, context: context,
}
"""The same quantities as in the audit, written here again."""


def printed(draw, value):
    """A figure for about such a value: exact, rounded, a bound or a range."""
    return draw.choice([f"{value}", f"<{value}", f">{value}", f"{value}-{2 * value}", f"{value * 1.3:.1e}"])


def random_claims(draw):
    """Claims on a cost and the axes that it has, and on an axis of another block."""
    names = [draw.choice(list(QUANTITIES)) for _ in range(draw.randint(2, 7))]
    figures = {}
    for i, name in enumerate(names):
        here = {axis: draw.choice(values) for axis, values in AXES.items()}
        figures[f"c{i}"] = (name, printed(draw, QUANTITIES[name](**here)))
    return figures


def exhaustive(figures):
    """At every completion of all axes together: the claims that hold."""
    found = set()
    for values in product(*AXES.values()):
        here = dict(zip(AXES, values, strict=True))
        held = {c for c, (name, text) in figures.items() if QUANTITIES[name](**here) in interval(text)}
        found.add(frozenset(held))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_conflicts_of_random_specs_are_all_the_minimal_ones(tmp_path, seed):
    """Against brute force: no completion holds all members, removing any one of them leaves one that does."""
    figures = random_claims(random.Random(seed))
    texts = [claim(c, name, (text, "", "A")) for c, (name, text) in figures.items()]
    base = BASE.replace("gpus = [10, 20]\n", TRAINING)
    found = {
        frozenset(member.claim.id for member in conflict.members)
        for conflict in audit(spec(tmp_path, *texts, base=base)).conflicts
    }
    held = exhaustive(figures)
    for members in found:
        assert not any(members <= one for one in held)
        assert all(any(members - {dropped} <= one for one in held) for dropped in members)
    every = [frozenset(kept) for n in range(1, len(figures) + 1) for kept in combinations(figures, n)]
    broken = [one for one in every if not any(one <= other for other in held)]
    assert found == {one for one in broken if not any(other < one for other in broken)}


@pytest.mark.parametrize("seed", range(60))
def test_verdicts_of_random_specs_are_leave_one_out(tmp_path, seed):
    """Against brute force: where as many other claims as possible hold, the figure holds always, or not."""
    figures = random_claims(random.Random(seed))
    texts = [claim(c, name, (text, "", "A")) for c, (name, text) in figures.items()]
    base = BASE.replace("gpus = [10, 20]\n", TRAINING)
    held = exhaustive(figures)
    for verdict in audit(spec(tmp_path, *texts, base=base)).verdicts:
        name = verdict.claim.id
        most = max(len(one - {name}) for one in held)
        answers = {name in one for one in held if len(one - {name}) == most}
        expected = "undetermined" if len(answers) > 1 else "consistent" if True in answers else "contradicts"
        assert verdict.outcome == expected


TOKENS = [1_000_000, 2_000_000, 5_000_000]
BASELINE = 1000
LINKED = {
    "parameters.active": ("architecture", "run", "davinci"),
    "parameters.total": ("architecture",),
    "architecture.n_layers": ("architecture",),
    "architecture.d_model": ("architecture",),
    "training.flops": ("run",),
    "training.tokens": ("run",),
    "parameters.active_growth": ("davinci",),
}
"""Quantities and the blocks that test them; "run" and "davinci" take the active parameters as given."""
EXTRAS = {
    "parameters.active": 'given = { convention = "all" }',
    "parameters.total": 'given = { convention = "all" }',
    "parameters.active_growth": f"given = {{ baseline = {BASELINE} }}",
}


def linked_value(name, here):
    """A quantity at one completion of a block that tests it."""
    if name == "training.flops":
        return 6 * here["parameters.active"] * here["training.tokens"]
    return here["parameters.active"] / BASELINE if name == "parameters.active_growth" else here[name]


def models(small, stated):
    """Every completion of the small model, with its counts."""
    for d_model, factor, groups, layers in product([64, 128], [2.5, 4], [1, 4], [2, 4] if stated else [4]):
        ffn = {"ffn.d_ff": int(factor * d_model), "attention.n_kv_heads": groups}
        built = small.complete({"d_model": d_model, "n_layers": layers, **ffn})
        counts = {"parameters.total": parameters.total(built), "parameters.active": parameters.active(built)}
        yield {"architecture.d_model": d_model, "architecture.n_layers": layers, **counts}


def linked_claims(draw, completions):
    """Claims on the model and on what takes its size as given: id -> (quantity, figure, kind)."""
    names = ["training.flops", "parameters.active_growth"]
    names += [draw.choice(list(LINKED)) for _ in range(draw.randint(2, 5))]
    found = {}
    for i, name in enumerate(names):
        here = {**draw.choice(completions), "training.tokens": draw.choice(TOKENS)}
        kind = draw.choice(["claim", "claim", "assumption"])
        found[f"c{i}"] = (name, printed(draw, linked_value(name, here)), kind)
    return found


def linked_audit(tmp_path, seed):
    """An audit of random claims, its claims, and every completion of each block."""
    draw = random.Random(seed)
    base = BASE.replace("gpus = [10, 20]", f"tokens = {TOKENS}")
    figures = linked_claims(draw, list(models(spec(tmp_path, base=base), stated=True)))
    texts = [
        claim(c, name, (text, "", "A"), extra=f'{EXTRAS.get(name, "")}\nkind = "{kind}"')
        for c, (name, text, kind) in figures.items()
    ]
    small = spec(tmp_path, *texts, base=base)
    found = audit(small)
    stated = any(name == "architecture.n_layers" for name, _, _ in figures.values())
    axes = {b.name: {axis.name: axis.values for axis in b.axes} for b in found._judged.case.blocks}
    active = {name: axes[name]["parameters.active"] for name in ("run", "davinci")}
    pairs = product(active["run"], TOKENS)
    completions = {
        "architecture": list(models(small, stated)),
        "run": [{"parameters.active": a, "training.tokens": t} for a, t in pairs],
        "davinci": [{"parameters.active": a} for a in active["davinci"]],
    }
    return found, figures, completions


def held_at(figures, block, here):
    """The claims that hold at one completion of a block, of those that it tests."""
    tested = {c: figure for c, figure in figures.items() if block in LINKED[figure[0]]}
    return frozenset(c for c, (name, text, _) in tested.items() if linked_value(name, here) in interval(text))


def best_without(figures, held, dropped):
    """Every way to take one set of held claims from each block that is best for all claims but one."""
    found = {}
    for choice in product(*held.values()):
        kept = dict(zip(held, choice, strict=True))
        good = [c for c, f in figures.items() if c != dropped and all(c in kept[b] for b in LINKED[f[0]])]
        kinds = [figures[c][2] for c in good]
        found.setdefault((kinds.count("claim"), kinds.count("assumption")), []).append(kept)
    return found[max(found)]


def between(values, low, high):
    """The values from the last one that is not above `low` to the first that is not below `high`."""
    least, most = max(v for v in values if v <= low), min(v for v in values if v >= high)
    return {v for v in values if least <= v <= most}


@pytest.mark.parametrize("seed", range(60))
def test_verdicts_of_random_specs_join_blocks_by_their_links(tmp_path, seed):
    """Against brute force: a size that a block takes as given is one that the best models have."""
    found, figures, completions = linked_audit(tmp_path, seed)
    patterns = {b: [held_at(figures, b, here) for here in every] for b, every in completions.items()}
    held = {block: sorted(set(every), key=sorted) for block, every in patterns.items()}
    for verdict in found.verdicts:
        name = verdict.claim.id
        best = best_without(figures, held, name)
        chosen = {
            block: [here for here, one in zip(every, patterns[block], strict=True) if one in kept]
            for block, every in completions.items()
            for kept in [{one[block] for one in best}]
        }
        sizes = [here["parameters.active"] for here in chosen["architecture"]]
        answers = []
        for block in LINKED[figures[name][0]]:
            tried = between([h["parameters.active"] for h in completions[block]], min(sizes), max(sizes))
            joined = [here for here in chosen[block] if here["parameters.active"] in tried]
            finding = next(one for one in verdict.findings if one.block == block)
            assert finding.apart == (not joined)
            assert finding.admitted == len(joined or chosen[block])
            answers.append({name in held_at(figures, block, here) for here in joined or chosen[block]})
        outcome = "consistent" if {True} in answers else "undetermined"
        assert verdict.outcome == ("contradicts" if {False} in answers else outcome)


@pytest.mark.parametrize("seed", range(20))
def test_conflicts_of_linked_blocks_are_over_the_whole_range(tmp_path, seed):
    """Every conflict is one of a single block alone, whatever the models leave of its link; none is lost."""
    found, figures, completions = linked_audit(tmp_path, seed)
    broken = set()
    for block, every in completions.items():
        held = {held_at(figures, block, here) for here in every}
        tested = [c for c, figure in figures.items() if block in LINKED[figure[0]]]
        sets = [frozenset(kept) for n in range(1, len(tested) + 1) for kept in combinations(tested, n)]
        broken |= {one for one in sets if not any(one <= other for other in held)}
    members = {frozenset(member.claim.id for member in one.members) for one in found.conflicts}
    assert members == {one for one in broken if not any(other < one for other in broken)}


@pytest.mark.parametrize("seed", range(10))
def test_a_link_is_tried_at_the_ends_of_what_the_models_leave(tmp_path, seed):
    """Each end of the sizes that the claims on the model leave, all of them or all but one, is tried."""
    _, figures, completions = linked_audit(tmp_path, seed)
    models = completions["architecture"]
    weights = {"claim": 100, "assumption": 1}
    for dropped in ("", *figures):
        held = [held_at(figures, "architecture", here) - {dropped} for here in models]
        worth = [sum(weights[figures[c][2]] for c in one) for one in held]
        best = [here for here, one in zip(models, worth, strict=True) if one == max(worth)]
        sizes = {here["parameters.active"] for here in best}
        for block in ("run", "davinci"):
            assert {min(sizes), max(sizes)} <= {here["parameters.active"] for here in completions[block]}


def test_a_single_axis_decides_where_it_does():
    """The axis on which a figure depends, whatever else varies with it, and where it turns."""
    a, b = (array.ravel() for array in np.meshgrid([1.0, 2.0, 3.0], [5.0, 7.0]))
    decider, pair = deciders({"b": b, "a": a}, a >= 2, ())
    assert pair is None
    assert (decider.axis, decider.holds, decider.fails) == ("a", (2, 3), (1,))
    assert decider.turns == ((1, 2),)


def test_two_axes_decide_where_none_does_alone():
    """A sum of two axes is decided by the pair, and each single change that turns it is found."""
    grid = np.meshgrid([1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [0.0, 9.0])
    a, b, c = (array.ravel() for array in grid)
    axes, holds = {"a": a, "b": b, "c": c}, a + b <= 4
    decider, pair = deciders(axes, holds, ())
    assert not decider.alone
    assert pair.alone
    assert {pair.axis, pair.cases[0][1].axis} == {"a", "b"}
    assert pair.share == 1
    for value, inner in pair.cases:
        assert all(value + other <= 4 for other in inner.holds)
        assert all(value + other > 4 for other in inner.fails)
    start = int(np.flatnonzero((a == 2) & (b == 2) & (c == 0))[0])
    found = {one.axis: one.values for one in steps(axes, holds, start)}
    assert found == {"a": (3,), "b": (3, 4)}


def test_the_best_pair_says_how_much_it_tells():
    """Of a sum of three axes no pair decides; its share is that of the completions it tells right."""
    grid = np.meshgrid(*[np.arange(4.0)] * 3)
    axes = {name: array.ravel() for name, array in zip("abc", grid, strict=True)}
    holds = sum(axes.values()) <= 4
    _, pair = deciders(axes, holds, ())
    cells = {}
    for *cell, yes in zip(axes["a"], axes["b"], holds, strict=True):
        cells.setdefault(tuple(cell), []).append(bool(yes))
    right = sum(max(sum(cell), len(cell) - sum(cell)) for cell in cells.values())
    assert not pair.alone
    assert math.isclose(pair.share, right / len(holds))  # every pair of three like axes tells as much
