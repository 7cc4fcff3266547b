"""A stranger's adapter: all that it takes to put their model under test.

moe-harness check --impl suites.selftest.stranger_adapter:make
"""

from harness.implementations import Unsupported, hf_like
from suites.selftest.stranger_model import TOP_K, TinyMoe


def model(architecture):
    """Their model, which comes in one shape."""
    if architecture is not None:
        raise Unsupported("TinyMoe has a shape of its own: run it without --spec")
    return TinyMoe()


def selected(logits):
    """What their block does after the router: experts and weights [T, K] of logits [T, E]."""
    values, indices = logits.topk(TOP_K)
    return indices, values.softmax(-1)


def make():
    """The address is suites.selftest.stranger_adapter:make."""
    return hf_like(model, name="stranger_adapter:make", router="moe.gate", derive=selected)
