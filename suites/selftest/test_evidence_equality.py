"""Equal tokens: which differences rounding explains."""

from __future__ import annotations

import math

import pytest
import torch

from harness.evidence.equality import agreement

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.999, 0.0], [0.0, 5.0, 1.0]], dtype=torch.float64)


def test_equal_tokens_report_the_margin() -> None:
    """The smallest lead on the path says how sharp the comparison was."""
    found = agreement([0, 0, 1], [0, 0, 1], LOGITS)
    assert found.equal
    assert not found.excused
    assert found.margin == pytest.approx(0.001)
    assert str(found) == "equal, smallest margin 0.001"


def test_a_difference_at_a_close_choice_is_excused_within_the_bound_only() -> None:
    """Two logits that lie closer than their error bounds may change places; others may not."""
    close = agreement([0, 0, 1], [0, 1, 1], LOGITS, 6e-4)
    assert (close.position, close.excused) == (1, True)
    assert close.gap == pytest.approx(0.001)
    assert "within the 0.0012" in str(close)
    assert not agreement([0, 0, 1], [0, 1, 1], LOGITS, 4e-4).excused
    assert not agreement([0, 0, 1], [0, 1, 1], LOGITS).excused
    # the third token is as far below as it can be, whatever the choice between the first two
    assert not agreement([0, 0, 1], [0, 2, 1], LOGITS, 6e-4).excused


def test_a_bound_for_each_logit_is_used_where_it_stands() -> None:
    """Only the bounds of the two tokens in question count."""
    radius = torch.zeros(3, 3)
    radius[0] = 1
    assert not agreement([0, 0, 1], [0, 1, 1], LOGITS, radius).excused
    radius[1, 1] = 0.01
    assert agreement([0, 0, 1], [0, 1, 1], LOGITS, radius).excused


def test_a_missing_token_is_never_excused() -> None:
    """A sequence that ends elsewhere, or a token that does not exist, is no matter of rounding."""
    short = agreement([0, 0, 1], [0, 0], LOGITS, 1.0)
    assert (short.position, short.gap, short.excused) == (2, math.inf, False)
    assert agreement([0, 0, 1], [0, 0, 1, 1], LOGITS, 1.0).position == 3
    assert not agreement([0, 0, 1], [0, 7, 1], LOGITS, 1.0).excused


def test_logits_must_belong_to_the_path() -> None:
    """As many logits as expected tokens."""
    with pytest.raises(ValueError, match="2 expected tokens need"):
        agreement([0, 0], [0, 0], LOGITS)
