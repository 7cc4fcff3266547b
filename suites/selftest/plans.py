"""Plans that tests ask for: one spec, one size, one batch."""

from __future__ import annotations

from typing import Any

from harness.planning import serving, training
from harness.planning.report import Plan
from harness.planning.search import Question
from harness.spec import load
from harness.spec.hardware import load_hardware

BATCH, CONTEXT, TOKENS = 2**19, 4096, 1e11
PROMPT, OUTPUT = 700, 300
TRIED = {
    "tensor_parallel": "1,2,4",
    "pipeline_parallel": "1,2,4",
    "expert_parallel": "1,2,8",
    "context_parallel": "1,2",
    "microbatch": "1,2",
    "virtual_stages": "2,4",
    "zero_stage": "0,1,3",
    "schedule": "1f1b,interleaved,zbv",
    "recompute": "none,full",
}


def asked(name: str = "mixtral-8x7b", hardware: str = "h100", gpus: int = 32, **others: Any) -> Question:
    """A question on a shipped spec."""
    return Question(load(name).architecture, load_hardware(hardware), gpus, name=name, **others)


def trained(question: Question) -> Plan:
    """Its plan of training."""
    return training.plan(question, batch_tokens=BATCH, context=CONTEXT, tokens=TOKENS)


def served(question: Question, **others: Any) -> Plan:
    """Its plan of serving."""
    return serving.plan(question, prompt=PROMPT, output=OUTPUT, **others)
