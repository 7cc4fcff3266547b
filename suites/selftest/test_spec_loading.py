"""Loading: a spec file becomes typed values, or one sentence per thing that is wrong with it."""

from pathlib import Path

import numpy as np
import pytest

from harness.spec import Spec, SpecError, load, names

GOOD = """\
title = "a small model"

[[source]]
id = "A"
title = "a document"

[architecture]
d_model = { status = "unknown", domain = { min = 64, max = 128, step = 32 }, why = "no width is given" }
n_layers = { value = 4, status = "leaked", sources = ["A"], domain = { values = [2, 4] } }
vocab_size = 100
max_positions = 32

[architecture.attention]
n_heads = 4
n_kv_heads = { status = "unknown", domain = {of = "attention.n_heads", values = [1], also = [1]}, why = "?" }
head_dim = 16
rope = { theta = 1e4 }

[architecture.ffn]
d_ff = { status = "unknown", domain = { of = "d_model", values = [2.5, 4] }, why = "not said" }

[training]
tokens = 13e12

[[claim]]
id = "layers"
statement = "layers"
quantity = "layers"
readings = [
  { value = "4", unit = "layers", sources = ["A"] },
]
given = { convention = "all" }
"""


def written(folder: Path, text: str) -> Path:
    """A spec file with this text."""
    path = folder / "model.toml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(folder: Path, old: str, new: str) -> Path:
    """GOOD with one piece replaced."""
    assert GOOD.count(old) == 1, old
    return written(folder, GOOD.replace(old, new))


def message(path: Path | str) -> str:
    """What loading it says."""
    with pytest.raises(SpecError) as caught:
        load(path)
    return str(caught.value)


@pytest.fixture
def good(tmp_path: Path) -> Spec:
    """The spec above, loaded."""
    return load(written(tmp_path, GOOD))


def test_leaves_know_how_they_are_known(good: Spec) -> None:
    """Status, value, domain, sources, why and line of each leaf come from the file."""
    assert good.name == "model"
    assert [leaf.path for leaf in good.unknowns] == ["d_model", "attention.n_kv_heads", "ffn.d_ff"]
    layers = good.leaves["n_layers"]
    assert (layers.status, layers.value, layers.sources, layers.line) == ("leaked", 4, ("A",), 9)
    assert good.leaves["d_model"].domain is not None
    assert good.leaves["d_model"].domain.values == (64, 96, 128)
    assert good.leaves["vocab_size"].status == "published"
    assert good.leaves["attention.rope.theta"].value == 1e4
    assert good.claims[0].line == 25
    assert good.claims[0].given == {"convention": "all"}
    assert good.training["tokens"] == 13e12


def test_the_default_status_is_the_documents(tmp_path: Path) -> None:
    """default_status names the status of a leaf that is a plain value."""
    spec = load(written(tmp_path, 'default_status = "leaked"\n' + GOOD))
    assert spec.leaves["vocab_size"].status == "leaked"


def test_a_completion_assigns_every_unknown(good: Spec) -> None:
    """Values go in at their paths; what is missing, unknown or impossible is named."""
    values = {"d_model": 64, "attention.n_kv_heads": 1, "ffn.d_ff": 256}
    assert good.complete(values).ffn.d_ff == 256  # type: ignore[union-attr]
    assert good.complete(values | {"n_layers": 2}).n_layers == 2
    with pytest.raises(SpecError, match=r"model.toml:8: architecture: d_model, .* are unknown"):
        _ = good.architecture
    with pytest.raises(SpecError, match=r'did you mean "attention\.n_heads"'):
        good.complete(values | {"attention.n_head": 2})
    with pytest.raises(
        SpecError, match=r"model.toml:14: architecture.attention: n_heads 4 is not a multiple"
    ):
        good.complete(values | {"attention.n_kv_heads": 3})


def test_vectorised_takes_arrays(good: Spec) -> None:
    """Arrays stand in for unknowns and for leaked leaves, at any depth, unvalidated."""
    wide = np.array([64.0, 96.0])
    made = good.vectorised({"d_model": wide, "ffn.d_ff": 4 * wide, "n_layers": np.array([[2.0], [4.0]])})
    assert made.ffn is not None
    assert made.ffn.gated
    np.testing.assert_array_equal(made.ffn.d_ff, [256.0, 384.0])
    assert (made.d_model * made.n_layers).shape == (2, 2)  # type: ignore[attr-defined]
    assert made.attention.n_heads == 4


def test_factors_are_taken_on_their_leaf(good: Spec) -> None:
    """A domain `of` another leaf gives products, whole ones as integers, each once, and the literals."""
    domain = good.leaves["attention.n_kv_heads"].domain
    assert domain is not None
    assert domain.given(4) == (4, 1)
    assert domain.given(1) == (1,)
    widths = good.leaves["ffn.d_ff"].domain
    assert widths is not None
    assert widths.given(65) == (162.5, 260)


def test_every_shipped_spec_loads_by_name() -> None:
    """Names are shipped files, and each of them loads under its own name."""
    assert "mixtral-8x7b" in names()
    assert [load(name).name for name in names()] == list(names())


D_MODEL = (
    'd_model = { status = "unknown", domain = { min = 64, max = 128, step = 32 }, why = "no width is given" }'
)
D_FF = 'd_ff = { status = "unknown", domain = { of = "d_model", values = [2.5, 4] }, why = "not said" }'
BAD = {
    "typo": (
        "vocab_size = 100",
        "vocab_sze = 100",
        ':10: architecture.vocab_sze: unknown key; did you mean "vocab_size"?',
    ),
    "missing": ("vocab_size = 100\n", "", ":7: architecture.vocab_size: is missing; give it a value"),
    "typo-nested": ("theta = 1e4", "thta = 1e4", ":17: architecture.attention.rope.thta: unknown key; "),
    "typo-in-leaf": ('why = "not said"', 'wy = "not said"', ":20: architecture.ffn.d_ff.wy: unknown key; "),
    "unknown-table": ("[training]", "[trainin]", ':22: trainin: unknown key; did you mean "training"?'),
    "wrong-type": (
        "vocab_size = 100",
        'vocab_size = "many"',
        ':10: architecture.vocab_size: got "many"; it should be a valid integer',
    ),
    "float-for-int": ("n_heads = 4\n", "n_heads = 4.0\n", ":14: architecture.attention.n_heads: got 4.0; "),
    "bool-for-int": ("n_heads = 4\n", "n_heads = true\n", ":14: architecture.attention.n_heads: got true; "),
    "table-for-text": ('title = "a small model"', "title = {}", ":1: title: got a table; "),
    "out-of-range": ("head_dim = 16", "head_dim = 0", ":16: architecture.attention.head_dim: got 0; "),
    "endless-layers": (
        "value = 4, ",
        "value = 1_000_000_000, ",
        ":9: architecture.n_layers.value: got 1000000000; ",
    ),
    "bad-status": (
        '"leaked"',
        '"rumoured"',
        ':9: architecture.n_layers.status: got "rumoured"; it should be \'pub',
    ),
    "no-domain": (
        D_MODEL,
        'd_model = { status = "unknown", why = "no width is given" }',
        ":8: architecture.d_model: an unknown has no domain; add domain = ",
    ),
    "no-why": (', why = "?"', "", ":15: architecture.attention.n_kv_heads: an unknown has no why; "),
    "unknown-with-value": (
        'd_ff = { status = "unknown"',
        'd_ff = { value = 3, status = "unknown"',
        ":20: architecture.ffn.d_ff.value: an unknown has a value; ",
    ),
    "known-without-value": ("value = 4, ", "", ":9: architecture.n_layers: is leaked, but has no value; "),
    "empty-domain": (
        "min = 64, max = 128",
        "min = 128, max = 64",
        ":8: architecture.d_model.domain.min: no value is possible: min 128 exceeds max 64; ",
    ),
    "no-step": (", step = 32", "", ":8: architecture.d_model.domain: only min and max given; "),
    "zero-step": ("step = 32", "step = 0", ":8: architecture.d_model.domain.step: step is 0; "),
    "huge-domain": (
        "max = 128, step = 32",
        "max = 1e9, step = 1",
        ":8: architecture.d_model.domain.step: the domain",
    ),
    "domain-of-floats": (
        "step = 32",
        "step = 32.5",
        ":8: architecture.d_model.domain.min: got 64.0 among the values",
    ),
    "domain-of-text": (
        "values = [2, 4]",
        'values = ["few"]',
        ':9: architecture.n_layers.domain.values: got "few" among',
    ),
    "of-nothing": (
        'of = "d_model"',
        'of = "dmodel"',
        ':20: architecture.ffn.d_ff.domain.of: "dmodel" is no leaf of the architecture; did you mean ',
    ),
    "of-cycle": (
        "domain = { min = 64, max = 128, step = 32 }",
        'domain = { of = "ffn.d_ff", values = [1] }',
        ":8: architecture.d_model.domain: of runs in a circle: d_model -> ffn.d_ff -> d_model; ",
    ),
    "negative-factor": (
        "values = [2.5, 4]",
        "values = [-1]",
        ":20: architecture.ffn.d_ff.domain.values: got -1 as a",
    ),
    "impossible-domain": (
        '{of = "attention.n_heads", values = [1], also = [1]}',
        "{ values = [3, 5] }",
        ":13: architecture.attention: impossible domain: no completion that validates was found (n_heads",
    ),
    "impossible-factor": (
        "values = [2.5, 4]",
        "values = [0.001]",
        ":20: architecture.ffn.d_ff: impossible domain: no completion that validates was found (no",
    ),
    "nan": ("theta = 1e4", "theta = nan", ":17: architecture.attention.rope.theta: is not a finite number; "),
    "infinity-in-a-claim": (
        'convention = "all"',
        "gpus = inf",
        ":32: claim[0].given.gpus: is not a finite number; ",
    ),
    "nan-as-printed": (
        'value = "4"',
        'value = "nan"',
        ":30: claim[0].readings[0].value: is not a finite number; ",
    ),
    "duplicate-claim": (
        'given = { convention = "all" }',
        '[[claim]]\nid = "layers"\nstatement = "again"',
        ':33: claim[1].id: duplicate id "layers"; line 25 has it already: give every id once',
    ),
    "unknown-source": (
        'unit = "layers", sources = ["A"]',
        'unit = "layers", sources = ["a"]',
        ':30: claim[0].readings[0].sources: cites "a", which no [[source]] defines; ',
    ),
    "unknown-source-of-a-leaf": (
        '"leaked", sources = ["A"]',
        '"leaked", sources = ["B"]',
        ':9: architecture.n_layers.sources: cites "B", which no [[source]] defines; ',
    ),
    "truncated": (
        'given = { convention = "all" }\n',
        "given = { conv",
        ":32: not valid TOML: ",
    ),
    "syntax": ("n_heads = 4\n", "n_heads = = 4\n", ":14: column 11: not valid TOML: Invalid value; "),
    "known-values-disagree": ("n_heads = 4\n", "n_heads = 4\nwindow = 8\n", ":13: architecture.attention: "),
}


@pytest.mark.parametrize("case", BAD)
def test_each_mistake_is_one_sentence(case: str, tmp_path: Path) -> None:
    """File, line and field, what is wrong, and what would be right."""
    old, new, expected = BAD[case]
    said = message(changed(tmp_path, old, new))
    assert said.startswith(f"{tmp_path / 'model.toml'}{expected}")
    assert said.count("\n") == 0
    assert "; " in said


def test_several_mistakes_are_all_told_in_file_order(tmp_path: Path) -> None:
    """One line per error, sorted by line."""
    text = GOOD
    for old, new in (("vocab_size", "words"), ("head_dim = 16", "head_dim = -1"), ("[[source]]", "[[src]]")):
        text = text.replace(old, new)
    lines = message(written(tmp_path, text)).splitlines()
    numbers = [int(line.removeprefix(f"{tmp_path / 'model.toml'}:").split(":")[0]) for line in lines]
    assert numbers == [3, 7, 10, 16]


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    """A directory, bytes that are not UTF-8, an empty file and a missing file each get a sentence."""
    assert message(tmp_path) == f"{tmp_path}: is a directory; give one TOML file"
    (tmp_path / "bytes.toml").write_bytes(b'title = "a"\nname = "\xff"\n')
    assert message(tmp_path / "bytes.toml").startswith(
        f"{tmp_path / 'bytes.toml'}:2: byte 0xff is not UTF-8; "
    )
    assert "architecture: is missing" in message(written(tmp_path, ""))
    assert "is nested too deeply; " in message(written(tmp_path, "x = " + "[" * 5000))
    assert "not valid TOML: " in message(written(tmp_path, "x = 1" + "0" * 5000))
    assert message("mixtral-8x7") == (
        'mixtral-8x7: no such spec; give a file, or a shipped spec: did you mean "mixtral-8x7b"?'
    )


@pytest.mark.parametrize("cut", range(0, len(GOOD), 23))
def test_a_truncated_file_never_crashes(cut: int, tmp_path: Path) -> None:
    """Any prefix of a spec loads or is refused with a sentence that names the file."""
    path = written(tmp_path, GOOD[:cut])
    try:
        load(path)
    except SpecError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 (a prefix may also be a whole spec)
