"""What one property sees: an architecture at test size, seeded inputs and the model under test.

Letters: B sequences, S tokens per sequence, V vocabulary.
Every input is drawn here, from one seed, so that every implementation gets the same ones; the digest
of what was drawn goes into the run file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from harness.conformance.checked import Checked
from harness.conformance.clock import Clock
from harness.implementations.protocols import Capability, Implementation, Model, Unsupported
from harness.reference import ReferenceModel
from harness.reference import build as build_reference
from harness.reference import weights as reference_weights
from harness.spec import twin
from harness.spec.architecture import Architecture

TWIN_FIELDS = {"n_experts": "moe__n_experts", "top_k": "moe__top_k"}
"""Arguments of harness.spec.twin that are fields of an architecture under another path."""


@dataclass(frozen=True)
class Shrink:
    """How much smaller a case is, so that a counterexample can be read; by default not at all.

    What a property asks for by itself, such as a number of experts, stays as it asks.
    """

    batch: int | None = None
    """Sequences at most."""
    length: int | None = None
    """Tokens of a sequence at most."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the twin, by path with "__" between the parts."""
    variant: str = ""
    """The one variant of the twin to look at, by its label; empty: all."""


@dataclass
class Case:
    """One property, one implementation, one spec, one seed."""

    implementation: Implementation
    slug: str
    seed: int
    spec_name: str
    full: Architecture | None
    """The architecture at full size; None for an implementation's own shape."""
    architecture: Architecture | None
    """Its shrunken twin; None for an implementation's own shape."""
    shrink: Shrink = field(default_factory=Shrink)
    fast: bool = False
    """Whether of the variants of the twin only two are looked at: itself, and one that the seed decides."""
    looked_at: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Shapes by the label of each variant of the twin that was looked at, if a property looks at some."""
    facts: dict[str, Any] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    """How much of the property's time the implementation takes."""
    drawn_tokens: Tensor | None = None
    """[B, S]: the token ids that were drawn last."""
    _built: tuple[Architecture | None, torch.dtype] | None = None
    _digest: Any = field(default_factory=hashlib.sha256)
    _draws: int = 0
    _vocab_size: int = 0

    def generator(self) -> torch.Generator:
        """A generator of its own for each call, fixed by seed, slug and the number of calls before."""
        self._draws += 1
        return seeded(self.seed, self.slug, self._draws)

    def drawn(self, value: Tensor) -> Tensor:
        """Enter `value` into the digest, and give it back."""
        self._digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        self._digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return value

    def tokens(self, batch: int, length: int) -> Tensor:
        """Token ids [B, S] int64, uniform over the vocabulary; no more of either than `shrink` says."""
        drawn = torch.randint(self.vocab_size, (batch, length), generator=self.generator())
        self.drawn_tokens = self.drawn(drawn[: self.shrink.batch, : self.shrink.length])
        return self.drawn_tokens

    def weights(self, architecture: Architecture | None = None, std: float = 0.5) -> dict[str, Tensor]:
        """Weights by canonical name, float64 tensors that float32 holds exactly.

        Fixed by seed, architecture and std alone, so that the properties of a run share a model. Do not
        write to the tensors: put new ones into the dict, which is the caller's own.
        """
        drawn = _weights(architecture or self.shape, self.seed, std)
        for name in sorted(drawn):
            self.drawn(drawn[name])
        return dict(drawn)

    def model(
        self,
        architecture: Architecture | None = None,
        weights: Mapping[str, Tensor] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Any:
        """A fresh model under test, holding `weights` (by default: those of `weights()`).

        A model that does not declare "weights" keeps its own. Raises Unsupported if the architecture
        cannot be expressed, or if weights were asked for and cannot be loaded. The type and shape of what it
        answers are checked. Typed Any because a property calls the Protocols of the capabilities that it
        declares to need.
        """
        architecture = architecture or self.architecture
        model = self.build(architecture, device=device, dtype=dtype)
        self._vocab_size, self._built = model.vocab_size, (architecture, dtype)
        checked = Checked(model, self.clock)
        if architecture is not None and "weights" in model.capabilities:
            checked.load_weights(weights if weights is not None else self.weights(architecture))
        elif weights is not None:
            raise Unsupported('the model declares no capability "weights"')
        return checked

    def build(
        self, architecture: Architecture | None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Model:
        """What the implementation builds, as it is: no weights are loaded, and no answer is checked."""
        with self.clock.running():
            return self.implementation.build(
                architecture, device=device, dtype=dtype, seed=model_seed(self.seed)
            )

    def reference(
        self,
        architecture: Architecture,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float64,
    ) -> ReferenceModel:
        """The reference with `weights`, in `dtype`, in eval mode on the CPU."""
        return build_reference(architecture, dtype=dtype, values=weights)

    def twin(self, **overrides: Any) -> Architecture:
        """A shrunken twin of the full architecture with fields replaced.

        Overrides are those of harness.spec.twin, or fields below with dots as double underscores:
        moe__router__capacity_factor=0.5. Raises Unsupported where there is no architecture.
        """
        if self.full is None:
            raise Unsupported("no architecture: the implementation is tested in its own shape")
        nested = {path: value for path, value in overrides.items() if "__" in path}
        made = twin(self.full, **{name: value for name, value in overrides.items() if name not in nested})
        asked = {TWIN_FIELDS.get(name, name) for name in overrides}
        fields = {path: value for path, value in self.shrink.fields.items() if path not in asked} | nested
        return replaced(made, fields) if fields else made

    def one_layer(self, kind: Literal["full", "window"] = "full") -> Architecture:
        """A twin of a single layer with this kind of attention, a MoE layer where there are any."""
        data = self.shape.model_dump() | {"n_layers": 1}
        windowed = data["attention"]["window"] is not None
        # The window stays in the pattern, beyond the last layer: some models need its width to be given.
        data["attention"] |= {"pattern": (kind, "window") if windowed else (kind,)}
        if data["moe"] is not None:
            data["moe"] |= {"first_dense": 0, "period": 1, "offset": 0}
            data["ffn"] = None
        return Architecture.model_validate(data)

    @property
    def shape(self) -> Architecture:
        """The twin; raises Unsupported for an implementation's own shape."""
        if self.architecture is None:
            raise Unsupported("no architecture: the implementation is tested in its own shape")
        return self.architecture

    @property
    def vocab_size(self) -> int:
        """V, of the twin or of the implementation's own shape."""
        if self.architecture is not None:
            return self.architecture.vocab_size
        if not self._vocab_size:
            self.model()
        return self._vocab_size

    def shapes(self) -> dict[str, Any]:
        """What was put under test last, by letter: B, S and T = B * S tokens; V, D d_model, E experts and
        K top-k of the model, its layers and dtype. What there was none of is left out."""
        found: dict[str, Any] = {}
        if self.drawn_tokens is not None:
            batch, length = self.drawn_tokens.shape
            found |= {"B": batch, "S": length, "T": batch * length}
        architecture, dtype = self._built or (None, None)
        if architecture is not None:
            moe = architecture.moe
            found |= {"V": architecture.vocab_size, "D": architecture.d_model}
            found |= {} if moe is None else {"E": moe.n_experts, "K": moe.top_k}
            found["layers"] = architecture.n_layers
        elif self._vocab_size:
            found["V"] = self._vocab_size
        return found if dtype is None else found | {"dtype": str(dtype).removeprefix("torch.")}

    def note(self, key: str, value: Any) -> None:
        """Put a measured fact beside the outcome in the run file."""
        self.facts[key] = value

    def need(self, model: Model, *capabilities: Capability) -> None:
        """Raise Unsupported unless `model` declares all of `capabilities`."""
        missing = [name for name in capabilities if name not in model.capabilities]
        if missing:
            raise Unsupported(f"the model declares no capability {', '.join(map(repr, missing))}")

    @property
    def digest(self) -> str:
        """sha256 over dtype, shape and bytes of everything drawn so far."""
        return str(self._digest.hexdigest())


def replaced(architecture: Architecture, fields: Mapping[str, Any]) -> Architecture:
    """The architecture with leaves replaced, each named by its path with "__" between the parts.

    Raises pydantic.ValidationError if the result contradicts itself.
    """
    data = architecture.model_dump()
    for path, value in fields.items():
        *parents, leaf = path.split("__")
        part = data
        for name in parents:
            part = part[name]
        part[leaf] = value
    return Architecture.model_validate(data)


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the sha256 of `parts`: the same in every process and on every machine."""
    text = "|".join(map(str, parts))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def model_seed(seed: int) -> int:
    """The seed as a model is given it: itself, where it fits into the 63 bits that every generator takes."""
    return seed % 2**63


@contextmanager
def global_draws(seed: int) -> Iterator[None]:
    """Whoever draws from torch's global generator in here draws the same for the same seed; the generator is
    put back as it was. It is for what is under test: the harness passes generators of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(seeded(seed, "global").get_state())
        yield


@lru_cache(maxsize=64)
def _weights(architecture: Architecture, seed: int, std: float) -> dict[str, Tensor]:
    generator = seeded(seed, "weights", architecture.model_dump_json(), std)
    drawn = reference_weights.draw(architecture, generator, std=std)
    return {name: value.float().double() for name, value in drawn.items()}
