"""Flags and YAML recipes made of a dataclass: one field is a flag, a key of the recipe and an argument in Python."""

import argparse
import copy
import dataclasses
import json
import re
import shutil
import typing
from pathlib import Path

from transformers import HfArgumentParser

from .flags import REQUIRED, default_of, nearest, old_names, roles, with_new_names
from .recipes import find_recipe, read_recipe

REQUIRED_SECTION = "Required"
# Where a section stands in the help, if not in the middle.
SECTIONS = {"Detector": -2, "Data": -1, "Run": 1, "Output": 2, "Hub": 3}


def parse_arguments(cls: type, argv: list[str], prog: str = "aligndet", description: str | None = None):
    """
    Build the dataclass `cls` from flags and an optional `--config` YAML file.

    The recipe's values become the defaults of the flags, so a flag on the command line wins. Values of the recipe go
    through the same conversion as flags (`1e-4`, which YAML reads as text, is a float where a float is due). Fields of
    type `dict` take JSON on the command line and a mapping in YAML.

    Args:
        cls (`type`): A dataclass; the metadata of a field holds its `help`.
        argv (`list[str]`): The flags.
        prog (`str`): What `--help` calls the command.
        description (`str`, *optional*): The first line of `--help`.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: an unknown flag or key (the nearest valid one is named), a value of the wrong type, or a required
            one that is missing.
    """
    parser = ArgumentParser(cls, show_all="--help-all" in argv, prog=prog, description=description)
    argv = ["--help" if arg == "--help-all" else arg for arg in argv]
    config, argv = _split(cls, argv)
    if config is not None:
        parser.set_defaults_from(config)
    required = parser.take_required()  # a misspelt flag is told before the one that is missing for it
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}")
    if missing := [action.option_strings[0] for action in required if getattr(namespace, action.dest) is None]:
        raise ValueError(f"the following arguments are required: {', '.join(missing)}")
    return cls(**vars(namespace))


class ArgumentParser(HfArgumentParser):
    """
    `HfArgumentParser` that raises instead of exiting, reads `dict` fields as JSON, and prints a help one can read.

    A dataclass names the sections of its help in the class attribute `help_groups`, a dictionary from the first field
    of a section to its title; required flags come first, in a section of their own. Fields inherited from another
    package (`transformers.TrainingArguments`) are accepted as well, but listed only with `--help-all`.
    """

    usage_line = "%(prog)s [--config recipe.yaml] [--flag value ...]"

    def __init__(self, cls: type, show_all: bool = False, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, usage=self.usage_line, **kwargs)
        self.cls = cls
        self.fields = {field.name for field in dataclasses.fields(cls) if field.init}
        self.titles = _help_titles(cls)
        titles = sorted(dict.fromkeys(self.titles.values()), key=lambda title: SECTIONS.get(title, 0))
        self.roles = roles(cls)
        self.sections = {title: self.add_argument_group(title) for title in (REQUIRED_SECTION, *titles)}
        self.inherited = self.add_argument_group("Inherited")
        self.show_all = show_all
        common = self.add_argument_group("Common")
        common.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML recipe of these flags")
        common.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help="for a bug report")
        self._add_dataclass_arguments(cls)
        if self.inherited._group_actions and not show_all:
            self.epilog = "Most flags of transformers.TrainingArguments are accepted as well; --help-all lists them."

    def _parse_dataclass_field(self, parser, field: dataclasses.Field):
        is_required = default_of(field) is REQUIRED or field.metadata.get("needed_on_console", False)
        title = REQUIRED_SECTION if is_required else self.titles.get(field.name)
        section = self.sections.get(title, self.inherited)
        known = len(self._actions)
        is_dict = dict in {typing.get_origin(hint) or hint for hint in (field.type, *typing.get_args(field.type))}
        field = copy.copy(field)
        # What argparse knows; the rest of what a field says of itself is for others.
        field.metadata = {key: value for key, value in field.metadata.items() if key in ("help", "aliases", "choices")}
        HfArgumentParser._parse_dataclass_field(section, field)
        for action in self._actions[known:]:
            action.required = is_required
            if is_dict and section is not self.inherited:
                action.type, action.metavar = _json_mapping, "JSON"
            is_complement = action.option_strings[0] == f"--no_{field.name}"
            is_listed = section is not self.inherited or (self.show_all and self.roles[field.name] != "refused")
            if is_complement or not is_listed:
                action.help = argparse.SUPPRESS

    def set_defaults_from(self, config: str):
        """Make the values of a YAML file the defaults, as if they had been given as flags."""
        config = find_recipe(config)
        values = with_new_names(self.cls, _beside(read_recipe(config), config.parent))
        required = self.take_required()  # while only the recipe is parsed
        for key, value in values.items():
            if key not in self.fields:
                meant = nearest(str(key), self.fields)
                # Recipes of the package begin with the command that takes them.
                line = rf"(?:aligndet |scripts/)(\w+)(?:\.py)? --config {re.escape(config.stem)}\b"
                owner = re.search(line, config.read_text(encoding="utf-8", errors="replace"))
                if owner and self.prog != f"aligndet {owner[1]}":
                    meant = f". It is a recipe of `aligndet {owner[1]}`"
                raise ValueError(f"{config}, as a recipe of {self.prog}: unknown key {key!r}{meant}")
            if value is not None and value != []:
                try:
                    value = getattr(self.parse_args(_as_flags(key, value)), key)
                except ValueError as error:
                    raise ValueError(f"{config}: {error}") from error
            self.set_defaults(**{key: value})
        for action in required:
            action.required = action.dest not in values

    def take_required(self) -> list[argparse.Action]:
        """The flags that must be given, which argparse does not ask for any more."""
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        return required

    def error(self, message: str):
        """One line, with the flag by the name that our messages have for it."""
        if found := re.fullmatch(r"argument (--\w+)\S*: invalid (\w+) value: (.*)", message):
            name, kind, value = found.groups()
            what = {"int": "a whole number", "float": "a number"}.get(kind, f"of the type {kind}")
            message = f"{name}: {value} is not {what}" + "; give several with spaces between them" * ("," in value)
        raise ValueError(message)


class HelpFormatter(argparse.HelpFormatter):
    """One spelling of each flag, the type of its value, and its default where it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {"string_to_bool": "true|false", "str": "TEXT"}
        name = getattr(action.type, "__name__", "value")
        return names.get(name, name.upper())

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is argparse.SUPPRESS or action.default in (None, [], {}, "") or action.nargs == 0:
            return action.help
        return f"{action.help} (default: %(default)s)"


def _help_titles(cls: type) -> dict[str, str]:
    """The section title of every field that one of our classes declares, in the order in which help lists them."""
    titles, last = {}, {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("transformers"):
            groups = vars(base).get("help_groups", {})
            title = last.get(base.__bases__) or base.__name__.removesuffix("Arguments")
            for name in vars(base).get("__annotations__", ()):
                title = groups.get(name, title)
                if name in groups or name not in titles:  # what is changed for one command stays where it is
                    titles[name] = title
                last[(base,)] = title  # a class that extends one other goes on in its last section
    return titles


def _beside(value, folder: Path):
    """A value of a recipe whose references to other recipes (`config`, `chain`) lie in the folder of the recipe."""
    if isinstance(value, list):
        return [_beside(one, folder) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(folder / one)
        if key in ("config", "chain") and isinstance(one, str) and (folder / one).is_file() and not Path(one).is_file()
        else _beside(one, folder)
        for key, one in value.items()
    }


def _as_flags(key: str, value) -> list[str]:
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def _split(cls: type, argv: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, and the flags by the names that they have now."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    for name in old_names(cls):
        names = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(*names, dest=name, nargs="?", const=True, default=argparse.SUPPRESS)
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    given = vars(found)
    config = given.pop("config")
    return config, [word for item in with_new_names(cls, given).items() for word in _as_flags(*item)] + rest


def _json_mapping(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON mapping is due, such as '{{\"num_queries\": 100}}', not: {text}")
    return value
