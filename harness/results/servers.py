"""Servers under the suites: property x server, out of one run file of each."""

from __future__ import annotations

from collections.abc import Mapping

from harness.results.record import OUTCOMES, count
from harness.results.report import Page
from harness.results.runfile import Run
from harness.theory.describe import Table

COMMAND = "moe-harness servers NAME=RUN..."
NOT_OFFERED = "unsupported"


def page(runs: Mapping[str, Run]) -> Page:
    """What each server, by the name that it is given, made of the properties; those that no server offers
    anything for are left out."""
    ended = {
        name: {record.slug: record for record in run.records if record.outcome != NOT_OFFERED}
        for name, run in runs.items()
    }
    slugs = sorted({slug for records in ended.values() for slug in records})
    return Page(
        "servers.md",
        "Servers",
        COMMAND,
        (
            Table(
                "Runs",
                ("server", "started", *OUTCOMES),
                tuple((name, run.header.started, *count(run.records).values()) for name, run in runs.items()),
            ),
            Table(
                "Property x server; empty where the server does not offer what the property needs",
                ("property", *runs),
                tuple(
                    (slug, *(ended[name][slug].outcome if slug in ended[name] else "" for name in runs))
                    for slug in slugs
                ),
            ),
            Table(
                "What did not pass, and why",
                ("property", "server", "outcome", "reason"),
                tuple(
                    (slug, name, ended[name][slug].outcome, ended[name][slug].reason)
                    for slug in slugs
                    for name in runs
                    if slug in ended[name] and ended[name][slug].outcome != "passed"
                ),
            ),
        ),
    )
