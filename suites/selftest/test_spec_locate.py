"""Lines of TOML keys: the scanner agrees with tomllib on what there is, and with the text on where."""

from pathlib import Path

import pytest

from harness._resources import specs_dir
from harness.spec.locate import lines_of, nearest

TEXT = '''\
# [not.a.header]
name = "has # and [brackets] = inside"
long = """
[not a header]
x = 1
"""
raw = \'\'\'
[[neither]]\'\'\'
dotted.key."with space" = 1
inline = { a = 1, b.c = [ { d = 2 } ] }
many = [
  1, # one
  { e = 3 },
]
[table]
x = 1979-05-27T07:32:00Z
[[array]]
y = 1
[[array]]
y = 2
[[array.inner]]
z = 3
[array.sub]
w = 4
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("name",), 2),
        (("long",), 3),
        (("raw",), 7),
        (("dotted", "key", "with space"), 9),
        (("inline", "b", "c", 0, "d"), 10),
        (("many", 0), 12),
        (("many", 1, "e"), 13),
        (("table",), 15),
        (("table", "x"), 16),
        (("array", 0, "y"), 18),
        (("array", 1), 19),
        (("array", 1, "inner", 0, "z"), 22),
        (("array", 1, "sub", "w"), 24),
    ],
)
def test_a_key_has_its_line(path: tuple[str | int, ...], line: int) -> None:
    """Headers, arrays of tables, dotted keys, inline tables and multi-line values are followed."""
    assert lines_of(TEXT)[path] == line


def test_nothing_else_has_a_line() -> None:
    """Comments and text inside strings are no keys, and an unknown path falls back to what is around it."""
    lines = lines_of(TEXT)
    assert not {"not", "neither"} & {path[0] for path in lines}
    assert nearest(lines, ("array", 1, "missing", "deeper")) == 19
    assert nearest(lines, ("missing",)) == 1


@pytest.mark.parametrize("path", sorted(specs_dir().glob("*.toml")), ids=lambda path: path.stem)
def test_every_key_of_a_shipped_spec_stands_on_its_line(path: Path) -> None:
    """The line that is told for a key contains that key."""
    text = path.read_text(encoding="utf-8")
    for place, line in lines_of(text).items():
        if isinstance(place[-1], str):
            assert place[-1] in text.splitlines()[line - 1]
