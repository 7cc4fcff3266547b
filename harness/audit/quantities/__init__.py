"""The quantities that claims may name, with the theory behind each.

A claim's `quantity` is one of QUANTITIES, or an axis by its name: "architecture.n_layers" (any leaf),
"training.gpus", "serving.batch" (any entry of these tables).

Blocks: quantities are judged in blocks of few axes each: all leaves of the architecture; how much compute,
on what, how long and for how much; where weights lie in training and in serving; what a token costs; what
each expert gets. An axis of two blocks runs through each of them separately, and the claims on its value are
tests in both. A block that takes a count of the architecture as given (LINKS) tries it over all that the
architecture may have; the verdict on a claim there is over the span of it that the claims on the architecture
leave (`harness.audit.verdicts`). That admits more than one grid over all axes would, never less: a set of
claims that no completion of one block satisfies is in conflict for certain, while a conflict that only the
joint grid would show is missed, and so is what a verdict would owe to two counts that vary together.
"""

from harness.audit.quantities import causes, regimes, systems
from harness.audit.quantities.architecture import ARCHITECTURE, terms
from harness.audit.quantities.registry import QUANTITIES
from harness.audit.quantity import LINKS, argument

__all__ = ["ARCHITECTURE", "LINKS", "QUANTITIES", "argument", "causes", "regimes", "systems", "terms"]
