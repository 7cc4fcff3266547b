"""How many kernels one pass launches: what a decode step costs when there is hardly anything to compute.

Small kernels that depend on one another cannot be made faster by faster memory: each waits for the last one
to drain, starts, and fills the chip again. Engines capture them into one graph, which hides the launch on the
host but not this. What is counted is the chain of dependent kernels of a layer as engines commonly fuse them
(vLLM, SGLang, TensorRT-LLM: residual and norm in one, rotation and cache write in one, gate and up in one):

  attention   norm, joint projection of queries, keys and values, rotation with the cache write, attention,
              the reduction over its parts (flash-decoding), output projection; one more where queries and
              keys are normed
  latent      norm, joint down-projection, norms of the latents, query expansion, absorption of the key
              expansion, rotation with the cache write, attention, reduction, value expansion, output
              projection
  dense       norm, gate and up, activation, down
  mixture     norm, router, choice, permutation, gate and up, activation, down, sum; and three of a shared
              expert
  quantiser   one more for each of the two, where less than the activations' format is multiplied: what leaves
              a norm is quantised there, what leaves attention or an activation by a kernel of its own

All-reduces are kernels too and are not counted: their latency is `Hardware`'s.
"""

from __future__ import annotations

from harness.spec.architecture import Architecture
from harness.theory import parameters
from harness.theory.precision import Precision, stored_bytes

ATTENTION = 6
LATENT_ATTENTION = 10
QUERY_KEY_NORM = 1
DENSE = 4
MIXTURE = 8
SHARED = 3


def kernels(architecture: Architecture, precision: Precision) -> int:
    """Kernels that follow one another in a decode pass through all layers."""
    attention, moe = architecture.attention, architecture.moe
    layers = architecture.n_layers
    routed = parameters.n_moe_layers(architecture)
    whole = stored_bytes(precision.activations)
    quantised = stored_bytes(precision.multiplied) < whole
    experts_quantised = stored_bytes(precision.experts_multiplied) < whole
    each = LATENT_ATTENTION if attention.mla is not None else ATTENTION
    each += QUERY_KEY_NORM * (attention.qk_norm != "none") + quantised
    mixture = MIXTURE + experts_quantised
    if moe is not None and moe.shared is not None:
        mixture += SHARED
    return layers * each + (layers - routed) * (DENSE + quantised) + routed * mixture
