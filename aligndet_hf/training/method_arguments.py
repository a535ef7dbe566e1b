"""A flag for every field of the configs of the methods, with the words that the configs have for it."""

import re
import types
import typing
from dataclasses import field, make_dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..models import AlignDetConfig, SoCoConfig

CONFIGS = {"aligndet": AlignDetConfig, "soco": SoCoConfig}
TITLES = {"aligndet": "AlignDet", "soco": "SoCo"}


def fields_of(method: str) -> dict[str, Any]:
    """The fields that one chooses for a method, with their types; the fields of networks come from elsewhere."""
    config = CONFIGS[method]
    return {name: kind for name, kind in config.__annotations__.items() if name not in config.sub_configs}


def _words(config: type) -> dict[str, str]:
    """What the docstring of a config says of each of its fields, in one line."""
    start = re.compile(r"^ {8}(\w+) \((.*?)\):", re.MULTILINE)
    pieces = start.split(config.__doc__.split("Args:")[1].split("Raises:")[0])[1:]
    words = {name: " ".join(text.split()) for name, text in zip(pieces[::3], pieces[2::3], strict=True)}
    return {name: re.sub(r"\.? See \[.*?\]\.?$", "", text).rstrip(".") for name, text in words.items()}


def _as_flag(kind: Any) -> Any:
    """The type of a flag that is not given by default; of `float | int` only the first."""
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = parts[0]
    return kind | None


def _help(name: str) -> str:
    """The words of the first method that has the field, and the defaults of all."""
    methods = [method for method in CONFIGS if name in fields_of(method)]
    defaults = {method: getattr(CONFIGS[method], name) for method in methods}
    told = "; ".join(f"{TITLES[method]}: {value}" for method, value in defaults.items() if value is not None)
    words = _words(CONFIGS[methods[0]])[name]
    return f"{words} ({told})" if told else words


def _method_fields() -> list[tuple]:
    kinds = fields_of("soco") | fields_of("aligndet")
    role = {name: "start" if "backbone" in name else "result" for name in kinds}  # as fine-tuning has them
    return [
        (name, _as_flag(kind), field(default=None, metadata={"role": role[name], "help": _help(name)}))
        for name, kind in sorted(kinds.items(), key=lambda item: list(fields_of("aligndet") | kinds).index(item[0]))
    ]


MethodArguments = make_dataclass(
    "MethodArguments",
    _method_fields(),
    kw_only=True,
    namespace={
        "__module__": __name__,
        "__doc__": "The numbers of a pre-training method; what is not given is as the method's config has it.",
        "help_groups": {name: TITLES[method] for method in reversed(CONFIGS) for name in fields_of(method)},
    },
)


def join_config(arguments: Any) -> None:
    """
    Puts the flags of a method's config where its fields in JSON are, `aligndet_config` or `soco_config`.

    A run records them there. Both are taken, but not with different values.

    Raises:
        ValueError: a field is another method's, is given twice, is not known, or has a value that it cannot have.
    """
    for method, config in CONFIGS.items():
        name, known = f"{method}_config", fields_of(method)
        given = getattr(arguments, name)
        if unknown := set(given) - set(known):
            raise ValueError(f"{name}: unknown {sorted(unknown)}; there are {sorted(known)}")
        if given and method != arguments.method:
            raise ValueError(f"{name} is for --method {method}, this is {arguments.method}")
        for flag in known if method == arguments.method else set(known) - set(fields_of(arguments.method)):
            value = getattr(arguments, flag)
            if value is None:
                continue
            if method != arguments.method:
                raise ValueError(f"{flag} is for --method {method}, this is {arguments.method}")
            if given.get(flag, value) != value:
                raise ValueError(f"{flag} is {value!r}, and {given[flag]!r} in {name}: give one of them")
            given = given | {flag: value}
            setattr(arguments, flag, None)
        setattr(arguments, name, given)
        try:
            config(**given)
        except StrictDataclassError as error:
            raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
