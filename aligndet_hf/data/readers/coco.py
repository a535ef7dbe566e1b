"""COCO: one JSON file for a split, alone or in the folders that Roboflow, CVAT, FiftyOne and Label Studio write."""

import json
import logging
import re
from itertools import count
from pathlib import Path, PureWindowsPath

import numpy as np

from ..door import is_inside, plain_parts, spelt_as_there
from ..errors import DataError
from ..masks import Region, segmentation_text
from .files import (
    called,
    find_inside,
    inside,
    is_file,
    list_files,
    list_images,
    parse_json,
    read_start,
    read_text,
    split_of_file,
    split_of_folder,
    tails,
    tell_unlisted,
)
from .listed import require_own_splits
from .rows import (
    Categories,
    LabelledImage,
    Labels,
    box_around,
    box_around_turned,
    is_box,
    names_in_lower_case,
    require_unique_ids,
    with_other_capitals,
)

logger = logging.getLogger(__name__)

NAME = "COCO"

# Folders of nothing but label files: the images may then be beside the folder.
_LABEL_FOLDER = re.compile(r"(coco[-_]?)?(annotations?|ann|anns|labels?|json)", re.IGNORECASE)
_ELSEWHERE = re.compile(r"(\.\.)?[/\\]|[A-Za-z]:[/\\]|\w+://")  # how paths of a machine, and addresses, begin
_LIST = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')
_FILE_NAME = re.compile(r'"(?:file_name|coco_url)"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')
_NEEDED = {"images": {"id", "file_name"}, "categories": {"id", "name"}, "annotations": {"image_id"}}
_SNIFFED_BYTES = 1 << 16
_LOOKED_AT = 20  # images to find the folder of all by


def find(path: Path) -> dict[str, Path]:
    """
    A JSON file, or the files of a folder and of its folders that have COCO's lists; of COCO's own files the
    `instances`. The splits are from the names of the files or of their folders, of `annotations` the folder around it;
    `train` if these do not tell.
    """
    if path.is_file():
        return {_split_of(path): path} if path.suffix.lower() == ".json" else {}
    files = list_files(path, ".json")
    files = [file for file in files if path in (file.parent, file.parent.parent, _outer_folder(file).parent)]
    files = list(filter(_looks_like_coco, files))
    files = [file for file in files if file.stem.startswith("instances_")] or files
    pairs = [(_split_of(file), file) for file in files]
    require_own_splits(path, pairs, "COCO files")
    return dict(pairs)


def read(path: Path, found: dict[str, Path], splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads the files of these splits.

    Args:
        path (`Path`): The file or the folder.
        found (`dict`): What [`find`] gives.
        splits (`list[str]`): Of those found.
        image_dir (`Path`, *optional*): Folder that the file names start from. By default looked for.

    Returns:
        [`Labels`]: crowds are among the objects, marked by `iscrowd`.

    Raises:
        [`DataError`]: for a file that is not as it should be; it names the file and the entry.
    """
    contents = {found[split]: _read_content(found[split]) for split in splits}
    others = {file: read_text(file) for file in found.values() if file not in contents}
    listed = {file: content.get("categories", []) for file, content in contents.items()}
    listed |= {file: _read_categories(file, text) for file, text in others.items()}
    used = {
        _key(entry.get("category_id")) for content in contents.values() for entry in content.get("annotations", [])
    }
    categories = _merge_categories(_without_groups(path, _without_stuff(listed, used), used, others))

    images, folders = [], {}
    for file, content in contents.items():
        outer = path if path.is_dir() else _outer_folder(file)
        found_images, folder = _read_images(file, content, categories, image_dir, outer)
        images += found_images
        folders[folder] = file
    named = {name for image in images for name in (image.path, image.path.stem)}
    for file, text in others.items():
        named |= {PureWindowsPath(parse_json(name, str(file))).stem for name in _FILE_NAME.findall(text)}
    for folder, file in folders.items():
        tell_unlisted(folder, list_images(folder), named, f"are not in {file.name}")
    if len(contents) > 1:  # each file numbers its own images
        require_unique_ids(images)
    names = [str(category["name"]) for category in categories]
    ids = [category["id"] for category in categories]
    ids = [int(own) if isinstance(own, float) else own for own in ids]  # a whole number may be written as 1.0
    return Labels(images, Categories(names, ids) if any("annotations" in one for one in contents.values()) else None)


# ---- the files ----


def _looks_like_coco(path: Path) -> bool:
    read = read_start(path, _SNIFFED_BYTES)
    start, lists = read.lstrip(), set(_LIST.findall(read))
    lists -= set() if b'"image_id"' in read else {b"annotations"}  # which Datumaro and Darwin have as well
    lists -= {b"categories"} if len(read) < _SNIFFED_BYTES else set()  # alone in `notes.json` of Label Studio's YOLO
    return start.startswith(b"{") and bool(lists)


def _split_of(path: Path) -> str:
    folders = path.parent.name, _outer_folder(path).name
    return split_of_file(path.stem) or next(filter(None, map(split_of_folder, folders)), "train")


def _read_content(path: Path) -> dict:
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path}: not a COCO file, it has no list 'images'.")
    if not content["images"]:
        raise DataError(f"{path}: its list 'images' is empty.")
    for image in content["images"]:
        if isinstance(image, dict) and "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])  # LVIS: `train2017/000000391895.jpg`
    for key in _NEEDED:
        _require_entries(path, key, content.get(key, []))
    if any("segments_info" in annotation for annotation in content.get("annotations", [])):
        content["annotations"] = _things(content)
    return content


def _things(content: dict) -> list[dict]:
    """The objects of a panoptic file, which has an entry for each image, and regions that are no objects (`stuff`)."""
    stuff = {_key(category["id"]) for category in content.get("categories", []) if category.get("isthing") == 0}
    parts = [
        {name: part.get(name) for name in ("category_id", "bbox", "iscrowd")} | {"image_id": annotation["image_id"]}
        for annotation in content["annotations"]
        for part in annotation.get("segments_info", [])
    ]
    return [part for part in parts if _key(part["category_id"]) not in stuff]


def _require_entries(path: Path, key: str, entries) -> None:
    if not isinstance(entries, list):
        raise DataError(f"{path}: '{key}' must be a list, got {str(entries)[:40]} ({type(entries).__name__}).")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _NEEDED[key] <= set(entry):
            raise DataError(f"{path}: entry {number} of '{key}' must have {', '.join(sorted(_NEEDED[key]))}.")


def _read_categories(path: Path, text: str) -> list[dict]:
    """The list `categories` of a file from which nothing else is needed."""
    match = re.search(r'"categories"\s*:\s*', text)
    try:
        found = json.JSONDecoder().raw_decode(text, match.end())[0] if match else []
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}).") from error
    _require_entries(path, "categories", found)
    return found


# ---- ids ----


def _is_whole(value) -> bool:
    """Whether a value is a whole number, which may be written as 1.0."""
    return type(value) is int or (isinstance(value, float) and value.is_integer())


def _key(value):
    """What an id is looked up by: 1, 1.0 and "1" are the same."""
    if _is_whole(value) or isinstance(value, str) and re.fullmatch(r"0|-?[1-9]\d*", value):
        return int(value)
    return value if type(value) in (float, str) else str(value)


def _check_id(value, where: str) -> None:
    if not isinstance(value, str) and not _is_whole(value):
        raise DataError(
            f"{where}: an id must be an integer or a text, got {value!r} of the type {type(value).__name__}."
        )


def _is_text_or_number(images: list[dict], path: Path) -> type:
    """The type of the ids of all images: texts, or integers, also where some of them are written as texts."""
    if all(isinstance(image["id"], str) for image in images):
        return str
    for number, image in enumerate(images):
        if isinstance(_key(image["id"]), str):
            raise DataError(
                f"{path}, entry {number} of 'images': the id {image['id']!r} is a text, others are integers, as "
                f"{next(other['id'] for other in images if not isinstance(other['id'], str))}. Use one type for all."
            )
    return int


# ---- categories ----


def _merge_categories(listed: dict[Path, list[dict]]) -> list[dict]:
    """The categories of all files, in the order of their ids; the same id must have the same name."""
    merged, owners = {}, {}
    for path, categories in listed.items():
        keys = [_key(category["id"]) for category in categories]
        for category in categories:
            if category["name"] in (None, ""):
                raise DataError(f"{path}: the category {category['id']!r} must have a name, got {category['name']!r}.")
            _check_id(category["id"], f"{path}, category {category['name']!r}")
        if len(set(keys)) != len(keys) or len({str(category["name"]) for category in categories}) != len(keys):
            raise DataError(f"{path}: ids and names of 'categories' must be unique, got {_told(categories)}.")
        for key, category in zip(keys, categories, strict=True):
            if str(merged.setdefault(key, category)["name"]) != str(category["name"]):
                raise DataError(
                    f"{path}: the category {category['id']!r} is {category['name']!r}, but {merged[key]['name']!r} in "
                    f"{owners[key]}. The splits of a data set need the same categories."
                )
            owners.setdefault(key, path)
    if len({str(category["name"]) for category in merged.values()}) != len(merged):
        raise DataError(f"{', '.join(map(str, listed))}: a name stands for several ids: {_told(merged.values())}.")
    return [merged[key] for key in sorted(merged, key=lambda key: (isinstance(key, str), key))]


def _told(categories) -> str:
    return ", ".join(f"{category['id']!r}: {category['name']!r}" for category in list(categories)[:10])


def _without_stuff(listed: dict[Path, list[dict]], used: set) -> dict[Path, list[dict]]:
    """Leaves out the categories of panoptic files that are no objects: sky, road."""
    return {
        file: [one for one in categories if one.get("isthing") != 0 or _key(one["id"]) in used]
        for file, categories in listed.items()
    }


def _without_groups(path: Path, listed: dict[Path, list[dict]], used: set, others: dict[Path, str]) -> dict:
    """
    Leaves out the category that Roboflow adds to group all others: their supercategory, without an object. It may have
    the name of one of them.
    """
    groups = {}
    for categories in listed.values():
        for group in categories:
            rest = [category for category in categories if category is not group]
            if rest and all(category.get("supercategory") == group["name"] for category in rest):
                groups[_key(group["id"])] = group
    for key, group in list(groups.items()):
        mention = re.compile(rf'"category_id"\s*:\s*{re.escape(json.dumps(group["id"]))}\s*[,}}]')
        if key in used or any(map(mention.search, others.values())):
            del groups[key]
        else:
            logger.warning(
                "%s: the category %r (id %s) is left out: it has no object and only groups the others.",
                path, group["name"], group["id"],
            )  # fmt: skip
    return {
        file: [category for category in categories if _key(category["id"]) not in groups]
        for file, categories in listed.items()
    }


# ---- images and annotations ----


def _read_images(
    path: Path, content: dict, categories: list[dict], image_dir: Path | None, outer: Path
) -> tuple[list[LabelledImage], Path]:
    """The images of a file, and the folder that they are in."""
    for number, image in enumerate(content["images"]):
        _check_id(image["id"], f"{path}, entry {number} of 'images'")
        if not isinstance(image["file_name"], str) or not image["file_name"]:
            raise DataError(f"{path}, image {image['id']}: 'file_name' must be a text, got {image['file_name']!r}.")
    id_type = _is_text_or_number(content["images"], path)
    base, root = _image_folder(path, image_dir, outer, [image["file_name"] for image in content["images"]])
    images = {}
    for number, image in enumerate(content["images"]):
        where, key = f"{path}, image {image['id']}", _key(image["id"])
        if key in images:
            raise DataError(
                f"{where}: this id occurs twice in 'images' (again in entry {number}); ids must be unique."
            )
        images[key] = LabelledImage(
            path=_find_image(root, image["file_name"], where, base),
            where=where,
            file_name=image["file_name"],
            image_id=id_type(image["id"]),
            width=_size(image, "width", where),
            height=_size(image, "height", where),
        )
    if "annotations" in content:
        for image in images.values():
            image.objects = {name: [] for name in ("bbox", "category", "area", "iscrowd", "segmentation", "id")}
        _add_annotations(path, content["annotations"], images, categories)
        ids = [own for image in images.values() for own in image.objects["id"]]
        if again := len(ids) - len(set(ids)):
            logger.warning(
                "%s: %d annotations have the id of another one, which pycocotools takes for both.", path, again
            )
    return list(images.values()), base


def _ends(name: str) -> list[str]:
    """The ends of a path, or of an address, without what is asked of it: `?key=...`."""
    return tails(name.partition("?")[0] if "://" in name else name)


def _find_image(root: Path, name: str, where: str, base: Path) -> Path:
    """
    The file of an image: of a path of another machine, an address, or a path whose first folder is not there, as much
    of its end as is.
    """
    if path := find_inside(root, [name], base):
        return path
    is_elsewhere = _ELSEWHERE.match(name) and not is_inside(name, root)
    is_elsewhere = is_elsewhere or not (base / "".join(plain_parts(name)[:1])).exists()
    return is_elsewhere and find_inside(root, _ends(name), base) or inside(root, name, where, base)


def _size(image: dict, name: str, where: str) -> int | None:
    value = image.get(name)
    if value is not None and not _is_whole(value):
        raise DataError(f"{where}: '{name}' must be an integer, got {value!r}.")
    return None if value is None else int(value)


def _add_annotations(path: Path, annotations: list[dict], images: dict, categories: list[dict]) -> None:
    labels = {_key(category["id"]): label for label, category in enumerate(categories)}
    own = [annotation.get("id") for annotation in annotations]
    free = count(max((key for key in map(_key, own) if type(key) is int), default=0) + 1)  # for those without an id
    for number, annotation in enumerate(annotations):
        try:
            _add_annotation(annotation if own[number] is not None else annotation | {"id": next(free)}, images, labels)
        except DataError as error:
            named = f"number {number}" if own[number] is None else own[number]
            raise DataError(f"{path}, annotation {named}: {error}") from None


def _add_annotation(annotation: dict, images: dict, labels: dict) -> None:
    image = images.get(_key(annotation["image_id"]))
    if image is None:
        raise DataError(
            f"no image has the id {annotation['image_id']!r} ({type(annotation['image_id']).__name__}). Remove the "
            "annotation or add the image."
        )
    label = labels.get(_key(annotation.get("category_id")))
    if label is None:
        known = f"found {list(labels)}" if labels else "the file has no 'categories'"
        raise DataError(f"no category has the id {annotation.get('category_id')!r}; {known}.")
    segmentation, area, crowd = (annotation.get(name) for name in ("segmentation", "area", "iscrowd"))
    box, crowd = annotation.get("bbox") or _around(segmentation), crowd or 0
    if not is_box(box):
        raise DataError(f"'bbox' must be four numbers [x, y, width, height], got {str(annotation.get('bbox'))[:80]}.")
    attributes = annotation.get("attributes")  # of CVAT, whose 'bbox' is the box before it was turned
    degrees = attributes.get("rotation") if isinstance(attributes, dict) and not segmentation else None
    if type(degrees) in (int, float):
        box = box_around_turned(box, degrees)
    if area is not None and type(area) not in (int, float):
        raise DataError(f"'area' must be a number or null, got {area!r}.")
    if crowd not in (0, 1):
        raise DataError(f"'iscrowd' must be 0 or 1, got {crowd!r}.")
    own_id = annotation["id"] if isinstance(annotation["id"], str) else _key(annotation["id"])
    image.add(box, label, area=area, iscrowd=int(crowd), segmentation=segmentation, id=own_id)


def _around(segmentation) -> list[float] | None:
    """The box around polygons or a mask, for an object that has no other."""
    text = segmentation_text(segmentation)
    if text is None:
        return None
    shape = json.loads(text)
    if isinstance(shape, list):
        xs, ys = ([value for outline in shape for value in outline[side::2]] for side in (0, 1))
        return box_around(xs, ys)
    ys, xs = (pixels.tolist() for pixels in np.nonzero(Region.of(text, *shape["size"]).shape))
    return box_around([min(xs), max(xs) + 1], [min(ys), max(ys) + 1]) if xs else None


def _outer_folder(path: Path) -> Path:
    """The folder that a COCO file may name images of: its own, or the one of a folder `annotations`."""
    return path.parent.parent if _LABEL_FOLDER.fullmatch(path.parent.name) else path.parent


def _folder_of_another_name(path: Path, outer: Path, names: list[str]) -> Path | None:
    """The only folder that all of these names are in, or of several the one that is called as the split."""
    files = [file.as_posix() for file in list_images(outer)]
    places = [{file.removesuffix(f"/{name}") for file in files if file.endswith(f"/{name}")} for name in names]
    common = sorted(map(Path, set.intersection(*places)))
    of_split = [place for place in common if split_of_file(place.name) == _split_of(path)]
    return next((one for (one,) in filter(lambda some: len(some) == 1, (common, of_split))), None)


def _image_folder(path: Path, image_dir: Path | None, outer: Path, names: list[str]) -> tuple[Path, Path]:
    """Where the file names start from, and the folder that they must stay in."""
    if image_dir is not None:
        return image_dir, image_dir
    here, above = path.parent, path.parent.parent
    words = re.split(r"[-_. ]", path.stem)
    words = list(dict.fromkeys([words[-1], *filter(split_of_folder, words)]))  # `train_annotations`, images in `train`
    places = [here, *(called(here, name) for name in ("images", "data", *words))]
    places += [called(above, word) for word in words]
    for folder in (called(above, "images"), called(above, "data")):
        places += [*(called(folder, word) for word in words), folder]
    places.append(above)
    looked_at = [name.replace("\\", "/") for name in names[:_LOOKED_AT]]
    ends = [tail for name in names[:_LOOKED_AT] for tail in _ends(name)]
    for there in (looked_at, ends):
        for place in places:
            is_near = is_inside(place, here) or is_inside(place, above if there is looked_at else outer)  # no link out
            if is_near and any(is_file(place / spelt_as_there(place, name)) for name in there):
                return place, outer if place == here else place
    for there in (looked_at, [name.rpartition("/")[2] for name in looked_at]):
        if place := _folder_of_another_name(path, outer, there):
            return place, place
    # A name that leads out is an error of its own; another one says where it was looked for.
    for name in names[:1]:
        inside(outer, name, f"{path}, entry 0 of 'images'", here)
    hint = next(filter(None, (with_other_capitals(place / names[0], names_in_lower_case) for place in places)), "")
    raise DataError(
        f"{path}: cannot find '{names[0]}' in {', '.join(map(str, places))}{hint}. Give the folder as image_dir."
    )
