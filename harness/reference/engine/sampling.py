"""From logits to the law of the next token: one method per field of `Sampling`, in the order of its fields.

Letters: V vocabulary. Logits are float64 [V] throughout; -inf means that a token is impossible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harness.reference.engine.values import Grammar, Request, Sampling

ROUNDING = 1e-12
"""How far a sum or a ratio of probabilities may miss a threshold that it reaches in exact arithmetic:
rounding of float64 over up to some thousand terms."""


class NoToken(ValueError):
    """There is no law for the next token of a request: the message says why."""


class Sampler:
    """The law of the next token. It keeps nothing between calls: all it needs is handed in."""

    def distribution(self, logits: Tensor, request: Request, generated: Sequence[int]) -> Tensor:
        """Probabilities [V] in float64 of the token after prompt and `generated`, from its raw logits [V].

        Raises NoToken if every token is ruled out, or if the logits are not numbers.
        """
        sampling, z = request.sampling, logits.detach().to("cpu", torch.float64)
        if not z.max() < torch.inf:
            raise NoToken("the model's logits hold NaN or +inf; finite numbers or -inf are needed")
        z = self.min_tokens(z, request, generated)
        z = self.grammar(z, sampling, generated)
        z = self.logit_bias(z, sampling)
        z = self.repetition_penalty(z, sampling, (*request.prompt, *generated))
        z = self.presence_penalty(z, sampling, generated)
        z = self.frequency_penalty(z, sampling, generated)
        if z.max() == -torch.inf:
            raise NoToken("no token is possible: grammar, logit_bias and min_tokens together rule out all")
        if not z.max() < torch.inf:
            raise NoToken("logit_bias and penalties are too large: with them a logit is not finite")
        z = self.temperature(z, sampling)
        z = self.top_k(z, sampling)
        z = self.top_p(z, sampling)
        z = self.min_p(z, sampling)
        return self.normalise(z)

    def min_tokens(self, z: Tensor, request: Request, generated: Sequence[int]) -> Tensor:
        """Before min_tokens the tokens of `eos` are impossible."""
        if len(generated) >= request.min_tokens or not request.eos:
            return z
        return z.index_fill(0, _ids(request.eos), -torch.inf)

    def grammar(self, z: Tensor, sampling: Sampling, generated: Sequence[int]) -> Tensor:
        """Tokens that the grammar does not allow here are impossible."""
        if sampling.grammar is None:
            return z
        allowed = self.allowed(sampling.grammar, generated)
        if allowed is None:
            return z
        return torch.full_like(z, -torch.inf).index_copy(0, _ids(allowed), z[_ids(allowed)])

    def allowed(self, grammar: Grammar, generated: Sequence[int]) -> tuple[int, ...] | None:
        """The tokens that may come after `generated`; None: all. None at all after one that it forbade."""
        state = 0
        for token in generated:
            if not grammar.states[state]:
                return None
            following = dict(grammar.states[state]).get(token)
            if following is None:
                return ()
            state = following
        return tuple(token for token, _ in grammar.states[state]) or None

    def logit_bias(self, z: Tensor, sampling: Sampling) -> Tensor:
        """Adds a bias to some logits."""
        if not sampling.logit_bias:
            return z
        tokens = _ids([token for token, _ in sampling.logit_bias])
        return z.index_add(0, tokens, z.new_tensor([bias for _, bias in sampling.logit_bias]))

    def repetition_penalty(self, z: Tensor, sampling: Sampling, seen: Sequence[int]) -> Tensor:
        """Logits of tokens seen: divided by the penalty where positive, else multiplied."""
        if sampling.repetition_penalty == 1:
            return z
        penalised = torch.where(z > 0, z / sampling.repetition_penalty, z * sampling.repetition_penalty)
        return torch.where(_counts(seen, z) > 0, penalised, z)

    def presence_penalty(self, z: Tensor, sampling: Sampling, generated: Sequence[int]) -> Tensor:
        """Subtracted once from the logits of tokens generated."""
        if sampling.presence_penalty == 0:
            return z
        return z - sampling.presence_penalty * _counts(generated, z).clamp(max=1)

    def frequency_penalty(self, z: Tensor, sampling: Sampling, generated: Sequence[int]) -> Tensor:
        """Subtracted from the logits of tokens generated, once for each time."""
        if sampling.frequency_penalty == 0:
            return z
        return z - sampling.frequency_penalty * _counts(generated, z)

    def temperature(self, z: Tensor, sampling: Sampling) -> Tensor:
        """Divides by the temperature; at 0 only the first of the largest logits remains possible.

        The largest logit becomes 0 before the division, so that no temperature overflows.
        """
        z = z - z.max()
        if sampling.temperature > 0:
            return z / sampling.temperature
        first = (z == 0).nonzero()[0]
        return torch.full_like(z, -torch.inf).index_fill(0, first, 0.0)

    def top_k(self, z: Tensor, sampling: Sampling) -> Tensor:
        """Only the k largest, and all that equal the k-th."""
        if not 0 < sampling.top_k < len(z):
            return z
        kth = z.topk(sampling.top_k).values[-1]
        return z.masked_fill(z < kth, -torch.inf)

    def top_p(self, z: Tensor, sampling: Sampling) -> Tensor:
        """Most probable tokens first, and among equals smaller ids first, until they reach top_p together."""
        if sampling.top_p >= 1:
            return z
        ordered, order = z.sort(descending=True, stable=True)
        reached = ordered.softmax(0).cumsum(0) >= sampling.top_p - ROUNDING
        beyond = reached.roll(1)
        beyond[0] = False
        return z.index_fill(0, order[beyond], -torch.inf)

    def min_p(self, z: Tensor, sampling: Sampling) -> Tensor:
        """Only tokens at least min_p times as probable as the most probable one."""
        if sampling.min_p <= 0:
            return z
        return z.masked_fill(z < z.max() + math.log(sampling.min_p) - ROUNDING, -torch.inf)

    def normalise(self, z: Tensor) -> Tensor:
        """softmax."""
        return z.softmax(0)


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> tuple[float, ...]:
    """The natural logarithm of each token's probability under the softmax of its own raw logits [n, V]."""
    rows = logits.detach().to("cpu", torch.float64).log_softmax(-1)
    return tuple(float(row[token]) for row, token in zip(rows, tokens, strict=True))


def _ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64)


def _counts(tokens: Sequence[int], like: Tensor) -> Tensor:
    """How often each id occurs among the tokens: [V], of the dtype of `like`."""
    return torch.bincount(_ids(tokens), minlength=len(like)).to(like.dtype)
