"""Every MoE family of an installed library under the suites, each in a process of its own."""
