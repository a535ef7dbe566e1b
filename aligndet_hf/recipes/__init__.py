"""Recipes and Accelerate configurations that come with the package, found by name."""

from pathlib import Path

import yaml

from ..flags import nearest

FOLDER = Path(__file__).parent


class _Loader(yaml.SafeLoader):
    """YAML in which a key is given once: of two values the first would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if again := [str(key) for number, key in enumerate(keys) if key in keys[:number]]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {again[0]!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def recipe_names() -> list[str]:
    """The names that [`find_recipe`] knows, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str | Path) -> dict:
    """
    The content of a recipe, see [`find_recipe`].

    Raises:
        ValueError: it is no YAML, or no mapping.
    """
    path = find_recipe(name)
    try:
        values = yaml.load(path.read_bytes(), _Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of `flag: value` lines, not a {type(values).__name__}")
    return values


def find_recipe(name: str | Path) -> Path:
    """
    The file of a recipe.

    Args:
        name (`str` or `Path`): A file; or the name of a recipe of the package, such as `aligndet_rt_detr_bccd`.

    Raises:
        FileNotFoundError: there is neither. The message names the recipes.
    """
    path = Path(name).expanduser()
    own = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    for found in (path, own):
        if found.is_file():
            return found
    raise FileNotFoundError(
        f"there is no file {name}, and no recipe of that name{nearest(path.name, recipe_names())}; there are "
        + ", ".join(recipe_names())
    )
