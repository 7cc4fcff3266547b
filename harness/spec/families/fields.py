"""Reading the keys of a config.json: typed, under their defaults, and none left over.

A family's importer asks for each key by its meaning. A key that it never asked for, and that is not known
to leave the computation alone, is refused by name: what is not understood is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from harness.spec.errors import SpecError, sentence, show

Word = TypeVar("Word")

MAX_COUNT = 2**40
MAX_LAYERS = 10_000
"""Beyond these a number is a slip of the keyboard, and nobody should wait for it to be validated."""


class ConfigError(SpecError):
    """A config.json that cannot become a spec: one sentence, and the dotted `field` at fault."""

    def __init__(
        self, field: str, wrong: str, right: str, *, file: str = "config.json", line: int | None = None
    ) -> None:
        super().__init__(sentence(file, line, field, wrong, right))
        self.field, self.wrong, self.right = field, wrong, right


def same(left: Any, right: Any) -> bool:
    """Equality of JSON values: true is not 1, though 1 is 1.0."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


class Fields:
    """The keys of one JSON object, by their canonical names.

    `defaults` gives the value of an absent key; an absent key without one is refused. `aliases` maps
    other spellings to canonical names. Every method raises ConfigError naming the key.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        *,
        aliases: Mapping[str, str] | None = None,
        prefix: str = "",
    ) -> None:
        self.defaults = defaults
        self.prefix = prefix
        self.given: dict[str, Any] = {}
        self.spelling: dict[str, str] = {}
        self.defaulted: set[str] = set()
        self.read: set[str] = set()
        for key, value in config.items():
            name = (aliases or {}).get(key, key)
            if name in self.given and not same(self.given[name], value):
                raise self.refuse(
                    key, f"{show(value)} contradicts {name} = {show(self.given[name])}", "keep one"
                )
            self.given[name] = value
            self.spelling.setdefault(name, key)

    def refuse(self, key: str, wrong: str, right: str) -> ConfigError:
        """The error to raise about `key`."""
        return ConfigError(self.prefix + self.spelling.get(key, key), wrong, right)

    def value(self, key: str) -> Any:
        """The raw value of `key`, or its default."""
        self.read.add(key)
        if key in self.given:
            return self.given[key]
        if key not in self.defaults:
            raise self.refuse(key, "is missing", "a config.json must give it")
        self.defaulted.add(key)
        return self.defaults[key]

    def count(self, key: str, *, least: int = 1, most: int = MAX_COUNT) -> int:
        """A whole number from `least` to `most`."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refuse(key, f"got {show(value)}", f"it must be a whole number from {least} to {most}")
        return value

    def count_or_none(self, key: str) -> int | None:
        """The same, or None for null."""
        return None if self.value(key) is None else self.count(key)

    def number(self, key: str, *, least: float = 0.0) -> float:
        """A finite number above 0, and at least `least`."""
        value = self.value(key)
        try:
            number = (
                math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
            )
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number > 0 and number >= least):
            right = f"it must be a number of at least {least:g}" if least else "it must be a number above 0"
            raise self.refuse(key, f"got {show(value)}", right)
        return number

    def number_or_none(self, key: str) -> float | None:
        """The same, or None for null."""
        return None if self.value(key) is None else self.number(key)

    def weight(self, key: str) -> float:
        """The coefficient of a loss: a finite number from 0 up; null is 0."""
        value = self.value(key)
        return 0.0 if value is None or same(value, 0) else self.number(key)

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.refuse(key, f"got {show(value)}", "it must be true or false")
        return value

    def word(self, key: str, words: Mapping[str, Word]) -> Word:
        """What `words` has for the string at `key`."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.refuse(key, f"got {show(value)}", f"it must be one of {', '.join(words)}")
        if value not in words:
            raise self.refuse(key, f"a spec cannot express {show(value)}", f"known are {', '.join(words)}")
        return words[value]

    def table(self, key: str) -> Mapping[str, Any] | None:
        """A JSON object that is not empty, or None for null."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, Mapping) or not value:
            raise self.refuse(key, f"got {show(value)}", "it must be an object with keys, or null")
        return value

    def words(self, key: str, words: Mapping[str, Word], length: int) -> tuple[Word, ...] | None:
        """A list of `length` words, each translated by `words`, or None for null."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise self.refuse(key, "is no list with one entry a layer", f"it must have {length} entries")
        for item in value:
            if not isinstance(item, str) or item not in words:
                raise self.refuse(key, f"a spec cannot express {show(item)}", f"known are {', '.join(words)}")
        return tuple(words[item] for item in value)

    def only(self, key: str, allowed: Collection[Any], why: str) -> None:
        """Read a key that a spec can express for the values `allowed` alone."""
        value = self.value(key)
        if not any(same(value, other) for other in allowed):
            wanted = " or ".join("null" if other is None else show(other) for other in allowed)
            raise self.refuse(key, f"a spec cannot express {show(value)} ({why})", f"it must be {wanted}")

    def leftovers(self, ignored: Collection[str]) -> list[str]:
        """Keys given but never read, as they are spelt; those in `ignored` apart."""
        return [self.spelling[key] for key in self.given if key not in self.read and key not in ignored]
