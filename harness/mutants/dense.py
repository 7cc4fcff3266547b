"""Defects that need no experts: norms, and the table that is both embedding and unembedding."""

from __future__ import annotations

from typing import Any

from torch.nn import functional

from harness.mutants.defect import Method, anywhere, mutant, norms, patched, whole
from harness.reference import ReferenceModel
from harness.reference.layers import Norm


@patched(stage="norm", spec="mixtral-8x7b", applies=anywhere)
def norm_eps_default(model: ReferenceModel) -> None:
    """The epsilon of the norms is a default in place of the one given."""
    _eps_default(model, "")


def _eps_default(model: ReferenceModel, *endings: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Norm) and name.endswith(endings):
            module.eps = 1e-6 if module.eps != 1e-6 else 1e-5


@patched(stage="norm", spec="llama-3.1-8b", applies=anywhere)
def final_norm_eps_default(model: ReferenceModel) -> None:
    """The epsilon of the last norm alone is a default."""
    _eps_default(model, "final_norm")


@patched(stage="norm", spec="qwen3-30b-a3b", applies=lambda a: a.attention.qk_norm != "none")
def qk_norm_eps_default(model: ReferenceModel) -> None:
    """The epsilon of the norms of queries and keys is a default."""
    _eps_default(model, "q_norm", "k_norm")


@patched(stage="norm", spec="deepseek-v3", applies=lambda a: a.attention.mla is not None)
def latent_norm_eps_default(model: ReferenceModel) -> None:
    """The epsilon of the norms of latent attention is a default."""
    _eps_default(model, "q_a_norm", "kv_a_norm")


@mutant(norms, "forward", stage="gradient", spec="llama-3.1-8b", applies=anywhere)
def norm_gradient_lost(_: Any, forward: Method) -> Method:
    """Norms pass no gradient to what is before them."""
    return lambda x: forward(x.detach())


of_a_tied_table = mutant(
    whole,
    "unembed",
    stage="gradient",
    origin="torchtitan#3764",
    spec="gpt3-175b",
    applies=lambda architecture: architecture.tie_embeddings,
)


@of_a_tied_table
def tied_gradient_halved(model: Any, _: Method) -> Method:
    """A tied table gets only the gradient of its use as an embedding."""
    return lambda x: functional.linear(model.final_norm(x), model.embedding.weight.detach())


@of_a_tied_table
def tied_gradient_doubled(model: Any, unembed: Method) -> Method:
    """A tied table gets the gradient of its use as an unembedding twice."""

    def changed(x: Any) -> Any:
        again = functional.linear(model.final_norm(x).detach(), model.embedding.weight)
        return unembed(x) + again - again.detach()

    return changed
