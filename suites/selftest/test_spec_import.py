"""Import of config.json: what is imported is the model that transformers builds from the same file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import reference
from harness.implementations.transformers import weights as maps
from harness.spec import Architecture, SpecError, load
from harness.spec.families import FAMILIES
from harness.spec.huggingface import from_config, import_config, survey
from harness.theory import parameters
from suites.selftest import hf_meta
from suites.selftest.stubs import ROOT
from suites.selftest.tiny_configs import IDS, TINY, VARIANTS, tiny

transformers = pytest.importorskip("transformers")
has_published = pytest.mark.skipif(hf_meta.published() is None, reason="aiconfigurator-core is not installed")


def real(file: str) -> dict[str, Any]:
    """A published config.json."""
    folder = hf_meta.published()
    assert folder is not None
    loaded: dict[str, Any] = json.loads((folder / f"{file}_config.json").read_text())
    return loaded


def check_facts(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Everything that transformers' own objects say about a config, against the imported architecture."""
    made = hf_meta.model(config)
    counted = {key: value for key, value in parameters.by_component(architecture).items() if value}
    assert hf_meta.by_component(made) == counted
    routing = {i for i in range(architecture.n_layers) if architecture.is_moe_layer(i)}
    assert hf_meta.moe_layers(made) == routing
    read, attention = made.config, architecture.attention
    assert read.vocab_size == architecture.vocab_size
    assert read.max_position_embeddings == architecture.max_positions
    window = getattr(read, "sliding_window", None) or None
    kinds = (
        getattr(read, "layer_types", None)
        or ["full_attention" if window is None else "sliding_attention"] * 4
    )
    for i in range(architecture.n_layers):
        windowed = kinds[i % len(kinds)] == "sliding_attention" and window is not None
        assert architecture.is_window_layer(i) == windowed
        assert not windowed or attention.window == window
    check_attention(made, architecture)


def check_attention(made: Any, architecture: Architecture) -> None:
    """Scale and rotary embedding of the first layer."""
    attention = architecture.attention
    layer = next(module for name, module in made.named_modules() if name.endswith((".self_attn", ".attn")))
    scale = attention.scale or attention.head_dim**-0.5
    scaling = attention.rope.scaling if attention.rope else None
    if attention.mla is not None and scaling is not None and scaling.mscale_all_dim:
        scale *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2
    assert layer.scaling == pytest.approx(scale, rel=1e-12)  # float64 on both sides
    if attention.rope is None:
        return
    rotary = next(
        module for name, module in made.named_modules() if name.endswith(("rotary_emb", "rotary_embedding"))
    )
    whole = attention.mla.qk_rope_head_dim if attention.mla else attention.head_dim
    assert 2 * len(rotary.inv_freq) == (attention.rope.dim or whole)
    rope = made.config.rope_parameters
    assert rope["rope_type"] == (scaling.kind if scaling else "default")
    if made.config.model_type != "dbrx":  # whose attention holds a theta of its own, which the files give
        assert rope["rope_theta"] == attention.rope.theta
    if scaling is not None:
        assert rope["factor"] == scaling.factor
        assert rope.get("original_max_position_embeddings") == scaling.original_max_positions


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_a_family_imports_as_transformers_builds_it(family: str, changes: dict[str, Any]) -> None:
    """Parameters by component, MoE layers, windows, scale and rope are those of transformers' model."""
    config = tiny(family, changes)
    check_facts(config, from_config(config))


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_what_transformers_saves_imports_the_same(family: str, changes: dict[str, Any]) -> None:
    """A config.json means the same after transformers 5 has read it and written it anew."""
    config = tiny(family, changes)
    if family != "dbrx":
        assert from_config(hf_meta.saved(config)) == from_config(config)


def test_what_transformers_makes_of_dbrx_is_refused() -> None:
    """transformers 5.23.0 rotates by a rope_theta of 10000 and writes that beside the one of attn_config."""
    saved = hf_meta.saved(tiny("dbrx"))
    assert saved["rope_parameters"]["rope_theta"] != saved["attn_config"]["rope_theta"]
    with pytest.raises(SpecError, match=r"attn_config\.rope_theta: 500000 contradicts 10000"):
        from_config(saved)
    del saved["rope_parameters"]
    assert from_config(saved) == from_config(tiny("dbrx"))


def test_every_family_is_tried() -> None:
    """No family is supported without a model of it in these tests."""
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_configuration_class(family: str) -> None:
    """An absent key means what transformers 5.23.0 makes of its absence."""
    known = transformers.CONFIG_MAPPING[hf_meta.CODE_OF.get(family, family)]
    fields = {name: field.default for name, field in known.__dataclass_fields__.items()}
    ours = FAMILIES[family]
    stated = {**ours.defaults, **ours.extra, **{key: allowed[0] for key, (allowed, _) in ours.only.items()}}
    folded = {"rope_theta", "rope_scaling"}  # into rope_parameters: `check_facts` compares what comes out
    assert set(ours.defaults) <= set(fields) | folded
    for key in set(stated) & set(fields):
        assert fields[key] == stated[key], key


@pytest.mark.skipif(hf_meta.installed() != hf_meta.VERSIONS, reason=f"the page is about {hf_meta.VERSIONS}")
def test_the_committed_survey_is_up_to_date() -> None:
    """No file is imported wrongly, and the page says what a comparison finds now."""
    folder = hf_meta.published()
    assert folder is not None
    page = hf_meta.page(hf_meta.comparison(folder))
    assert dict(row[:2] for row in page.tables[0].rows)["wrong"] == 0
    assert (ROOT / "results" / page.file).read_text(encoding="utf-8") == page.text()


@has_published
def test_published_configs_are_imported_exactly_or_refused_by_field() -> None:
    """Of the real files every one is either imported to the parameter or refused naming a field of it."""
    folder = hf_meta.published()
    assert folder is not None
    rows = survey(folder)
    assert len(rows) == 89
    for row in rows:
        config = json.loads((folder / row.file).read_text())
        if row.architecture is not None:
            check_facts(config, row.architecture)
        else:
            assert row.field.partition(".")[0] in config, row
    imported = [row for row in rows if row.outcome == "imported"]
    assert {row.model_type for row in imported} >= {
        "deepseek_v3",
        "gpt_oss",
        "kimi_k2",
        "llama",
        "minimax_m2",
    }
    assert {row.model_type for row in imported} >= {"mixtral", "qwen3", "qwen3_moe"}


@has_published
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mixtral-8x7b", "mistralai--Mixtral-8x7B-v0.1"),
        ("mixtral-8x22b", "mistralai--Mixtral-8x22B-v0.1"),
        ("deepseek-v3", "deepseek-ai--DeepSeek-V3"),
        ("gpt-oss-120b", "openai--gpt-oss-120b"),
        ("gpt-oss-20b", "openai--gpt-oss-20b"),
        ("qwen3-235b-a22b", "Qwen--Qwen3-235B-A22B"),
        ("qwen3-30b-a3b", "Qwen--Qwen3-30B-A3B"),
        ("llama-3.1-70b", "meta-llama--Meta-Llama-3.1-70B"),
        ("qwen3-32b", "Qwen--Qwen3-32B"),
        ("minimax-m2.5", "MiniMaxAI--MiniMax-M2.5"),
    ],
)
def test_shipped_specs_agree_with_the_published_configs(name: str, file: str) -> None:
    """A spec written by hand and the import of the published file are one architecture."""
    shipped, imported = load(name).architecture, from_config(real(file))
    if name == "deepseek-v3":  # its loss stands in the paper, not in the file
        imported = imported.model_copy(update={"auxiliary_loss": shipped.auxiliary_loss})
    assert shipped == imported


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_written_specs_read_back_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The TOML of an import, loaded, is the architecture that was imported."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny(family, changes)))
    toml = tmp_path / "imported.toml"
    toml.write_text(import_config(path, name="imported"))
    assert toml.read_text().startswith("#:schema spec.schema.json\n")
    assert load(toml).architecture == from_config(tiny(family, changes))
    assert load(toml).name == "imported"


def test_what_the_file_does_not_say_is_marked(tmp_path: Path) -> None:
    """An assumed or quantised dtype is inferred, and what was left out or defaulted is listed."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}})))
    assert load(_written(tmp_path, path)).leaves["dtype"].status == "inferred"
    path.write_text(json.dumps(tiny("mixtral", {"torch_dtype": "float16", "attention_dropout": 0.1})))
    spec = load(_written(tmp_path, path))
    assert (spec.leaves["dtype"].status, spec.leaves["dtype"].value) == ("published", "float16")
    note = spec.sources["config"].note
    assert "rms_norm_eps" in note.partition("left out")[0]
    assert "attention_dropout (noise in training only)" in note.partition("left out")[2]


def _written(folder: Path, path: Path) -> Path:
    toml = folder / "out.toml"
    toml.write_text(import_config(path))
    return toml


RULES = {
    **maps.RULES,
    **dict.fromkeys(("mistral", "qwen2", "qwen3"), maps.RULES["llama"]),
    **dict.fromkeys(("kimi_k2", "deepseek_v2", "glm4_moe"), maps.RULES["deepseek_v3"]),
    "minimax_m2": [
        *maps.RULES["mixtral"],
        (
            "model.layers.{i}.mlp.e_score_correction_bias",
            ("layers.{i}.moe.router.correction_bias",),
            maps.SAME,
        ),
    ],
    "qwen2_moe": [
        *maps.RULES["qwen3_moe"],
        ("model.layers.{i}.mlp.shared_expert_gate.weight", ("layers.{i}.moe.shared_gate.weight",), maps.SAME),
        *(
            (
                f"model.layers.{{i}}.mlp.shared_expert.{part}_proj.weight",
                (f"layers.{{i}}.moe.shared.{part}.weight",),
                maps.SAME,
            )
            for part in ("gate", "up", "down")
        ),
    ],
}
"""Where the weights of families are that differ from a mapped one in configuration alone, or nearly so."""


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_an_import_computes_what_transformers_computes(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference of an imported config has the logits of transformers' model under the same weights."""
    config = tiny(family, changes)
    architecture = from_config(config)
    read = hf_meta.configuration(config)
    read._attn_implementation = read._experts_implementation = "eager"
    if family == "dbrx":  # see the test of what transformers makes of it
        read.rope_parameters["rope_theta"] = config["attn_config"]["rope_theta"]
    theirs = transformers.AutoModelForCausalLM.from_config(read).double().eval()
    generator = torch.Generator().manual_seed(0)
    weights = reference.weights.draw(architecture, generator, std=0.3)
    monkeypatch.setattr(maps, "RULES", RULES)
    if architecture.moe is not None and architecture.moe.shared is None:
        drop_empty(theirs)
    maps.FamilyMap.of(architecture, family).load(theirs, weights)
    ours = reference.build(architecture, dtype=torch.float64, generator=generator)
    ours.load_weights(weights)
    tokens = torch.randint(0, architecture.vocab_size, (2, 40), generator=generator)
    with torch.no_grad():
        want, got = theirs(input_ids=tokens, use_cache=False).logits, ours.forward(tokens)
    # Both run in float64 but for transformers' norms, softmaxes and rotations, which are float32 (6e-8);
    # four layers at this scale of weights amplify that by less than 1e3.
    assert (want - got).abs().max() < 1e-4 * want.abs().max()


def drop_empty(module: Any) -> None:
    """Remove what transformers keeps of no shared experts: matrices with no elements."""
    for part in module.modules():
        if hasattr(part, "shared_experts"):
            del part.shared_experts
            part.shared_experts = torch.zeros_like


def test_import_loads_no_framework() -> None:
    """Importing a config.json needs neither torch nor transformers."""
    code = "import sys, harness.spec.huggingface as _; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
