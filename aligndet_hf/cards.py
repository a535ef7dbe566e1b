"""
Cards of models and data sets: a generated part that every run writes anew around what a person wrote, and what may be
told in it. No card holds a path of this machine or a token.
"""

import dataclasses
import importlib.metadata
import json
import platform
import re
import shlex
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import yaml

from .files import write_text
from .flags import NOT_TOLD, names_of

BEGIN = "<!-- aligndet: from here to the last such line generated anew by every run; what else you write stays -->"
END = "<!-- aligndet: end of the generated part -->"
CITATIONS = Path(__file__).with_name("citations.bib")
PACKAGES = ("aligndet-hf", "transformers", "torch", "torchvision", "timm", "datasets", "accelerate", "huggingface-hub")


# ---- the generated part, and the rest ----


def merge_card(generated: str, *cards: str) -> str:
    """
    Puts a generated card in place of what was generated before; what a person wrote stays.

    Text: what stands before and after the marks of the generated part, or all of a card without marks, is kept of the
    first card that has any. Metadata: what is generated wins, other keys stay, and tags are joined; results only count
    if they are generated.

    Args:
        generated (`str`): The new card, with metadata.
        cards (`str`): The cards that are there; of two values for a key of the metadata the first card's stays.

    Returns:
        `str`: the card to write.

    Raises:
        ValueError: the metadata of a card cannot be read.
    """
    metadata, text = _split_card(generated)
    own = text[text.index(BEGIN) : text.index(END) + len(END)]
    tags, around = metadata.get("tags", []), ("\n", "\n")
    for card in cards:
        kept, text = _split_card(card)
        more = kept.pop("tags", None) or []
        tags = [*tags, *([more] if isinstance(more, str) else more)]
        metadata |= {key: value for key, value in kept.items() if key not in (*metadata, "model-index")}
        top, begin, rest = text.partition(BEGIN)
        _, end, bottom = rest.partition(END)
        written = (top, bottom) if begin and end else ("\n", f"\n\n{text.strip()}\n")
        if not "".join(around).strip():
            around = written
    if tags:
        metadata["tags"] = list(dict.fromkeys(tags))
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{head}\n---\n{around[0]}{own}{around[1]}"


def _split_card(card: str) -> tuple[dict, str]:
    """The metadata of a card, and its text."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    head = REGEX_YAML_BLOCK.search(card)
    if head is None:
        return {}, card
    try:
        return dict(yaml.safe_load(head.group(2)) or {}), card[head.end() :]
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(
            "the metadata between the first two lines `---` of a README.md, on the Hub or in output_dir, is not a "
            "YAML mapping: mend it, or remove it"
        ) from error


def write_card(path: Path, generated: str) -> Path:
    """Writes a card to a file, which is complete or absent; one that is there keeps what a person wrote in it."""
    there = path.read_text(encoding="utf-8") if path.exists() else None
    card = generated if there is None else merge_card(generated, there)
    if card == there:
        return path
    write_text(path, card)
    return path


def citations(*keys: str) -> list[str]:
    """The BibTeX entries of papers that `citations.bib` has, by key; what it does not have is left out."""
    entries = re.split(r"\n\n(?=@)", CITATIONS.read_text(encoding="utf-8"))
    papers = {re.match(r"@\w+\{([^,]+)", entry)[1]: entry.strip() for entry in entries}
    return [papers[key] for key in dict.fromkeys(keys) if key in papers]


def versions() -> dict[str, str]:
    """Python, and the packages that decide what a run gives."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found


def describe_versions() -> str:
    """[`versions`] in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())


# ---- what may be told ----


def told(source) -> str:
    """A Hub id as it is; of a path only the last part that says something: for `run/detector` it is `run`."""
    path = Path(str(source).replace("\\", "/"))
    return (
        source if hub_ids(source) else (path.parent.name if path.name in ("detector", "backbone") else "") or path.name
    )


def hub_ids(source) -> list[str]:
    """`[source]` if it can be a Hub id and is not a path of this machine, else nothing."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(source, str) or Path(source).exists() or source.count("/") != 1:
        return []
    try:
        validate_repo_id(source)
    except HFValidationError:
        return []
    return [source]


def told_settings(settings: Mapping) -> dict:
    """The settings of a run as others may read them: plain values, no secrets, and of paths only the last part."""
    known = {str(key): value for key, value in settings.items() if value is not None}
    return {key: _plain(value) for key, value in known.items() if not key.endswith("token")}


def _plain(value):
    """What YAML can hold: enums by value, paths by their last part."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return told_settings(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float):
        return value
    is_path = isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value))
    text = " ".join(str(told(value) if is_path else value).split())
    return text.replace("```", "` ` `").replace("<!--", "<! --")  # ends no block of code, and no generated part


def inert(text) -> str:
    """A name that comes from data, of a class, a file or a split, as Markdown that is nothing but this text."""
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", " ".join(str(text).split()))
    return text.replace("<", "&lt;").replace(">", "&gt;")


def command_line(command: str, cls: type, given: Mapping) -> str:
    """
    The command line that stands for arguments; of paths it has the last part.

    Args:
        command (`str`): Such as "pretrain".
        cls (`type`): The dataclass of its arguments.
        given (`Mapping`): The values of its flags that were given, see [`~aligndet_hf.flags.given_flags`].
    """
    words = ["aligndet", command]
    hidden = names_of(cls, *NOT_TOLD)
    for name, value in told_settings({name: given[name] for name in given if name not in hidden}).items():
        many = [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(one) if not isinstance(one, bool) else str(one).lower() for one in many)]
    if cls.__dataclass_fields__["output_dir"].default is dataclasses.MISSING:
        words += ["--output_dir", f"outputs/{command}"]  # required, but where it was is nobody else's business
    return shlex.join(words)
