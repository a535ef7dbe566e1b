"""The values that arguments may have. Every field of a command's arguments that is a number has a range."""

import dataclasses
import functools
import math
import numbers
import os
import typing
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Range:
    """
    An interval of finite numbers; `value in Range(0, 1)` and `f"must be {Range(0, 1)}"` work.

    Attributes:
        low, high (`float`): the bounds, which belong to it.
        above (`bool`): whether the lower bound does not.
        below (`bool`): whether the upper bound does not.
        also (`float`, *optional*): a number outside that has a meaning of its own.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        is_above = value > self.low if self.above else value >= self.low
        is_below = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and is_above and is_below

    def __str__(self) -> str:
        low, high = (f"{bound:.12g}" for bound in (self.low, self.high))
        if self.high == math.inf and (self.low == 1 or (self.low == 0 and self.above)):
            text = "positive"
        elif not self.above and not self.below and math.isfinite(self.high):
            text = f"from {low} to {high}"
        else:
            words = [f"above {low}" if self.above else f"{low} or more"] * math.isfinite(self.low)
            words += [f"below {high}" if self.below else f"at most {high}"] * math.isfinite(self.high)
            text = " and ".join(words) or "finite"
        return text if self.also is None else f"{text}, or {self.also:g}"


ANY = Range()
NOT_NEGATIVE = Range(0)  # the range of a number whose field says nothing else
COUNT = Range(1)
PIXELS = Range(1, 2**15 - 1)  # of the side of an image: OpenCV warps no larger one
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
PART = Range(0, 1, above=True)
BELOW_ONE = Range(0, 1, below=True)
LIMIT = Range(1, also=-1)  # for `max_steps` and the like, with -1 for none
SEED = Range(0, 2**32 - 1)


def check_values(arguments) -> None:
    """
    Refuses values of another kind, numbers out of their ranges, and text that is empty; `~` in `output_dir` becomes
    the home.

    To be called first in `__post_init__` of a command's arguments: neither the console nor Python gets past it.

    Args:
        arguments: a dataclass. `metadata={"range": ...}` of a field holds the [`Range`] of a number, or of each in a
            list; without one it is finite and not negative. Fields inherited from another package have theirs in the
            class attribute `inherited_ranges`, by name.

    Raises:
        `ValueError`: for the first such field, with what it takes.
    """
    if isinstance(getattr(arguments, "output_dir", None), str):
        arguments.output_dir = os.path.expanduser(arguments.output_dir)  # here, so that all of a command writes there
    inherited = getattr(arguments, "inherited_ranges", {})
    for field in dataclasses.fields(arguments):
        value, kinds = getattr(arguments, field.name, None), _kinds(type(arguments))[field.name]
        if field.init and "role" in field.metadata:  # transformers looks at what is its own
            _require_kind(field, value, kinds)
        allowed = field.metadata.get("range") or inherited.get(field.name, NOT_NEGATIVE)
        texts = value if isinstance(value, list) and str in kinds else [value]
        if any(isinstance(text, str) and not text.strip() and text != field.default for text in texts):
            raise ValueError(f"{field.name} must not be empty" + (": leave it out" if field.default is None else ""))
        if isinstance(value, str) and {list, str} <= kinds and "role" in field.metadata:  # one is enough
            setattr(arguments, field.name, [value])
        if value is None or kinds.isdisjoint({int, float}) or (isinstance(value, str) and str in kinds):
            continue
        is_list = isinstance(value, list | tuple)
        if is_list and not value and (field.default_factory is dataclasses.MISSING or field.default_factory()):
            raise ValueError(f"{field.name} must not be empty")
        kind, word = (numbers.Real, "") if float in kinds else (numbers.Integral, "whole ")
        for number in value if is_list else [value]:
            if not isinstance(number, kind) or isinstance(number, bool):
                raise ValueError(f"{field.name} must be a {word}number, got {number!r}")
            require(field.name, number, allowed)
        plain = [_plain(number) for number in value] if is_list else _plain(value)
        setattr(arguments, field.name, tuple(plain) if isinstance(value, tuple) else plain)


def _plain(number: numbers.Real) -> int | float:
    """A number that JSON can hold, of one that may be NumPy's."""
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def _require_kind(field: dataclasses.Field, value: typing.Any, kinds: set) -> None:
    """What the console cannot get wrong, and Python can."""
    choices, due = [kind for kind in kinds if isinstance(kind, str)], kinds - {type(None)}
    if value is None:
        if due == kinds:
            raise ValueError(f"{field.name} must be given")
    elif dict in due and str not in due and not isinstance(value, Mapping):
        raise ValueError(f"{field.name} must be a dict, got {value!r}")
    elif list in due and str not in due and isinstance(value, str | int | float):
        raise ValueError(f"{field.name} must be a list, such as [{value!r}], got {value!r}")
    elif choices and value not in choices and due <= set(choices):
        raise ValueError(f"{field.name} must be {' or '.join(sorted(choices))}, got {value!r}")
    elif due == {bool} and value not in (True, False):
        raise ValueError(f"{field.name} must be True or False, got {value!r}")
    elif due == {str} and isinstance(value, dict | list | tuple | numbers.Number):  # objects may stand for paths
        got = repr(value) if isinstance(value, numbers.Number) else f"a {type(value).__name__}"
        raise ValueError(f"{field.name} must be text, got {got}")


def require(name: str, number: float, allowed: Range) -> None:
    """Raises a `ValueError` that names the number if it is out of its range."""
    if number not in allowed:
        raise ValueError(f"{name} must be {allowed}, got {number}")


@functools.cache
def _kinds(cls: type) -> dict[str, set[type]]:
    """The types in the annotation of every field: of `list[int] | None` they are list, int and NoneType."""

    def plain(hint) -> set[type]:
        parts, origin = typing.get_args(hint), typing.get_origin(hint)
        if not parts or origin is dict:
            return {origin or hint}
        return set().union(*map(plain, parts)) | ({list} if origin is list else set())

    return {name: plain(hint) for name, hint in typing.get_type_hints(cls).items()}
