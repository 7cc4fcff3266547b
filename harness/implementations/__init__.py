"""Systems under test: what they may offer (`protocols`), how they are addressed (`registry`), and adapters.

Importing this package imports no torch; a name below is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from harness.implementations.registry import AdapterError, names, resolve

if TYPE_CHECKING:
    from harness.implementations.huggingface_like import hf_like
    from harness.implementations.protocols import Capability, Implementation, Model, Routing, Unsupported

_LAZY = {
    "hf_like": "huggingface_like",
    **dict.fromkeys(("Capability", "Implementation", "Model", "Routing", "Unsupported"), "protocols"),
}

__all__ = [
    "AdapterError",
    "Capability",
    "Implementation",
    "Model",
    "Routing",
    "Unsupported",
    "hf_like",
    "names",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
