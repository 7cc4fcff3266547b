"""Any OpenAI-compatible HTTP endpoint under test; see `harness.implementations.openai.adapter`."""

from __future__ import annotations

from harness.implementations.openai.adapter import OpenAIImplementation, OpenAIModel, OpenAISession, connect
from harness.implementations.openai.client import Client

__all__ = ["Client", "OpenAIImplementation", "OpenAIModel", "OpenAISession", "connect"]
