"""The one way to run the suites: pytest, on the folder of a checkout or the package of a wheel."""

from __future__ import annotations

from collections.abc import Sequence

from harness._resources import in_wheel, suites_dir

WHEEL = ["--pyargs", "harness.suites"]
ARCHITECTURE = ("parameters", "compute", "routing", "attention", "training", "vision")
"""Parts of the suites that concern one pass of a model."""
ENGINES = ("decoding", "serving")
"""Parts that concern what is generated."""


def run(arguments: Sequence[str], parts: Sequence[str] = (), plugins: Sequence[object] = ()) -> int:
    """pytest's exit code on some parts of the conformance suites, or on all, with `arguments` of pytest.

    `plugins` are objects with hooks of pytest, for this run.
    """
    import pytest

    return int(pytest.main([*arguments, *targets(parts)], plugins=list(plugins)))


def exists(part: str) -> bool:
    """Whether the suites have such a part."""
    return (suites_dir() / part).is_dir()


def targets(parts: Sequence[str] = ()) -> list[str]:
    """What pytest is pointed at: the suites, less the tests of the harness itself.

    No cache folder is left in a site-packages folder.
    """
    suites = suites_dir()
    if in_wheel():
        where = ["--pyargs", *(f"harness.suites.{part}" for part in parts)] if parts else WHEEL
    elif parts:
        where = [str(suites / part) for part in parts]
    else:
        where = [str(suites), f"--ignore={suites / 'selftest'}"]
    # pytest cannot rewrite the asserts of a package that this process has imported; ours needs none.
    quiet = ["-W", "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"]
    return ["-p", "harness.plugin", "-p", "no:cacheprovider", *quiet, *where]
