"""moe-harness: conformance and benchmarks for mixture-of-experts language models."""

__version__ = "0.1.0"
