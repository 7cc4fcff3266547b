"""A small model with unknowns, and claims on it as TOML."""

from __future__ import annotations

from harness.spec import load

BASE = """\
title = "a small model"

[[source]]
id = "A"
title = "a document"

[[source]]
id = "B"
title = "another one"

[architecture]
d_model = { status = "unknown", domain = { values = [64, 128] }, why = "not said" }
n_layers = { value = 4, status = "leaked", sources = ["A"], domain = { values = [2, 4] } }
vocab_size = 100
max_positions = 32

[architecture.attention]
n_heads = 4
head_dim = 16
rope = { theta = 1e4 }

[architecture.attention.n_kv_heads]
status = "unknown"
domain = { of = "attention.n_heads", values = [1], also = [1, 4, 3] }
why = "not said"

[architecture.ffn]
d_ff = { status = "unknown", domain = { of = "d_model", values = [2.5, 4, 2.51] }, why = "not said" }

[training]
gpus = [10, 20]
"""


def spec(tmp_path, *claims, base=BASE):
    """The small model with these claims."""
    path = tmp_path / "small.toml"
    path.write_text(base + "\n".join(claims), encoding="utf-8")
    return load(path)


def claim(name, quantity, *readings, extra=""):
    """The TOML of a claim; readings are (value, unit, source)."""
    printed = [f'{{ value = "{v}", unit = "{u}", sources = ["{s}"] }}' for v, u, s in readings]
    lines = ", ".join(printed)
    head = f'\n[[claim]]\nid = "{name}"\nstatement = "s"\nquantity = "{quantity}"\n'
    return f"{head}readings = [{lines}]\n{extra}\n"


def only(found):
    """The single verdict of an audit."""
    assert len(found.verdicts) == 1
    return found.verdicts[0]
