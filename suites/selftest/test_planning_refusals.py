"""What a search rules out, and what it cannot answer: always a sentence with the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from harness.planning import training
from harness.planning.report import Plan
from harness.planning.search import Question
from harness.planning.selection import Found
from harness.spec import SpecError
from suites.selftest.plans import asked, served, trained
from suites.selftest.stubs import command


def reasons(found: Plan) -> Iterator[tuple[Found, str]]:
    """Every sentence of every layout that was ruled out."""
    return ((one, text) for one in found.excluded for text in one.why)


def test_what_is_ruled_out_would_have_been_better() -> None:
    """Sentences give what is needed, what is free, and what a constraint met."""
    question = asked(constraints=("tensor_parallel<=2",), limit=40)
    found = trained(question)
    kinds = set()
    for one, text in reasons(found):
        facts = one.facts
        if text.startswith("needs"):
            assert f"needs {facts['memory'] / 1e9:,.1f} GB" in text
            assert f"{(facts['memory'] - question.room) / 1e9:,.1f} over 72.0 free" in text
            assert facts["memory"] > question.room
            kinds.add("memory")
        else:
            assert text == f"tensor_parallel<=2 does not hold: tensor_parallel is {facts['tensor_parallel']}"
            assert facts["tensor_parallel"] > 2
            kinds.add("constraint")
    assert kinds == {"memory", "constraint"}
    assert found.excluded[0].facts["days"] < found.ranked[-1].facts["days"]
    memory = found.broken["memory"]
    assert found.evaluated - found.fitting >= memory.layouts >= memory.alone > 0


def test_a_limit_says_what_loosening_it_would_gain() -> None:
    """The best layout that breaks one limit alone is the best without that limit, if that is better."""
    bound = asked(constraints=("tensor_parallel>=2", "recompute==full"), every=True, limit=1)
    found = trained(bound)
    for text in bound.constraints:
        others = tuple(one for one in bound.constraints if one != text)
        free = trained(replace(bound, constraints=others)).ranked[0].facts["days"]
        gain = found.broken[text].best
        assert gain is not None
        assert gain.limits == (text,)
        assert free == min(gain.facts["days"], found.ranked[0].facts["days"]) < found.ranked[0].facts["days"]


def refusal(act: Callable[[], object]) -> str:
    """The one sentence of a search that finds nothing."""
    with pytest.raises(SpecError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_memory_that_never_fits_is_said_with_the_least_that_is_needed() -> None:
    """The sentence holds the least need of all layouts, what it is made of, and what there is."""
    question = asked("llama-3.1-405b", "a100-40gb", 8)
    text = refusal(lambda: trained(question))
    assert "over 36.0 free" in text
    assert "take more GPUs" in text
    least = float(text.split("needs ")[1].split(" GB")[0].replace(",", ""))
    roomy = trained(replace(question, hardware=bigger(question), every=True, limit=10**6))
    assert least == pytest.approx(min(one.facts["memory"] for one in roomy.ranked) / 1e9, abs=0.05)
    assert "GB a GPU" in refusal(lambda: served(question))


def bigger(question: Question) -> Any:
    """The same hardware with memory for anything."""
    memory = question.hardware.memory.model_copy(update={"value": 1e18})
    return question.hardware.model_copy(update={"memory": memory})


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: served(asked(hardware="a100-80gb"), precisions=("fp8",)), "a100-80gb multiplies no fp8"),
        (lambda: served(asked(), precisions=("fp9",)), 'no precision "fp9"; did you mean "fp8"?'),
        (
            lambda: trained(asked(tries={"pipeline_parallel": "33"}, gpus=66)),
            "want 33 layers, and there are 32",
        ),
        (lambda: trained(asked(tries={"tensor_parallel": "7"}, gpus=7)), "32 heads cannot be divided over 7"),
        (lambda: trained(asked(constraints=("tensor_paralel<=8",))), 'did you mean "tensor_parallel"?'),
        (lambda: trained(asked(constraints=("tpot<=1",))), 'no field "tpot"'),
        (lambda: trained(asked(constraints=("tensor_parallel<1",))), "break tensor_parallel<1; loosen that"),
        (lambda: served(asked(), slo={"tpots": "1"}), 'did you mean "tpot"?'),
        (lambda: served(asked(), slo={"tpot": "0"}), "can never be kept"),
        (lambda: served(asked(), slo={"tpot": "1e-9"}), "break tpot<=1e-09; loosen that"),
        (lambda: trained(asked(rank="beauty")), 'are not ranked by "beauty"'),
        (lambda: asked(least_gpus=33), "at least 33 of 32 GPUs"),
        (lambda: asked(memory_reserve=float("nan")), "no share"),
        (lambda: asked(gpu_hour_usd=float("nan")), "no price"),
        (lambda: training.plan(asked(), batch_tokens=float("nan"), context=1), "batch of nan tokens"),
        (lambda: training.plan(asked(), batch_tokens=1, context=4096), "batch too small or not divisible"),
        (lambda: served(asked(), skew=float("inf")), "skew of inf"),
    ],
)
def test_what_cannot_be_asked_ends_in_one_sentence(act: Callable[[], object], sentence: str) -> None:
    """Unknown names, impossible numbers and limits that nothing keeps are refused with the numbers."""
    assert sentence in refusal(act)


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Both goals print the best layouts, as text and as JSON with the same figures."""
    for goal in ("train", "serve"):
        line = ("plan", "mixtral-8x7b", "--hardware", "h100", "--gpus", "32", "--goal", goal, "--limit", "3")
        assert command(*line) == 0
        shown = capsys.readouterr().out
        assert "Ruled out" in shown
        assert command(*line, "--format", "json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert len(facts["ranked"]) == 3
        assert f"{facts['fitting']:,} of {facts['evaluated']:,} layouts fit" in shown


def test_the_command_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """What a user gets wrong ends in 78 with a sentence, and no table."""
    line = ("plan", "gpt4-leak", "--hardware", "h100", "--gpus", "32", "--goal", "train")
    assert command(*line) == 78
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "--set architecture.d_model=..." in shown.err
