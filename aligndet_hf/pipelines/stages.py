"""Stages: commands of this package that build on each other's output, as a YAML file describes them."""

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import recursively_apply

from ..cli import COMMANDS
from ..flags import names_of, nearest, old_names
from ..parser import parse_arguments
from ..recipes import read_recipe
from .inputs import inputs_of

REFERENCE = re.compile(r"\$\{([^{}]*)\}")
# Not commands that run others, nor the one that writes into the folder of another.
STAGE_COMMANDS = [name for name in COMMANDS if name not in ("chain", "compare", "report")]


@dataclass(eq=False)
class Stage:
    """
    One command with all its settings.

    Attributes:
        name (`str`): What the file calls it.
        command (`str`): A key of `COMMANDS`.
        settings (`dict`): Its flags by name, `output_dir` included, without secrets: they are stored and compared.
        needs (`list[Stage]`): The stages whose output it refers to.
        uses (`set[str]`): The variables that it depends on, itself or through these stages.
        secrets (`dict`): The values of flags that are tokens; its process gets them, and no file does.
    """

    name: str
    command: str
    settings: dict[str, Any]
    needs: list["Stage"] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)
    secrets: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where its output is; its recipe, log and record lie beside it."""
        return Path(self.settings["output_dir"])

    def beside(self, suffix: str) -> Path:
        """A file beside the output: `.yaml` is the recipe, `.json` the record of the finished stage, `.log`."""
        return Path(f"{self.folder}{suffix}")

    def inputs(self) -> dict[str, str]:
        """Hashes of what it reads, see [`~aligndet_hf.pipelines.inputs.inputs_of`]."""
        return inputs_of(self, arguments_class(self.command))

    def write_recipe(self):
        """
        Writes the recipe that `aligndet <command> --config` takes, and returns the arguments that it makes of it.

        Raises:
            `ValueError`: the command does not accept them.
        """
        recipe = self.beside(".yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(self.settings, sort_keys=False), encoding="utf-8")
        try:
            return parse_arguments(arguments_class(self.command), ["--config", str(recipe)])
        except (ValueError, OSError) as error:
            raise ValueError(f"stage {self.name!r}, for {self.folder}: {error}") from error


def without_secrets(value: Any, stages: Iterable[Stage]) -> Any:
    """What a file says of stages, at any depth without the entries whose values are secrets of theirs."""
    secrets = {str(secret) for stage in stages for secret in stage.secrets.values() if secret is not None}

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(entry) for key, entry in value.items() if not is_secret(entry)}
        return [cleaned(entry) for entry in value if not is_secret(entry)] if isinstance(value, list) else value

    def is_secret(entry: Any) -> bool:
        return isinstance(entry, str) and any(secret in entry for secret in secrets)

    return cleaned(value)


class _LeftOut(Exception):
    """A value refers to a stage that is left out."""


def resolve_stages(
    stages: Mapping[str, Mapping | None],
    variables: Mapping[str, Any],
    place: Callable[[str, str, dict, set[str]], Path],
    common: Mapping[str, Any] | None = None,
    injected: Mapping[str, Any] | None = None,
    skip: set[str] | frozenset[str] = frozenset(),
) -> dict[str, Stage]:
    """
    Works out the settings of every stage.

    A stage is a mapping of flags, with `command` if that is not its name, and `config` for a recipe that it starts
    from. In all values `${name}` stands for the output folder of an earlier stage, or for a variable. A flag that
    refers to a stage that is left out takes the value that this flag has there; if it has none, it is dropped.

    Args:
        stages (`Mapping`): The stages, in order; `None` for one that is left out.
        variables (`Mapping`): Values by name; `None` for one that must be given before it is used.
        place (`Callable`): The output folder of a stage, from its name, its command, its settings and the variables
            that it depends on.
        common (`Mapping`, *optional*): Settings of all stages whose command knows them; a stage's own win.
        injected (`Mapping`, *optional*): The same, below `common` but above the recipes.
        skip (`set[str]`, *optional*): Names of stages to leave out.

    Returns:
        `dict[str, Stage]`: the stages that are not left out, by name.

    Raises:
        `ValueError`: for an unknown command, setting, variable or stage. The message names the stage.
    """
    common, injected = common or {}, injected or {}
    for name in stages:
        require_plain_name("stage", name)
    if unknown := sorted(set(skip) - set(stages)):
        raise ValueError(f"there is no stage {unknown[0]!r} to skip{nearest(unknown[0], stages)}")
    if twice := sorted(set(stages) & set(variables)):
        raise ValueError(f"{twice[0]!r} is the name of a stage and of a variable: rename one of them")
    found: dict[str, Stage] = {}
    left_out: dict[str, dict] = {}
    known_keys: set[str] = set()
    for name, given in stages.items():
        if not isinstance(given, Mapping | None):
            raise ValueError(f"stage {name!r} must be a mapping of flags, not {given!r}")
        if given is None:
            left_out[name] = {}
            continue
        command = command_of(name, given)
        known_keys |= fields_of(command)
        if name in skip:  # its settings are still asked for
            left_out[name] = _merged_settings(name, command, given, common, injected, partial(_variable, variables))
            continue
        found[name] = _resolve(name, command, given, found, left_out, variables, place, common, injected)
    if unused := sorted(set(common) - known_keys):
        raise ValueError(f"common: no stage has a setting {unused[0]!r}{nearest(unused[0], known_keys)}")
    return found


def _resolve(name, command, given, found, left_out, variables, place, common, injected) -> Stage:
    stage = Stage(name, command, {})

    def look_up(reference: str):
        if reference in found:
            needed = found[reference]
            stage.uses.update(needed.uses)
            if needed not in stage.needs:
                stage.needs.append(needed)
            return str(needed.folder)
        if reference in left_out:
            raise _LeftOut(reference)
        value = _variable(variables, reference, found)
        stage.uses.add(reference)
        return value

    for key, value in _merged_settings(name, command, given, common, injected, look_up).items():
        try:
            while True:
                try:
                    stage.settings[key] = _substitute(value, look_up)
                    break
                except _LeftOut as error:
                    settings = left_out[error.args[0]]
                    if key not in settings:
                        break
                    value = settings[key]
        except ValueError as error:
            raise ValueError(f"stage {name!r}, {key}: {error}") from error
    stage.secrets = {
        key: stage.settings.pop(key) for key in names_of(arguments_class(command), "secret") & set(stage.settings)
    }
    stage.settings["output_dir"] = str(place(name, command, stage.settings, stage.uses))
    return stage


def _variable(variables: Mapping[str, Any], name: str, stages: Iterable[str] = ()) -> Any:
    if name not in variables:
        raise ValueError(
            f"${{{name}}} is neither an earlier stage nor a variable{nearest(name, [*stages, *variables])}"
        )
    if variables[name] is None:
        raise ValueError(f"the variable {name!r} has no value: give --set {name}=...")
    return variables[name]


def _merged_settings(
    name: str, command: str, given: Mapping, common: Mapping, injected: Mapping, look_up: Callable[[str], Any]
) -> dict:
    """The settings of a stage with its recipe, what is common to all, and what the pipeline sets, unresolved."""
    recipe = {}
    if given.get("config") is not None:
        try:
            recipe = read_recipe(_substitute(given["config"], look_up))  # at once: what is in it hangs on it
        except _LeftOut as error:
            raise ValueError(f"stage {name!r}, config: the stage {error} is left out") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"stage {name!r}, config: {error}") from error
    known = fields_of(command)
    settings = recipe
    for more in (injected, common):
        settings = merged(settings, {key: value for key, value in more.items() if key in known})
    settings = merged(settings, {key: value for key, value in given.items() if key not in ("command", "config")})
    # The place of a stage is the pipeline's affair, and one stage done anew would leave those after it behind.
    place = names_of(arguments_class(command), "place")
    place |= {name for name, now in old_names(arguments_class(command)).items() if place & set(now)}
    if reserved := sorted(place & set(settings)):
        raise ValueError(
            f"stage {name!r}: {reserved[0]} cannot be set. Stages write to folders of the pipeline's output_dir; to "
            "do one anew, remove its folder and the folders of the stages that build on it."
        )
    return settings


def require_plain_name(kind: str, name: str) -> None:
    """
    Refuses a name that no folder inside another can have.

    Raises:
        `ValueError`: it is empty, hidden, or holds a separator or what cannot be printed.
    """
    if not isinstance(name, str) or not name.isprintable() or name[:1] in ("", ".") or set(name) & set("/\\"):
        raise ValueError(f"{kind} {name!r}: its name is a folder's, and must hold no slash and start with no dot")


def merged(base: Mapping, changes: Mapping) -> dict:
    """`base` with `changes`: mappings in both are merged, everything else is replaced."""
    result = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            value = merged(result[key], value)
        result[key] = value
    return result


def command_of(name: str, given: Mapping) -> str:
    """The command of a stage, from its name and what the file says of it."""
    command = given.get("command", name)
    if command not in STAGE_COMMANDS:
        raise ValueError(
            f"stage {name!r}: there is no command {command!r}{nearest(str(command), STAGE_COMMANDS)}. Give one by "
            f"`command:`, or name the stage after it: {', '.join(STAGE_COMMANDS)}"
        )
    return command


def arguments_class(command: str) -> type:
    """The dataclass of a command's arguments."""
    row = COMMANDS[command]
    return getattr(importlib.import_module(row.module), row.arguments)


def setting(stage: Stage, name: str) -> Any:
    """The value of a flag of a stage: its own, or the default of its command."""
    return stage.settings.get(name, getattr(arguments_class(stage.command), name, None))


def fields_of(command: str) -> set[str]:
    """The names of a command's flags."""
    cls = arguments_class(command)
    return {item.name for item in dataclasses.fields(cls) if item.init} | set(old_names(cls))


def _substitute(value, look_up: Callable[[str], Any]):
    """A value with its references replaced; one that is nothing but a reference keeps the type of what it gets."""

    def replaced(text: str):
        if whole := REFERENCE.fullmatch(text):
            return look_up(whole[1])
        return REFERENCE.sub(lambda match: str(look_up(match[1])), text)

    return recursively_apply(replaced, value, test_type=lambda item: isinstance(item, str))


def read_chain(file: str) -> dict:
    """The file of a chain, with what is `common` in it made part of its stages."""
    content = read_recipe(file)
    if not isinstance(content.get("stages"), Mapping) or not content["stages"]:
        raise ValueError(f"{file} is no chain: there is no mapping `stages`")
    common = content.get("common") or {}
    stages = {}
    for name, given in content["stages"].items():
        given = given or {}
        known = fields_of(command_of(name, given))
        given = merged({key: value for key, value in common.items() if key in known}, given)
        # Which labels are used is up to the comparison.
        stages[name] = {key: value for key, value in given.items() if key not in ("label_fraction", "label_seed")}
    return {"stages": stages, "variables": content.get("variables") or {}}


def needed_for(stages: list[Stage]) -> list[Stage]:
    """The last stage and all that it needs, in order."""
    needed, more = set(), [stages[-1]]
    while more:
        stage = more.pop()
        needed.add(stage)
        more += stage.needs
    # Once each: a teacher may be the last stage itself.
    return list(dict.fromkeys(stage for stage in stages if stage in needed))


def origin_of(stage: Stage, stages: list[Stage]) -> tuple[str, str, str]:
    """Where the training images of a stage come from: data set, split and image folder, empty if not given."""
    return _followed(stage.settings, stage.settings["dataset"], stage.settings.get("split") or "train", stages)


def pseudo_origin_of(stage: Stage, stages: list[Stage]) -> tuple[str, str, str] | None:
    """The same of the pseudo-labelled images that a stage learns from as well; `None` if there are none."""
    dataset, split = (stage.settings.get(name) for name in ("pseudo_dataset", "pseudo_split"))
    return _followed({}, dataset, split or "", stages) if dataset else None


def _followed(settings: Mapping, dataset: str, split: str, stages: list[Stage]) -> tuple[str, str, str]:
    """A data set, or what the stage that makes it was given."""
    by_folder = {str(other.folder): other for other in stages}
    while made := by_folder.get(dataset):
        settings, dataset = made.settings, made.settings["dataset"]
        split = setting(made, "split") or split
    return str(dataset), split, settings.get("image_dir") or ""
