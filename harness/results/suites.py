"""The one way to run the suites: pytest, on the folder of a checkout or the package of a wheel."""

from __future__ import annotations

from collections.abc import Sequence

from harness._resources import in_wheel, suites_dir


def run(arguments: Sequence[str]) -> int:
    """pytest's exit code on the conformance suites with `arguments` of pytest."""
    import pytest

    return int(pytest.main([*arguments, *targets()]))


def targets() -> list[str]:
    """What pytest is pointed at: the suites, less the tests of the harness itself.

    No cache folder is left in a site-packages folder.
    """
    suites = suites_dir()
    where = ["--pyargs", "harness.suites"] if in_wheel() else [str(suites), f"--ignore={suites / 'selftest'}"]
    # pytest cannot rewrite the asserts of a package that this process has imported; ours needs none.
    quiet = ["-W", "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"]
    return ["-p", "harness.plugin", "-p", "no:cacheprovider", *quiet, *where]
