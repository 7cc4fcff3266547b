"""Hardware: every figure has a source, and a file that cannot be used says where."""

from __future__ import annotations

import pytest

from harness._resources import specs_dir
from harness.spec import SpecError
from harness.spec.hardware import hardware_names, load_hardware

LINK = '{ bandwidth = 1e9, latency = 1e-5, source = "sheet", latency_source = "sheet" }'
GOOD = """[source]
sheet = "a data sheet"

[hardware.mine]
title = "Mine"
memory = { value = 80e9, source = "sheet" }
bandwidth = { value = 3e12, source = "sheet" }
peak = { bfloat16 = { value = 1e15, source = "sheet" } }
island = 8
island_link = { bandwidth = 4e11, latency = 1e-5, source = "sheet", latency_source = "sheet" }
network_link = { bandwidth = 5e10, latency = 2e-5, source = "sheet", latency_source = "sheet" }
gpu_hour_usd = { value = 2, source = "sheet" }
"""


@pytest.mark.parametrize("name", hardware_names())
def test_shipped_hardware_is_of_dense_figures(name: str) -> None:
    """An eight-bit product is no more than twice a sixteen-bit one, and links are slower than memory."""
    one = load_hardware(name)
    peak = {form: figure.value for form, figure in one.peak.items()}
    # 1 %: data sheets round each figure by itself
    assert all(peak[form] <= 2.02 * peak["bfloat16"] for form in ("fp8", "int8") if form in peak)
    assert one.network_link.bandwidth <= one.island_link.bandwidth < one.bandwidth.value
    assert one.island_link.latency <= one.network_link.latency


def test_half_precision_multiplies_alike() -> None:
    """float16 has bfloat16's rate, and a format that is not multiplied is a sentence with those that are."""
    h100 = load_hardware("h100")
    assert h100.peak_flops("float16") == h100.peak_flops("bfloat16")
    with pytest.raises(SpecError, match=r"h100 multiplies no fp4; it has .*fp8 \(1,979 TFLOP/s\)"):
        h100.peak_flops("fp4")


def test_a_file_of_ones_own_is_named_beside_its_hardware(tmp_path) -> None:
    """FILE.toml:NAME loads from that file; any other name is an error with those it has."""
    file = tmp_path / "own.toml"
    file.write_text(GOOD)
    assert load_hardware(f"{file}:mine").title == "Mine"
    with pytest.raises(SpecError, match="mine"):
        load_hardware(f"{file}:mined")
    with pytest.raises(SpecError, match="no such file"):
        load_hardware(f"{tmp_path / 'absent.toml'}:mine")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("island = 8", "island = 0", r"own\.toml:9: hardware\.mine\.island"),
        ("island = 8", "", r"hardware\.mine\.island: is missing"),
        ("island = 8", "island = 8\nislands = 8", r"own\.toml:10: hardware\.mine\.islands: is unknown"),
        ('3e12, source = "sheet"', '3e12, source = "shet"', r'own\.toml:7: .*"shet" is no source.*sheet'),
        ("value = 80e9", "value = -1", r"own\.toml:6: hardware\.mine\.memory"),
        ("bfloat16 =", "bf16 =", r"own\.toml:8: hardware\.mine\.peak"),
        (
            '[hardware.mine]\ntitle = "Mine"',
            "[hardware]\nmine = 3\n[other]",
            "mine.*is no table|other: is unknown",
        ),
        ('[source]\nsheet = "a data sheet"', "source = 3", "source: is no table"),
        ("island = 8", "island = 8\ncluster = 64", "cluster and cluster_link belong together"),
        (
            "island = 8",
            f"island = 8\ncluster = 12\ncluster_link = {LINK}",
            "is not made of islands of 8",
        ),
        ("[source]", "[source", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(tmp_path, old: str, new: str, told: str) -> None:
    """One sentence with file, line and field, and what would be right."""
    assert old in GOOD
    file = tmp_path / "own.toml"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(SpecError, match=told):
        load_hardware(f"{file}:mine")


def test_every_source_is_cited() -> None:
    """The file of shipped hardware lists no source that nothing rests on."""
    text = (specs_dir() / "hardware.toml").read_text()
    named = [line.split(" = ")[0] for line in text.split("[hardware", 1)[0].splitlines() if " = " in line]
    assert len(named) > 5
    assert all(f'source = "{name}"' in text for name in named)
