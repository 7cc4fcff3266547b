"""Import of a Hugging Face config.json: exact, or refused by the name of the field that is in the way.

Every key of the file is read under its meaning in its family (`harness.spec.families`), known to leave
parameters and forward pass alone, or refused. Quantisation is of the second kind: it changes how
many bits a weight has, not which weights there are, so `dtype` is then that of the weights before it,
and the written spec says so. Multi-token prediction modules are left out, as transformers leaves them out.
The meaning of keys and defaults is that of transformers 5.23.0, which is not needed to import anything.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from harness.spec.architecture import Architecture
from harness.spec.document import Source
from harness.spec.errors import SpecError, sentence, show, wrong_and_right
from harness.spec.families import FAMILIES
from harness.spec.families.fields import ConfigError, Fields
from harness.spec.families.parts import IGNORED, LEFT_OUT, ONLY, Family
from harness.spec.writing import Statement, to_toml

UNMODELLED: Mapping[str, str] = {
    "vision_config": "a model that sees",
    "audio_config": "a model that hears",
    "text_config": "a model around a text model",
    "index_topk": "attention to the tokens that an indexer selects",
    "compress_ratios": "attention to compressed tokens",
    "hybrid_override_pattern": "state-space layers",
    "mamba_num_heads": "state-space layers",
    "linear_attn_config": "linear attention",
    "linear_num_value_heads": "linear attention",
    "block_configs": "layers that differ in shape",
    "per_layer_config": "layers that differ in shape",
    "attn_logit_softcapping": "capped attention logits",
    "final_logit_softcapping": "capped output logits",
}
"""Keys that say by themselves that no spec is exact, whatever the family."""

HEADS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Imported:
    """An architecture, and what a reader must know beside it.

    defaulted: keys that the file leaves to their defaults. left_out: "key (what that is)" for what the
    file describes and a spec does not.
    """

    architecture: Architecture
    defaulted: tuple[str, ...]
    left_out: tuple[str, ...]
    quantisation: str | None
    has_dtype: bool


@dataclass(frozen=True)
class Row:
    """What became of one file: `field` and `reason` are empty unless it was refused."""

    file: str
    model_type: str
    outcome: Literal["imported", "refused"]
    field: str = ""
    reason: str = ""
    architecture: Architecture | None = None


def from_config(config: Mapping[str, Any], *, name: str = "config.json") -> Architecture:
    """The architecture that a parsed config.json describes. Raises SpecError naming `name` and the field."""
    return _imported(config, name).architecture


def import_config(path: Path, name: str | None = None) -> str:
    """The text of a TOML spec for the config.json at `path`. Raises SpecError naming file, line and field.

    name: of the spec; by default that of the file, or of its folder if the file is called config.json.
    """
    text, config = _read(path)
    try:
        made = _imported(config, str(path))
    except ConfigError as error:
        line = _line_of(text, error.field)
        raise ConfigError(error.field, error.wrong, error.right, file=str(path), line=line) from None
    return _written(made, config["model_type"], path.name, name or _name_of(path))


def survey(directory: Path) -> list[Row]:
    """What becomes of every config.json ("*config.json") under a directory, by file name.

    Files of a quantiser (hf_quant_config.json) describe no model and are passed over.
    """
    rows = []
    for path in sorted(directory.rglob("*config.json")):
        if path.name.endswith("hf_quant_config.json"):
            continue
        file, model_type = str(path.relative_to(directory)), ""
        try:
            config = _read(path)[1]
            model_type = str(config.get("model_type", ""))
            rows.append(Row(file, model_type, "imported", architecture=_imported(config, file).architecture))
        except ConfigError as error:
            rows.append(Row(file, model_type, "refused", error.field, f"{error.wrong}; {error.right}"))
        except SpecError as error:
            rows.append(Row(file, model_type, "refused", "", str(error)))
    return rows


def _imported(config: Mapping[str, Any], name: str) -> Imported:
    try:
        if not isinstance(config, Mapping):
            raise ConfigError("", f"got {show(config)}", "a config.json is one object")
        for key, why in UNMODELLED.items():
            if config.get(key) is not None:
                right = "only models without it can be imported"
                if _is_importable(config.get("text_config")):
                    right = "save its text_config as a file and import that, if that part is meant"
                raise ConfigError(key, f"a spec cannot express {why}", right)
        family = _family(config)
        return _built(family, config)
    except ConfigError as error:
        raise ConfigError(error.field, error.wrong, error.right, file=name) from None


def _is_importable(part: Any) -> bool:
    try:
        return isinstance(part, Mapping) and bool(_imported(part, ""))
    except SpecError:
        return False


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        wrong = "is missing" if model_type is None else f"got {show(model_type)}"
        raise ConfigError("model_type", wrong, f"it must be one of {', '.join(sorted(FAMILIES))}")
    if model_type not in FAMILIES:
        # Another number is another model: deepseek_v32 is no misspelt deepseek_v3.
        likely = [known for known in FAMILIES if _digits(known) == _digits(model_type)]
        right = _near(model_type, likely) or f"known are {', '.join(sorted(FAMILIES))}"
        raise ConfigError("model_type", f"unknown family {show(model_type)}", right)
    return FAMILIES[model_type]


def _near(word: str, known: Collection[str]) -> str:
    """'did you mean "x"?', or nothing; stricter than for a spec, since most unknown keys are no slips."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.85)
    return f'did you mean "{near[0]}"?' if near else ""


def _digits(model_type: str) -> str:
    return "".join(filter(str.isdigit, model_type))


def _built(family: Family, config: Mapping[str, Any]) -> Imported:
    only = {**ONLY, **family.only}
    defaults = {**{key: allowed[0] for key, (allowed, _) in only.items()}, **family.extra, **family.defaults}
    f = Fields(config, defaults, aliases={"torch_dtype": "dtype", **family.aliases})
    _check_head(f)
    if f.given.get("auto_map") is not None and not family.ships_code:
        raise f.refuse(
            "auto_map",
            "code of its own decides what the model computes",
            "remove it, if it is transformers' own code",
        )
    for key, (allowed, why) in only.items():
        f.only(key, allowed, why)
    try:
        architecture = family.build(f)
    except ValidationError as error:
        wrong, right = wrong_and_right(dict(error.errors()[0]))
        raise ConfigError("model_type", f"the sizes do not fit together: {wrong}", right) from None
    left_out = {**LEFT_OUT, **family.left_out}
    for key in f.leftovers({*IGNORED, *family.ignored, *left_out}):
        known = (f.read | set(family.aliases)) - set(f.given)
        right = _near(key, known) or "remove it, if it says nothing about the model"
        raise ConfigError(key, f"the import of {family.model_type} knows no such key", right)
    unsaid = {*ONLY, *family.only, *family.extra, "rope_scaling", "rope_parameters"}
    return Imported(
        architecture,
        tuple(sorted(f.defaulted - unsaid - {"dtype"})),
        tuple(f"{key} ({why})" for key, why in left_out.items() if f.given.get(key) and key not in f.read),
        _quantisation(config),
        f.value("dtype") is not None,
    )


def _check_head(f: Fields) -> None:
    """A spec ends in an unembedding: a classifier or a bare decoder does not."""
    names = f.given.get("architectures")
    if names is None:
        return
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise f.refuse("architectures", f"got {show(names)}", "it must be a list of class names")
    if not any(name.endswith(HEADS) for name in names):
        raise f.refuse(
            "architectures", f"a spec cannot express {show(names[0])}", f"one must end in {HEADS[0]}"
        )


def _quantisation(config: Mapping[str, Any]) -> str | None:
    """The name of the quantisation, if there is one."""
    table = config.get("quantization_config")
    if table is None:
        return None
    return str(table.get("quant_method", "unnamed")) if isinstance(table, Mapping) else "unnamed"


def _written(made: Imported, model_type: str, file: str, name: str) -> str:
    statements = {}
    if made.quantisation is not None:
        why = f"the weights are quantised ({made.quantisation}); this is their type before that"
        statements["dtype"] = Statement("inferred", why)
    elif not made.has_dtype:
        statements["dtype"] = Statement("inferred", "the config names no dtype")
    note = f'model_type "{model_type}"'
    if made.defaulted:
        note += f"; absent, so as in transformers 5.23.0: {', '.join(made.defaulted)}"
    if made.left_out:
        note += f"; left out: {', '.join(made.left_out)}"
    source = Source(id="config", title=f"{file} of {name}", note=note)
    return to_toml(made.architecture, name=name, title=name, sources=[source], statements=statements)


def _name_of(path: Path) -> str:
    stem = path.stem.removesuffix("config").rstrip("_-.")
    return stem or path.resolve().parent.name or "imported"


def _line_of(text: str, field: str) -> int | None:
    """The line of the last part of a dotted field, if the text has it once."""
    key = re.escape(field.rpartition(".")[2])
    found = [match.start() for match in re.finditer(rf'"{key}"\s*:', text)]
    return text.count("\n", 0, found[0]) + 1 if len(found) == 1 else None


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a JSON file and the object in it. Raises SpecError naming file and line."""
    try:
        text = path.read_bytes().decode("utf-8")
    except IsADirectoryError:
        raise SpecError(sentence(path, None, "", "is a directory", "give the config.json in it")) from None
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
        raise SpecError(sentence(path, None, "", wrong, "give a readable config.json")) from None
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is not UTF-8"
        raise SpecError(sentence(path, None, "", wrong, "give a JSON file")) from None
    try:
        config = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        ends = not text[error.pos :].strip()
        wrong = "ends in the middle of its JSON" if ends else f"is not JSON ({error.msg})"
        raise SpecError(sentence(path, error.lineno, "", wrong, "give the whole config.json")) from None
    except ConfigError as error:
        line = _line_of(text, error.field)
        raise ConfigError(error.field, error.wrong, error.right, file=str(path), line=line) from None
    except (ValueError, RecursionError):
        wrong = "holds a number or a nesting beyond all bounds"
        raise SpecError(sentence(path, None, "", wrong, "give a config.json")) from None
    if not isinstance(config, dict):
        raise SpecError(sentence(path, 1, "", f"got {show(config)}", "a config.json is one object"))
    return text, config


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(twice, "stands twice in one object", "keep one of the two")
    return table
