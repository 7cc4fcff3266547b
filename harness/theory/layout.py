"""How a model lies on devices, and how a step runs over them.

Numbers may be numpy arrays that broadcast, so that a search evaluates many layouts at once; `zero_stage`,
`schedule`, `recompute`, `flash` and `sequence_parallel` stay single values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from harness.spec.architecture import Architecture
from harness.spec.errors import SpecError

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zbv"]
"""GPipe (arXiv 1811.06965), 1F1B and interleaved 1F1B (arXiv 2104.04473), zero bubble (arXiv 2401.10241)."""
Recompute = Literal["none", "selective", "full"]
"""Of activations in the backward pass; selective: attention's scores alone (arXiv 2205.05198)."""


@dataclass(frozen=True)
class Layout:
    """Ways of parallelism; devices = tensor x pipeline x context x data."""

    tensor_parallel: Any = 1
    pipeline_parallel: Any = 1
    data_parallel: Any = 1
    expert_parallel: Any = 1
    """Ways over which the routed experts of a layer are divided, out of tensor x data ranks."""
    expert_tensor_parallel: Any = None
    """Ways that split each expert in width; None: the tensor ways that expert parallelism leaves, so that
    experts are whole where it takes them all. See `expert_width_ways`."""
    context_parallel: Any = 1
    zero_stage: int = 0
    """What data-parallel ranks shard: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too (FSDP)."""
    shard_ways: Any = None
    """Data-parallel ranks that states are sharded over (HSDP: fewer than all); None: all of them."""
    schedule: Schedule = "1f1b"
    virtual_stages: Any = 1
    """Chunks of layers on one pipeline rank (interleaved; zbv has 2)."""
    microbatch: Any = 1
    """Sequences of one microbatch on one data-parallel rank."""
    recompute: Recompute = "none"
    flash: bool = True
    """Whether attention keeps no S x S matrix (arXiv 2205.14135)."""
    sequence_parallel: bool = True
    """Whether norms and residuals are divided over the tensor ways (arXiv 2205.05198)."""

    @property
    def devices(self) -> Any:
        """How many devices the layout takes."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def expert_width_ways(self) -> Any:
        """Ranks that share one expert, each with a part of its d_ff."""
        if self.expert_tensor_parallel is not None:
            return self.expert_tensor_parallel
        left = self.tensor_parallel // self.expert_parallel
        return np.maximum(1, left) if isinstance(left, np.ndarray) else max(1, left)

    @property
    def expert_copies(self) -> Any:
        """Ranks of one pipeline stage that hold the same part of the same experts: their data parallelism."""
        ranks = self.tensor_parallel * self.data_parallel
        return ranks // (self.expert_parallel * self.expert_width_ways)


def check(architecture: Architecture, layout: Layout) -> None:
    """Raise SpecError, with the numbers, where no engine can run one layout (of plain integers)."""
    attention, moe = architecture.attention, architecture.moe
    ways, stages = layout.tensor_parallel, layout.pipeline_parallel
    heads, groups = attention.n_heads, attention.n_kv_heads
    if heads % ways:
        raise SpecError(f"{heads} heads cannot be divided over {ways} tensor-parallel ranks; give a divisor")
    if attention.mla is None and groups % ways and ways % groups:
        right = f"{groups} key/value heads are divided by a divisor of {groups}, or copied by a multiple"
        raise SpecError(f"{groups} key/value heads cannot lie on {ways} tensor-parallel ranks; {right}")
    if architecture.ffn is not None and architecture.ffn.d_ff % ways:
        wrong = f"d_ff {architecture.ffn.d_ff} cannot be divided over {ways} tensor-parallel ranks"
        raise SpecError(f"{wrong}; give a divisor")
    chunks = stages * layout.virtual_stages
    if chunks > architecture.n_layers:
        right = f"give at most {architecture.n_layers} stages"
        raise SpecError(
            f"{stages} pipeline stages of {layout.virtual_stages} chunks want {chunks} layers, "
            f"and there are {architecture.n_layers}; {right}"
        )
    experts = layout.expert_parallel
    if experts > 1 and moe is None:
        raise SpecError(f"expert parallelism of {experts} for a model without experts; give 1")
    if moe is not None and moe.n_experts % experts:
        raise SpecError(f"{moe.n_experts} experts cannot be divided over {experts} ranks; give a divisor")
    ranks = experts * layout.expert_width_ways
    if (ways * layout.data_parallel) % ranks:
        right = "experts lie on tensor-parallel x data-parallel ranks: give a divisor of their product"
        raise SpecError(
            f"{ranks} ranks for experts out of {ways} x {layout.data_parallel} do not divide; {right}"
        )
    if moe is not None and moe.expert.d_ff % layout.expert_width_ways:
        wrong = f"d_ff {moe.expert.d_ff} of an expert cannot be split over {layout.expert_width_ways} ranks"
        raise SpecError(f"{wrong}; give a divisor")
