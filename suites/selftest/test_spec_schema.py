"""The JSON Schema beside the specs: generated, committed, and true of every shipped spec."""

import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from harness._resources import specs_dir
from harness.spec import names
from harness.spec.schema import json_schema, leaf_types, write_schema

SPECS = [specs_dir() / f"{name}.toml" for name in names()]


def test_the_committed_schema_is_the_generated_one(tmp_path: Path) -> None:
    """spec.schema.json is what `write_schema` writes."""
    written = write_schema(tmp_path).read_text(encoding="utf-8")
    assert (specs_dir() / "spec.schema.json").read_text(encoding="utf-8") == written


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    """A validator of the generated schema, which is itself valid."""
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_shipped_spec_is_valid_and_names_its_schema(
    path: Path, validator: jsonschema.Draft202012Validator
) -> None:
    """An editor that follows the first line finds nothing to complain about."""
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "#:schema spec.schema.json"
    assert list(validator.iter_errors(tomllib.loads(text))) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("architecture", "d_modell"), 64),
        (("architecture", "d_model"), "wide"),
        (("architecture", "d_model"), {"value": "wide"}),
        (("architecture", "d_model"), {"status": "rumoured", "value": 64}),
        (("architecture", "attention", "head_dim"), 0),
        (("claim",), [{"id": "x"}]),
        (("extra",), 1),
    ],
)
def test_the_schema_refuses_what_loading_refuses(
    place: tuple[str, ...], value: Any, validator: jsonschema.Draft202012Validator
) -> None:
    """Typos, wrong types, values out of range and missing keys are errors in an editor too."""
    document = tomllib.loads((specs_dir() / "mixtral-8x7b.toml").read_text(encoding="utf-8"))
    table = document
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    assert not validator.is_valid(document)


def test_every_leaf_may_be_stated() -> None:
    """Leaf paths are those of the architecture, parts included."""
    assert {"d_model", "attention.mla.kv_lora_rank", "moe.expert.gated", "moe.router.dtype"} <= set(
        leaf_types()
    )
    assert "attention" not in leaf_types()
