"""Imported by a process that forks others: the library, and every module of it that has experts."""

from harness.implementations.transformers.families import moe

FOUND = moe()
