"""A second reference, which shares no arithmetic with the first: the specs, and the weights' names, are all.

Everything is computed in float64, whatever dtype was asked for, in other orders of summation than there.
"""

from harness.implementations.independent.adapter import Independent, IndependentModel

__all__ = ["Independent", "IndependentModel"]
