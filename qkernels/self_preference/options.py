"""What a user may choose, checked."""

from __future__ import annotations

import math
from typing import Any

from ..text.characters import PrintableError


class SelfPreferenceError(PrintableError, ValueError):
    """Preference data that cannot be made, or a run that cannot go on; the text says what to do."""


def check_number(name: str, value: Any, least: float, *, above: bool = False, whole: bool = False) -> None:
    """Raise for an option that is no finite number of at least `least`, or above it.

    Raises:
        TypeError, ValueError: names the option, what came and what is accepted.
    """
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an int' if whole else 'a number'}, got {type(value).__name__}")
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(f"{name} must be {'above' if above else 'at least'} {least}, got {value}")


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which settings differ, for a message; "" if none does."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join(f"{name} (then {before.get(name)!r}, now {now.get(name)!r})" for name in names)


def check_sampling(samples: Any, temperature: Any, max_new_tokens: Any, min_gap: Any, seed: Any) -> None:
    """Raise for options of `build_pairs` that are out of range.

    Raises:
        TypeError, ValueError: as `check_number`.
    """
    check_number("samples", samples, 2, whole=True)
    check_number("temperature", temperature, 0, above=True)
    check_number("max_new_tokens", max_new_tokens, 1, whole=True)
    check_number("min_gap", min_gap, 0)
    check_number("seed", seed, 0, whole=True)
