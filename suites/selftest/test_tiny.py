"""A tiny checkpoint is the reference's model, token for token and string for string."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import torch

from harness.implementations.registry import AdapterError
from harness.implementations.tiny import checkpoint, gguf, tiny, vocabulary
from harness.reference import build
from harness.spec import load
from suites.selftest.stubs import command

SPECS = ("llama-3.1-8b", "mixtral-8x7b", "qwen3-30b-a3b")
"""One of each kind that all servers load."""
VOCABULARY = 96


def written(spec: str, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The reference in float64, and what transformers makes of the folder, in float32."""
    from transformers import AutoModelForCausalLM

    model = tiny(spec, load(spec).architecture, seed=3, vocab_size=VOCABULARY)
    reference = build(model.architecture, dtype=torch.float64)
    reference.load_weights(model.weights)
    checkpoint.write(model, folder)
    return reference, AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("spec", SPECS)
def test_transformers_loads_the_references_model(spec: str, tmp_path: Path) -> None:
    """Logits of the loaded checkpoint are the reference's, up to float32."""
    reference, theirs = written(spec, tmp_path)
    tokens = torch.randint(VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, logits = reference.forward(tokens), theirs(tokens).logits.double()
    # Logits have a standard deviation near 3; float32 through 2 layers loses 1e-5 of that at the median,
    # and a dozen times more where a near tie of experts amplifies it. A wrong layout is off by 3.
    assert float((ours - logits).abs().max()) < 1e-3 < 0.1 < float(ours.std())


def test_every_token_is_one_string(tmp_path: Path) -> None:
    """Text and token ids map one to one, in the tokenizer that transformers loads and in tokens.json."""
    from transformers import AutoTokenizer

    checkpoint.write(tiny("x", load(SPECS[0]).architecture, vocab_size=300), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    strings = json.loads((tmp_path / "tokens.json").read_text())
    ids = torch.randint(300, (500,), generator=torch.Generator().manual_seed(2)).tolist()
    text = "".join(strings[i] for i in ids)
    assert len(set(strings)) == len(strings) == 300
    assert text == vocabulary.text(ids, 300)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == vocabulary.EOS
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text


def test_no_string_changes_when_it_is_normalised() -> None:
    """No token's string is a space, unprintable, or changed by any Unicode normal form."""
    for string in vocabulary.characters(2000):
        assert len(string) == 1
        assert string.isprintable()
        assert not string.isspace()
        assert all(unicodedata.normalize(form, string) == string for form in ("NFC", "NFD", "NFKC", "NFKD"))


@pytest.mark.parametrize("spec", [*SPECS, "olmoe-1b-7b"])
def test_gguf_holds_every_weight(spec: str, tmp_path: Path) -> None:
    """A GGUF file has every weight of the model once, and rows of queries and keys only change places."""
    package = pytest.importorskip("gguf")
    model = tiny(spec, load(spec).architecture, seed=3, vocab_size=VOCABULARY)
    gguf.write(model, tmp_path / "model.gguf")
    found = {
        t.name: torch.from_numpy(t.data.copy()) for t in package.GGUFReader(tmp_path / "model.gguf").tensors
    }
    extra = {"rope_freqs.weight"} if model.architecture.attention.rope.scaling is not None else set()
    assert len(found) == len(model.weights) + len(extra)
    assert extra <= set(found)

    def summary(tensors: list[torch.Tensor]) -> list[tuple[int, ...]]:
        # In a permutation of rows the multiset of rows stays, so the sorted elements do.
        return sorted(tuple(tensor.flatten().sort().values.tolist()) for tensor in tensors)

    assert summary([t for name, t in found.items() if name not in extra]) == summary(
        [*model.weights.values()]
    )


def test_neighbouring_pairs_turn_alike() -> None:
    """Rows permuted for neighbouring pairs give the same attention scores as halves do for halves."""
    from harness.reference.rope import Rotary
    from harness.spec.architecture import Rope

    heads, head_dim, width = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    rows, x = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((24, width), (1, 4, width)))
    positions = torch.arange(4)[None]
    scores = []
    for layout, matrix in (("half", rows), ("interleaved", gguf.neighbouring(rows, head_dim))):
        turn = Rotary(Rope(theta=100.0, layout=layout), head_dim, 64)
        states = turn((x @ matrix.T).unflatten(-1, (heads, head_dim)), positions)
        scores.append(torch.einsum("bshd,bthd->bhst", states, states))
    # the same sums in another order: a few ulp of float64 at values near 10
    assert torch.allclose(*scores, rtol=0, atol=1e-12)


def test_noise_makes_a_draft_that_resembles(tmp_path: Path) -> None:
    """With noise every weight is near that of the same seed without, and none is equal."""
    architecture = load(SPECS[0]).architecture
    one, two = (tiny("x", architecture, seed=5, noise=noise) for noise in (0.0, 0.1))
    for name, tensor in one.weights.items():
        relative = float((two.weights[name] - tensor).std() / tensor.std())
        assert 0.05 < relative < 0.15, name


def test_the_command_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tiny` writes what servers load, and says what it wrote."""
    assert command("tiny", "mixtral-8x7b", str(tmp_path / "m"), "--vocab", "64") == 0
    out = capsys.readouterr().out
    assert "mixtral" in out
    assert "64 tokens" in out
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokens.json",
    }


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("palm-540b", "m"), "no family of transformers"),
        (("gpt-oss-120b", "m", "--format", "gguf"), "as GGUF nothing can be written of the family gpt_oss"),
        (("mixtral-8x7b", "m", "--vocab", "100000"), "must be from 2 to"),
        (("gpt4-leak", "m"), "give every unknown a value"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(
    arguments: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A spec, size or format that cannot be had ends in 78 with the reason."""
    spec, folder, *more = arguments
    assert command("tiny", spec, str(tmp_path / folder), *more) == 78
    err = capsys.readouterr().err
    assert why in err
    assert len(err.strip().splitlines()) == 1


def test_an_architecture_of_no_family_is_refused() -> None:
    """The reasons name what each family lacks."""
    with pytest.raises(AdapterError, match="no family of transformers is this architecture"):
        tiny("x", load("palm-540b").architecture)
