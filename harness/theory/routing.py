"""What routing to k of E experts implies, whatever the weights.

Letters: E n_experts, K top_k, T tokens, f_i share of assignments to expert i, P_i its mean probability.
"""

from __future__ import annotations

from typing import Literal


def expected_distinct_experts(n_experts: float, top_k: float, tokens: float) -> float:
    """Experts that T tokens hit together, on average: E (1 - (1 - K/E)^T).

    Exact if every token takes K distinct experts, uniformly and independently of the others.
    """
    missed: float = (1 - top_k / n_experts) ** tokens
    return n_experts * (1 - missed)


def tokens_per_expert(tokens: float, n_experts: float, top_k: float) -> float:
    """Mean tokens that one expert receives out of T: T K / E."""
    return tokens * top_k / n_experts


def balance_loss_at_uniform(top_k: int, balance: Literal["switch", "huggingface", "sequence"]) -> int:
    """The balance loss when all loads f_i are equal, whatever P (and when all P_i are equal, whatever f).

    switch (arXiv 2101.03961, eq. 4, with f_i = c_i / (T K)) and sequence (DeepSeek-V3, arXiv 2412.19437,
    eq. 17-20): 1. huggingface (f_i = c_i / T): K. It is no minimum: with E = 2, K = 1, three quarters of the
    tokens at P = (1/2, 1/2) that choose the first expert, and the others at (0, 1), switch gives 7/8.
    """
    return top_k if balance == "huggingface" else 1


def balance_loss_at_collapse(
    n_experts: int, top_k: int, balance: Literal["switch", "huggingface", "sequence"]
) -> float:
    """The largest possible balance loss: all tokens choose the same K experts, which hold all probability.

    From f_i <= 1/K and sum_i P_i = 1: E / K for switch and sequence; E for huggingface.
    """
    return n_experts / (1 if balance == "huggingface" else top_k)
