"""Figures as printed: what interval of values each stands for."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.spec.printed import Interval, interval, is_figure


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("~1.8e12", 1.75e12, 1.85e12),
        ("1.8e12", 1.75e12, 1.85e12),
        ("1.80e12", 1.795e12, 1.805e12),
        ("~280e9", 275e9, 285e9),
        ("~111e9", 110.5e9, 111.5e9),
        ("2.15e25", 2.145e25, 2.155e25),
        ("25,000", 24500, 25500),
        ("~25,000", 24500, 25500),
        ("3700", 3650, 3750),
        ("560", 555, 565),
        ("7.5e6", 7.45e6, 7.55e6),
        ("0.0049", 0.00485, 0.00495),
        ("174600e6", 174550e6, 174650e6),
        ("46.7B", 46.65e9, 46.75e9),
        ("~1.8T", 1.75e12, 1.85e12),
        ("3x", 2.5, 3.5),
        ("0", -0.5, 0.5),
    ],
)
def test_a_figure_is_the_interval_of_its_rounding(text: str, low: float, high: float) -> None:
    """Half a unit of the last significant digit to either side; trailing integer zeros are placeholders."""
    assert interval(text) == Interval(low, high)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<30", Interval(-inf, 30, low_open=True, high_open=True)),
        ("<=30", Interval(-inf, 30, low_open=True)),
        (">10", Interval(10, inf, low_open=True, high_open=True)),
        (">=10", Interval(10, inf, high_open=True)),
        (">10x", Interval(10, inf, low_open=True, high_open=True)),
        ("90-100", Interval(90, 100)),
        ("32-36%", Interval(32, 36)),
        ("90-100M", Interval(90e6, 100e6)),
        ("32%-36%", Interval(32, 36)),
    ],
)
def test_bounds_and_ranges_end_at_their_figures(text: str, expected: Interval) -> None:
    """A bound or a range is not widened by rounding, and a strict bound is open."""
    assert interval(text) == expected


@pytest.mark.parametrize(
    "text", ["yes", "", "~", "twice", "nan", "1e", "1.8e12e3", "100-90", "<", "1,23", "-"]
)
def test_what_is_no_figure_is_refused(text: str) -> None:
    """Text that is no figure raises a ValueError that shows it, and is_figure says so."""
    assert not is_figure(text)
    with pytest.raises(ValueError, match=r'^"'):
        interval(text)


def test_an_exact_figure_is_itself() -> None:
    """A count is no rounding: 120 layers are 120."""
    assert interval("120", exact=True) == Interval(120, 120)
    assert 121 not in interval("120", exact=True)


def test_membership_respects_open_ends() -> None:
    """An open end and NaN do not belong."""
    assert 30 not in interval("<30")
    assert 30 in interval("<=30")
    assert (inf - inf) not in interval("90-100")


@given(st.decimals(min_value=-(10**15), max_value=10**15, allow_nan=False, allow_infinity=False, places=4))
def test_a_value_lies_in_the_interval_of_its_own_print(value: object) -> None:
    """Whatever is printed contains itself."""
    assert float(str(value)) in interval(f"{value:f}")


@given(st.floats(min_value=1e-6, max_value=1e15), st.integers(1, 8))
def test_fewer_digits_mean_a_wider_interval(value: float, digits: int) -> None:
    """A print with one digit less is wider, and both contain what was printed."""
    fine, coarse = interval(f"{value:.{digits}e}"), interval(f"{value:.{digits - 1}e}")
    assert fine.high - fine.low < coarse.high - coarse.low
    assert value in coarse or value == pytest.approx(coarse.low) or value == pytest.approx(coarse.high)
