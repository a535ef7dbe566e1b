"""The classes of a detector: their number and their names, which a config holds twice."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any


def class_fields(num_labels: int | None, id2label: Mapping[int, str] | Sequence[str] | None) -> dict[str, Any]:
    """
    The fields of a detector's config for its classes.

    Args:
        num_labels (`int`, *optional*): how many there are; as many as there are names, or one, if not given.
        id2label (`dict[int, str]` or `list[str]`, *optional*): their names.

    Raises:
        `ValueError`: for a number that is not positive, another one than there are names, or names that do not name
            the classes 0, 1, ... one by one.
    """
    names = dict(id2label if isinstance(id2label, Mapping) else enumerate(id2label or ()))
    count = num_labels if num_labels is not None else len(names) or 1
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ValueError(f"num_labels must be a positive whole number, got {count!r}")
    if not names:
        return {"num_labels": int(count)}
    if len(names) != count:
        raise ValueError(f"num_labels is {count}, and id2label has {len(names)} names: give one of the two")
    names = {int(index): name for index, name in names.items()}
    if isinstance(id2label, str) or sorted(names) != list(range(count)) or len(set(names.values())) != count:
        raise ValueError(
            f"id2label must have a name of its own for each of the classes 0 to {count - 1}, got {id2label}"
        )
    return {"num_labels": int(count), "id2label": names, "label2id": {name: index for index, name in names.items()}}


def are_unnamed(id2label: Mapping[int, str]) -> bool:
    """Whether the classes have the names that transformers gives them: `LABEL_0`, `LABEL_1`, ..."""
    return all(name == f"LABEL_{index}" for index, name in id2label.items())
