"""The classes of a detector: their number and their names, which a config holds twice."""

from collections.abc import Mapping, Sequence
from typing import Any


def class_fields(num_labels: int | None, id2label: Mapping[int, str] | Sequence[str] | None) -> dict[str, Any]:
    """
    The fields of a detector's config for its classes.

    Args:
        num_labels (`int`, *optional*): how many there are; as many as there are names, or one, if not given.
        id2label (`dict[int, str]` or `list[str]`, *optional*): their names.

    Raises:
        `ValueError`: for a number that is not positive, or another one than there are names.
    """
    names = id2label if id2label is None or isinstance(id2label, Mapping) else dict(enumerate(id2label))
    count = num_labels if num_labels is not None else len(names) if names is not None else 1
    if type(count) is not int or count < 1:
        raise ValueError(f"num_labels must be a positive whole number, got {count!r}")
    if names is None:
        return {"num_labels": count}
    if len(names) != count:
        raise ValueError(f"num_labels is {count}, and id2label has {len(names)} names: give one of the two")
    names = {int(index): name for index, name in names.items()}
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def are_unnamed(id2label: Mapping[int, str]) -> bool:
    """Whether the classes have the names that transformers gives them: `LABEL_0`, `LABEL_1`, ..."""
    return all(name == f"LABEL_{index}" for index, name in id2label.items())
