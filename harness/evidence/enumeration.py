"""The exact law of a program that draws random numbers with torch: every draw it can make is made.

The program is run again and again under a depth-first search over its draws: the first run takes the first
possible answer of every draw, and each later one repeats the choices of the run before up to the last draw
that has an answer left. No probability is estimated, so what remains of a defect cannot hide in noise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import fsum, prod

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from harness.evidence.interception import Interception, Unwatched, replacing
from harness.evidence.law import MASS_TOLERANCE, Law
from harness.evidence.lazy import NotEnumerable
from harness.evidence.tape import Draw, Tape, Undetermined, advance

WATCHED = 32
"""Runs in which every operator is watched for draws that are not looked up in the module torch; if there is
one, all runs are. It would be missed only where it is made on none of these paths and with a generator of its
own (the state of the global one is compared after every run)."""


def law(program: Callable[[], Hashable], *, most_paths: int = 200_000, prune: float = 0.0) -> Law:
    """The exact law of what `program()` returns.

    Its draws must come from torch.multinomial, bernoulli, rand or rand_like, in this thread, and uniform
    numbers may only be compared (see `harness.evidence.lazy`); generators and the global seed play no part.
    Branches off a path that are reached with a probability below `prune` are counted as pruned, and not
    followed.

    Raises NotEnumerable where a draw has no finite number of answers or more than `most_paths` runs are
    needed, Undetermined where the program is no function of its draws, and whatever the program raises.
    """
    search = _Search(program, most_paths, prune, watched=False)
    found = search.law()
    if found is None:
        found = _Search(program, most_paths, prune, watched=True).law()
    assert found is not None
    if abs(found.mass + found.pruned - 1) > MASS_TOLERANCE:
        raise Undetermined(f"the probabilities of all paths sum to {found.mass + found.pruned!r}, not to 1")
    return found


@dataclass
class _Search:
    """One depth-first search."""

    program: Callable[[], Hashable]
    most_paths: int
    prune: float
    watched: bool
    """Whether every run is watched, or only the first `WATCHED` and one of so many later ones."""
    draws: list[Draw] = field(default_factory=list)
    current: Interception = field(init=False)

    def law(self) -> Law | None:
        """The law, or None where all runs must be watched."""
        sums: dict[Hashable, float] = {}
        paths, pruned = 0, 0.0
        with replacing(lambda: self.current):
            while True:
                if paths == self.most_paths:
                    raise NotEnumerable(
                        f"more than {self.most_paths} paths, which cover {fsum(sums.values()):.3g} of the "
                        "mass: generate fewer tokens, use a smaller vocabulary, or prune"
                    )
                paths += 1
                try:
                    outcome = self.run(watching=self.watched or paths <= WATCHED or paths % WATCHED == 0)
                except Unwatched:
                    return None
                if self.current.needed and not self.watched:
                    return None
                reached = prod(draw.probabilities[draw.taken] for draw in self.draws)
                sums[outcome] = sums.get(outcome, 0.0) + reached
                pruned += advance(self.draws, self.prune)
                if not self.draws:
                    return Law(sums, paths, pruned)

    def run(self, *, watching: bool) -> Hashable:
        """One run that repeats the answers in `draws` and appends those to draws beyond them."""
        tape = Tape(self.draws)
        repeated = len(self.draws)
        seed, state = torch.initial_seed(), torch.get_rng_state()
        self.current = Interception(tape, watching)
        try:
            with self.current if watching else nullcontext():
                outcome = self.program()
        except Exception:
            if tape.failure is not None:
                raise tape.failure from None
            raise
        if tape.failure is not None:
            raise tape.failure
        if tape.at < repeated:
            raise Undetermined(
                f"the program is no function of its draws: with the same answers it made {repeated} draws or "
                f"more, and then {tape.at}; it must start from the same state at every run"
            )
        if torch.initial_seed() == seed and not torch.equal(torch.get_rng_state(), state):
            raise Undetermined(
                "a random number was drawn in a way that cannot be intercepted (in compiled code?)"
            )
        if any(isinstance(part, Tensor) for part in pytree.tree_leaves(outcome)):
            raise TypeError("the program returned a tensor, which has no equals: return a number or a tuple")
        return outcome
