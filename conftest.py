"""Loads the plugin in a checkout; an installed wheel loads it through its entry point."""

pytest_plugins = ["harness.plugin"]
