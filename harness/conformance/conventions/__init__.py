"""The convention finder: what an implementation does in place of what the spec says.

A property whose comparison fails hands over what it saw. Each known convention, and then each pair of them,
is held against all of that within the property's own tolerance; the simplest that explains it is named in
the Violation. Nothing here runs while a property passes.
"""

from __future__ import annotations

from harness.conformance.conventions.search import Convention, Finding, Fit, Seen, explained, unexplained

__all__ = ["Convention", "Finding", "Fit", "Seen", "explained", "unexplained"]
