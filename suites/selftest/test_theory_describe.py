"""What `describe` says about a spec, with and without unknowns."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from harness.spec import SpecError, load, names
from harness.theory import flops, memory, parameters
from harness.theory.describe import describe

COMPLETE = [spec for spec in map(load, names()) if not spec.unknowns]
MIXTURES = [spec.name for spec in COMPLETE if spec.architecture.moe]


def at(tree: dict[str, Any], path: str) -> Any:
    """The value at a dotted path."""
    for part in path.split("."):
        tree = tree[part]
    return tree


UNKNOWN = """
title = "A shape with unknowns"

[architecture]
d_model = { status = "unknown", domain = { min = 8, max = 24, step = 8 }, why = "no source gives a width" }
n_layers = 3
vocab_size = { status = "unknown", domain = { values = [100, 150] }, why = "no source gives it" }
max_positions = 64

[architecture.attention]
n_heads = { status = "unknown", domain = { values = [2, 4] }, why = "no source gives it" }
head_dim = 8
n_kv_heads.status = "unknown"
n_kv_heads.domain = { of = "attention.n_heads", values = [1], also = [1] }
n_kv_heads.why = "the sources differ"

[architecture.attention.rope]
theta = 1e4

[architecture.moe]
n_experts = 4
top_k = 2

[architecture.moe.expert]
d_ff = { status = "unknown", domain = { of = "d_model", values = [2, 4] }, why = "no source gives it" }
gated = { status = "unknown", domain = { values = [false, true] }, why = "no source says" }
"""


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A spec file with unknowns."""
    path = tmp_path / "unknown.toml"
    path.write_text(UNKNOWN, encoding="utf-8")
    return path


def test_a_description_holds_what_theory_counts() -> None:
    """The JSON of a spec carries totals, FLOPs and bytes under their documented keys."""
    spec = load("mixtral-8x7b")
    found = json.loads(json.dumps(describe(spec, context=4096, batch=3).as_dict()))
    architecture = spec.architecture
    assert at(found, "parameters.total") == parameters.total(architecture)
    assert at(found, "parameters.active.no-input-embedding") == parameters.active(
        architecture, "no-input-embedding"
    )
    assert at(found, "parameters.by_component") == parameters.by_component(architecture)
    assert at(found, "flops.forward_per_token.full") == flops.forward_per_token(architecture, 4096)
    assert at(found, "flops.forward_pass.causal") == flops.forward_total(
        architecture, 3, 4096, attention="causal"
    )
    assert at(found, "bytes.kv_cache") == memory.kv_cache_bytes(architecture, 4096, 3)
    assert found["digest"] == spec.digest


def test_a_description_names_the_conventions_of_published_figures() -> None:
    """gpt-oss's active 5.13e9 is reproduced without the input embedding, and not with it."""
    published = {one["claim"]: one for one in describe(load("gpt-oss-120b")).as_dict()["published"]}
    conventions = published["active-parameters"]["reproduced_by"]
    assert "no-input-embedding" in conventions
    assert "all" not in conventions


@pytest.mark.parametrize("name", MIXTURES)
def test_every_published_count_of_the_mixtures_is_reproduced(name: str) -> None:
    """For each mixture-of-experts control some convention gives each figure that its sources print."""
    published = describe(load(name)).as_dict()["published"]
    assert {one["quantity"] for one in published} == {"parameters.total", "parameters.active"}
    assert all(one["reproduced_by"] for one in published)


def test_tables_add_up() -> None:
    """The last row of a component table is the sum of the rows above it, for a model with every part."""
    tables = {table.title: table for table in describe(load("deepseek-v3")).tables()}
    parameter_table = tables["Parameters"]
    work = tables["Forward FLOPs per token at a context of 2,048"]
    for table in (parameter_table, work):
        *parts, total = table.rows
        assert total[0] == "total"
        for column in range(1, len(table.headers)):
            assert total[column] == sum(row[column] for row in parts)  # type: ignore[misc]
    assert all(len(row) == len(table.headers) for table in tables.values() for row in table.rows)


def test_an_uneven_mean_is_not_rounded() -> None:
    """Where windows make the causal mean per token a fraction, it is given as one."""
    spec = load("gpt-oss-20b")
    found = describe(spec, context=1001).as_dict()
    total = flops.forward_total(spec.architecture, 1, 1001, attention="causal")
    assert total % 1001
    assert at(found, "flops.forward_per_token.causal") == total / 1001


def test_a_spec_with_unknowns_lists_them_and_bounds_the_rest(unknown: Path) -> None:
    """Unknowns come with domain and reason, and the bounds are met and never crossed by any completion."""
    spec = load(unknown)
    found = describe(spec, context=16, batch=2).as_dict()
    assert [one["path"] for one in found["unknowns"]] == [leaf.path for leaf in spec.unknowns]
    assert all(one["why"] and one["domain"]["values"] for one in found["unknowns"])
    assert "parameters" not in found
    completions = [
        describe(
            spec.complete(
                {
                    "d_model": d,
                    "vocab_size": v,
                    "attention.n_heads": heads,
                    "attention.n_kv_heads": kv,
                    "moe.expert.d_ff": factor * d,
                    "moe.expert.gated": gated,
                }
            ),
            context=16,
            batch=2,
        ).as_dict()
        for d, v, heads, factor, gated in itertools.product(
            (8, 16, 24), (100, 150), (2, 4), (2, 4), (False, True)
        )
        for kv in (1, heads)
    ]
    assert "parameters.total" in found["bounds"]
    assert "flops.forward_per_token.causal" in found["bounds"]
    for key, (low, high) in found["bounds"].items():
        values = [at(one, key) for one in completions]
        assert (low, high) == (min(values), max(values)), key


def test_tables_of_unknowns_are_readable(unknown: Path) -> None:
    """A domain is shown as values, as a span or as factors of another leaf."""
    shown, between = describe(load(unknown)).tables()
    domains = {row[0]: row[1] for row in shown.rows}
    assert domains["d_model"] == "8, 16, 24"
    assert domains["attention.n_kv_heads"] == "1 x attention.n_heads, or 1"
    assert between.rows


def test_no_bounds_without_monotony(tmp_path: Path) -> None:
    """Where an unknown is no dimension, no bounds are claimed."""
    path = tmp_path / "tied.toml"
    tied = 'tie_embeddings = { status = "unknown", domain = { values = [false, true] }, why = "not said" }'
    path.write_text(UNKNOWN.replace("max_positions = 64", f"max_positions = 64\n{tied}"), encoding="utf-8")
    assert describe(load(path)).as_dict()["bounds"] == {}


def test_bytes_are_said_to_be_of_one_dtype() -> None:
    """Weights that are stored quantised are counted in the dtype before that, and the row says which."""
    found = describe(load("gpt-oss-20b"))
    assert found.facts["dtype"] == "bfloat16"
    assert any("weights, all of them in bfloat16" in row for row in found.tables()[-1].rows)


@pytest.mark.parametrize("given", [{"context": 0}, {"batch": -1}])
def test_impossible_sizes_are_refused(given: dict[str, int]) -> None:
    """A context or batch below one is refused by name."""
    with pytest.raises(ValueError, match=f"{next(iter(given))} is .*at least 1"):
        describe(load("mixtral-8x7b"), **given)


@pytest.mark.parametrize("tokens", ['"many"', "0", "1.5", "true"])
def test_unusable_training_tokens_are_refused(tmp_path: Path, tokens: str) -> None:
    """Training tokens that are no whole number end in a sentence naming file and field."""
    known = load("mixtral-8x7b").path.read_text(encoding="utf-8")
    path = tmp_path / "odd.toml"
    path.write_text(known + f"\n[training]\ntokens = {tokens}\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"odd\.toml:\d+: training\.tokens: got .*number"):
        describe(load(path))


def test_training_flops_need_one_number_of_tokens(tmp_path: Path) -> None:
    """Training FLOPs are given for the spec's tokens and context, and not for a list of values to try."""
    known = load("mixtral-8x7b").path.read_text(encoding="utf-8")
    one, several = tmp_path / "one.toml", tmp_path / "several.toml"
    one.write_text(known + "\n[training]\ntokens = 2e12\ncontext = 512\n", encoding="utf-8")
    several.write_text(known + "\n[training]\ntokens = [1e12, 2e12]\n", encoding="utf-8")
    found = at(describe(load(one)).as_dict(), "flops.training")
    assert found["forward-x3"] == 3 * 2 * 10**12 * flops.forward_per_token(load(one).architecture, 512)
    assert type(found["6n"]) is int
    assert "training" not in describe(load(several)).as_dict()["flops"]
