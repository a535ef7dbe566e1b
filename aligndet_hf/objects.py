"""Objects where a path or Hub id is expected: a data set in memory, a model, or what a command returned."""

import copy
import hashlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .flags import names_of


class Given(str):
    """
    A name that stands for an object, so that settings, messages and records can hold it as they hold a path.

    The same content has the same name: a run is resumed with the same object, and refused with another one.

    Attributes:
        value: The object.
    """

    value: Any

    def __deepcopy__(self, memo) -> "Given":
        return self

    def __reduce__(self):
        return str, (str(self),)  # other processes get the name


def as_source(source: Any) -> Any:
    """
    What a command keeps of the source that it was given.

    Args:
        source: A path, Hub id or `None`, which stay as they are, a path as text; what a command returned, which
            becomes the folder that it wrote; a `datasets.Dataset`, `DatasetDict`, `IterableDataset`, a model or an
            image processor, which become [`Given`].

    Raises:
        ValueError: it is something else.
    """
    if source is None or isinstance(source, str):
        return source
    if isinstance(source, Path):
        return str(source)
    if (folder := folder_of(source)) is not source:
        return folder
    name = Given(f"{type(source).__name__}-{_content_of(source)}")
    name.value = source
    return name


def folder_of(source: Any) -> Any:
    """The folder that a command wrote, as text, of what it returned; anything else as it is."""
    for name in ("detector_dir", "backbone_dir", "output_dir"):  # of `PretrainResult` and `FinetuneResult`
        if isinstance(folder := getattr(source, name, None), Path):
            return str(folder)
    return source


def copy_of(source: Any) -> Any:
    """A copy of the object that a [`Given`] stands for, which stays as it is; `None` for a path or Hub id."""
    return copy.deepcopy(source.value) if isinstance(source, Given) else None


def _content_of(source: Any) -> str:
    """A few letters that tell the content of an object from another one's."""
    digest = hashlib.blake2b(digest_size=6)
    if hasattr(source, "named_parameters"):
        for name, tensor in sorted(source.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
    elif hasattr(source, "_fingerprint"):  # of a data set
        digest.update(source._fingerprint.encode())
    elif isinstance(source, dict):  # several splits
        for name, part in source.items():
            digest.update(f"{name} {_content_of(part)}".encode())
    elif hasattr(source, "to_json_string"):  # an image processor
        digest.update(source.to_json_string().encode())
    elif hasattr(source, "features"):  # a stream, whose content is not known before it is read
        digest.update(repr((source.features, getattr(source, "n_shards", None))).encode())
    else:
        raise ValueError(
            f"a path, a Hub id, a data set or a model is expected, got a {type(source).__name__}. A data set is "
            "made of images or their paths by datasets.Dataset.from_dict({'image': [...]}), of a table by from_pandas"
        )
    return digest.hexdigest()


def name_objects(arguments) -> None:
    """
    Puts a name in place of every object among the arguments of a command; to be called first in `__post_init__`.

    Args:
        arguments: A dataclass; of its flags those with the role `data`, `start` or `best` can be objects.
    """
    hints = typing.get_type_hints(type(arguments))
    for name in names_of(type(arguments), "data", "start", "best"):
        value, hint = getattr(arguments, name), hints[name]
        if isinstance(value, list) and list in map(typing.get_origin, (hint, *typing.get_args(hint))):
            setattr(arguments, name, [as_source(one) for one in value])
        elif _is_object(value):
            setattr(arguments, name, as_source(value))


def _is_object(value: Any) -> bool:
    """Whether a value is no setting; a dict of data sets is one of splits."""
    if isinstance(value, Mapping) and not hasattr(value, "column_names"):
        return len(value) > 0 and all(hasattr(part, "column_names") for part in value.values())
    return not isinstance(value, int | float)
