from io import BytesIO

import datasets
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligndet_hf.data import columns
from aligndet_hf.data.arrow_boxes import clean_boxes, find_faults, read_boxes, read_values
from aligndet_hf.data.columns import BoxReport, validate_objects, validate_proposals
from aligndet_hf.data.errors import DataError, ImageError

HEIGHT, WIDTH = 60, 100
NAN, INF = float("nan"), float("inf")


def picture(height=HEIGHT, width=WIDTH):
    file = BytesIO()
    PIL.Image.new("RGB", (width, height)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def labelled(boxes_per_row, categories=None, **more):
    """A labelled data set of rows of boxes, all of category 0 if not said otherwise."""
    categories = categories or [[0] * len(boxes) for boxes in boxes_per_row]
    objects = [{"bbox": b, "category": c} for b, c in zip(boxes_per_row, categories, strict=True)]
    features = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.Value("int64")),
    }
    data = {"image": [picture()] * len(boxes_per_row), "objects": objects}
    dataset = datasets.Dataset.from_dict(
        data, features=datasets.Features(image=datasets.Image(decode=False), objects=features)
    )
    for name, values in more.items():
        dataset = dataset.add_column(name, values)
    return dataset


def proposed(boxes_per_row, with_clusters=False, **fields):
    rows = [{"bbox": boxes, "score": [1.0] * len(boxes)} for boxes in boxes_per_row]
    for name, values in fields.items():
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    features = datasets.Features(
        image=datasets.Image(decode=False), proposals=columns.proposals_feature(with_clusters)
    )
    return datasets.Dataset.from_dict({"image": [picture()] * len(rows), "proposals": rows}, features=features)


# ---- cleaning ----


def test_each_fault_is_told_apart_and_sound_boxes_are_clipped():
    boxes = np.array(
        [
            [10, 10, 20, 20],  # 0 sound
            [NAN, 10, 20, 20],
            [10, 10, INF, 20],
            [10, 10, 0, 20],
            [10, 10, 20, -3],
            [100, 10, 20, 20],  # begins where the image ends
            [-30, 10, 30, 20],  # ends where the image begins
            [10, 61, 5, 5],
            [90, 50, 20, 20],  # 8 reaches out on the right and at the bottom
            [-5, -5, 10, 10],  # 9 reaches out on the left and at the top
            [-10, -10, 500, 500],  # 10 larger than the image
        ]
    )
    assert find_faults(boxes, WIDTH, HEIGHT).tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 0, 0, 0]
    assert columns.FAULTS == ("", "not finite", "no area", "outside the image")
    cleaned, kept = clean_boxes(boxes, WIDTH, HEIGHT)
    assert kept.tolist() == [0, 8, 9, 10] and cleaned.dtype == np.float32
    np.testing.assert_array_equal(cleaned, [[10, 10, 20, 20], [90, 50, 10, 10], [0, 0, 5, 5], [0, 0, 100, 60]])


numbers = st.one_of(st.floats(-300, 300, width=32), st.sampled_from([NAN, INF, -INF, 0.0, 1e30, -1e30]))


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=8))
def test_what_is_left_is_always_usable(boxes):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    cleaned, kept = clean_boxes(boxes, WIDTH, HEIGHT)
    assert len(cleaned) == len(kept) == (find_faults(boxes, WIDTH, HEIGHT) == 0).sum()
    assert np.isfinite(cleaned).all() and (cleaned >= 0).all()
    assert (cleaned[:, 0] + cleaned[:, 2] <= WIDTH * (1 + 1e-6)).all()
    assert (cleaned[:, 1] + cleaned[:, 3] <= HEIGHT * (1 + 1e-6)).all()
    again, all_of_them = clean_boxes(cleaned[(cleaned[:, 2:] > 0).all(axis=1)], WIDTH, HEIGHT)
    np.testing.assert_allclose(again, cleaned[(cleaned[:, 2:] > 0).all(axis=1)][all_of_them], atol=1e-4)


def test_no_boxes():
    cleaned, kept = clean_boxes(np.zeros((0, 4)), WIDTH, HEIGHT)
    assert cleaned.shape == (0, 4) and kept.shape == (0,)


# ---- validation ----


def test_sound_data():
    report = validate_objects(labelled([[[1, 1, 9, 9], [5, 5, 50, 50]], [], [[0, 0, 100, 60]]]), ["a"], "mine")
    assert report == BoxReport("mine", "objects", rows=3, boxes=3, empty_rows=1)
    assert str(report) == "mine: 3 rows, 3 boxes in 'objects', 1 rows without"
    assert validate_proposals(proposed([[[1, 1, 9, 9]]] * 2)).boxes == 2


def test_faults_of_all_rows_are_counted_and_listed(monkeypatch):
    monkeypatch.setattr(columns, "SIZE_CHECKED_ROWS", 2)  # what looks at fewer rows has no part in this
    sound = [10, 10, 20, 20]
    rows = (
        [[sound, [200, 5, 5, 5], [-50, 5, 5, 5]]]
        + [[sound]] * 1100
        + [[sound, [NAN, 1, 1, 1], [1, 1, 0, 5], [1, 1, -4, 5]]]
    )
    rows += [[[1, INF, 5, 5]], [sound, [300, 5, 5, 5]], [sound, [300, 5, 5, 5]]]
    report = validate_proposals(proposed(rows), "mine")
    assert report.dropped == {"not finite": 2, "no area": 2, "outside the image": 4}
    assert report.listed == {"not finite": [1101, 1102], "no area": [1101], "outside the image": [0, 1103, 1104]}
    assert "dropped: 2 boxes, not finite (rows 1101, 1102)" in str(report)


def test_long_lists_of_rows_are_cut():
    report = validate_proposals(proposed([[[1, 1, 9, 9], [1, 1, 0, 0]]] * 30))
    assert report.dropped == {"no area": 30} and report.listed == {"no area": list(range(10))}
    assert "no area (rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ...)" in str(report)


def test_selected_and_shuffled_rows_are_the_ones_validated():
    dataset = labelled([[[1, 1, 9, 9]], [[NAN, 1, 1, 1]], [[5, 5, 9, 9]]])
    assert validate_objects(dataset.select([2, 0]), ["a"]).dropped == {}
    assert validate_objects(dataset.select([2, 1]), ["a"]).listed == {"not finite": [1]}


def test_corners_given_for_sides_are_refused():
    rng = np.random.default_rng(0)
    low, side = rng.uniform(0, (60, 40), (40, 2)), rng.uniform(8, 20, (40, 2))
    corners = np.concatenate([low, low + side], axis=1)
    sides = np.concatenate([low, side], axis=1)
    for validate, make in ((lambda d: validate_objects(d, ["a"], "mine"), labelled), (validate_proposals, proposed)):
        assert validate(make([[box] for box in sides.tolist()])).dropped == {}
        column = "objects" if make is labelled else "proposals"
        with pytest.raises(DataError, match=rf"row \d+, column '{column}'.*\[x1, y1, x2, y2\].*Subtract x1 from x2"):
            validate(make([[box] for box in corners.tolist()]))
    as_centres = np.concatenate([low - (low + side) / 2, low + side], axis=1)
    with pytest.raises(DataError, match=r"like corners .*, expected a centre, width and height: .*\(x1 \+ x2\) / 2"):
        validate_objects(labelled([[box] for box in as_centres.tolist()]), ["a"])


@pytest.mark.parametrize(
    "box", [[0, 0, 100, 60], [1, 1, 100, 60], [0, 0, 103, 61], [60, 30, 45, 40], [-3, -3, 106, 66], [0, 0, 60, 60]]
)
def test_sloppy_sides_are_not_taken_for_corners(box):
    assert validate_objects(labelled([[box]] * 3), ["a"]).dropped == {}


def test_relative_boxes_are_refused():
    with pytest.raises(DataError, match="relative to the image.*Multiply"):
        validate_objects(labelled([[[0.1, 0.2, 0.5, 0.3]], [[0, 0, 1, 1]]]), ["a"])
    report = validate_objects(labelled([[[0.1, 0.2, 0.5, 0.3]], [[0, 0, 9, 9]]]), ["a"])
    assert report.boxes == 2 and "boxes within the first pixel of their image: 1 (rows 0)" in report.notes[0]
    with pytest.raises(DataError, match=r"row 1.*relative to the image \(75% have no number above 1\)"):
        validate_objects(labelled([[[0.5, 0.2, 1.02, 0.3]], [[0.1, 0.2, 0.5, 0.3]] * 3]), ["a"])


def test_names_of_categories_that_are_empty_or_alike():
    dataset = labelled([[[1, 1, 9, 9]], [[5, 5, 9, 9]]])
    with pytest.raises(
        DataError, match="mine, row 0, column 'objects', field 'category': 0 is a category without a n"
    ):
        validate_objects(dataset, [" ", "cat"], "mine")
    report = validate_objects(dataset, ["cat", "", "Cat ", "dog"], "mine")
    assert report.notes == [
        "the categories 'cat' and 'Cat ' differ in capitals or blanks only: if they are one, call them alike"
    ]


def test_nothing_usable():
    with pytest.raises(DataError, match="no box in any of its 2 rows"):
        validate_proposals(proposed([[], []]))
    with pytest.raises(DataError, match="no usable box(.|\n)*2 boxes, not finite"):
        validate_proposals(proposed([[[NAN, 1, 2, 3]], [[INF, 1, 2, 3]]]))
    with pytest.raises(DataError, match="no usable box(.|\n)*outside the image"):
        validate_proposals(proposed([[[500, 500, 2, 3]]]))


@pytest.mark.parametrize(
    "column, validate",
    [
        ("objects", lambda d: validate_objects(d, ["a"], "mine")),
        ("proposals", lambda d: validate_proposals(d, "mine")),
    ],
)
def test_missing_and_misnamed_columns(column, validate):
    dataset = labelled([[[1, 1, 5, 5]]]) if column == "objects" else proposed([[[1, 1, 5, 5]]])
    with pytest.raises(DataError, match=f"mine: no column '{column}'.*did you mean '{column[:-1]}'"):
        validate(dataset.rename_column(column, column[:-1]))
    with pytest.raises(DataError, match="no column 'image'.*did you mean 'images'.*rename_column"):
        validate(dataset.rename_column("image", "images"))
    with pytest.raises(DataError, match=f"no column '{column}'; found 'image'"):
        validate(dataset.remove_columns(column))


def test_missing_and_misnamed_fields():
    row = {"bbox": [[1.0, 1.0, 5.0, 5.0]], "categories": [0]}
    dataset = datasets.Dataset.from_dict({"image": [picture()], "objects": [row]})
    with pytest.raises(DataError, match="'objects' has no field 'category'.*did you mean 'categories'"):
        validate_objects(dataset, ["a"])
    with pytest.raises(DataError, match="'proposals' has no field 'cluster'"):
        validate_proposals(proposed([[[1, 1, 5, 5]]]), with_clusters=True)
    assert validate_proposals(proposed([[[1, 1, 5, 5]]], True, cluster=[[3]]), with_clusters=True).boxes == 1


@pytest.mark.parametrize(
    "objects, message",
    [
        ([{"bbox": [1.0, 1.0, 5.0, 5.0], "category": 0}], "struct of lists"),  # a list of structs
        ({"bbox": [1.0, 1.0, 5.0, 5.0], "category": [0]}, "list of boxes"),
        ({"bbox": [[1.0, 1.0, 5.0]], "category": [0]}, "row 0: a box must be four numbers"),
        ({"bbox": [["1", "1", "5", "5"]], "category": [0]}, "numbers"),
        ({"bbox": [[1.0, 1.0, 5.0, 5.0]], "category": ["cat"]}, "'category' must hold numbers"),
        ({"bbox": [[1.0, 1.0, 5.0, 5.0]], "category": [0, 0]}, "row 0.*1 boxes but 2 values"),
    ],
)
def test_wrong_shapes_and_types(objects, message):
    dataset = datasets.Dataset.from_dict({"image": [picture()], "objects": [objects]})
    with pytest.raises(DataError, match=message):
        validate_objects(dataset, ["a"])


def test_rows_without_boxes_of_every_kind():
    """An empty list, a null list, a null struct: the next rows keep their numbers."""
    objects = [
        {"bbox": [], "category": []},
        {"bbox": None, "category": None},
        None,
        {"bbox": [[4.0] * 4], "category": [1]},
    ]
    dataset = datasets.Dataset.from_dict({"image": [picture()] * 4, "objects": objects})
    report = validate_objects(dataset, ["a", "b"])
    assert report.boxes == 1 and report.empty_rows == 3
    with pytest.raises(DataError, match="row 3, .*'category': 1 is not one of the 1 categories, expected 0 to 0"):
        validate_objects(dataset, ["a"])


@pytest.mark.parametrize("category", [-1, 2, None])
def test_unknown_categories(category):
    dataset = labelled([[[1, 1, 5, 5]], [[1, 1, 5, 5], [2, 2, 5, 5]]], [[0], [1, category]])
    with pytest.raises(DataError, match="row 1, column 'objects', field 'category'.*2 categories, expected 0 to 1"):
        validate_objects(dataset, ["a", "b"])


def test_a_row_far_down_is_named():
    box = [[1, 1, 5, 5]]
    with pytest.raises(DataError, match="row 1002, column 'objects', field 'category': 3 is"):
        validate_objects(labelled([box] * 1003, [[0]] * 1002 + [[3]]), ["a"])


def test_scores_out_of_order():
    rows = [[[1, 1, 5, 5]] * 3] * 2
    assert validate_proposals(proposed(rows, score=[[3, 2, 2], [9, 1, 0]])).boxes == 6
    for scores in ([3, 2, 2.5], [NAN, 2, 1], [3, 2, NAN]):
        with pytest.raises(
            DataError, match="mine, row 1, column .proposals., field .score.*highest score first.*Sort"
        ):
            validate_proposals(proposed(rows, score=[[3, 2, 2], scores]), "mine")


def test_image_ids():
    rows = [[[1, 1, 5, 5]]] * 3
    assert columns.image_ids(labelled(rows)) == [0, 1, 2]
    assert columns.image_ids(labelled(rows, image_id=[7, 3, 5])) == [7, 3, 5]
    with pytest.raises(DataError, match="row 2, column 'image_id': 7 is also the id of row 0.*unique"):
        validate_objects(labelled(rows, image_id=[7, 3, 7]), ["a"])
    with pytest.raises(DataError, match="row 0, column 'image_id': expected an integer or a text, got 0.5"):
        validate_objects(labelled(rows, image_id=[0.5, 1.5, 2.5]), ["a"])


def test_image_ids_that_are_texts():
    texts = labelled([[[1, 1, 5, 5]]] * 3, image_id=["b2", "a", "b10"])
    assert columns.image_ids(texts) == ["b2", "a", "b10"]
    assert columns.image_numbers(texts) == [2, 0, 1]
    assert validate_objects(texts, ["a"]).boxes == 3


def test_unreadable_image_is_named_with_its_row():
    dataset = labelled([[[1, 1, 5, 5]]] * 2)
    broken = datasets.Dataset.from_dict(
        {"image": [picture(), {"bytes": b"broken", "path": "scan.jpg"}], "objects": list(dataset["objects"])},
        features=dataset.features,
    )
    with pytest.raises(ImageError, match=r"mine: 1 of 2 images(.|\n)*row 1, column 'image'.*scan.jpg"):
        validate_objects(broken, ["a"], "mine")


# ---- reading ----


@pytest.mark.parametrize(
    "feature",
    [
        datasets.List(datasets.List(datasets.Value("float32"))),
        datasets.List(datasets.List(datasets.Value("float64"), length=4)),
        datasets.List(datasets.List(datasets.Value("int32"))),
        datasets.LargeList(datasets.LargeList(datasets.Value("float32"))),
    ],
)
def test_boxes_are_read_from_every_arrow_list(feature):
    rows = [{"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}, {"bbox": []}, {"bbox": [[9, 10, 11, 12]]}]
    dataset = datasets.Dataset.from_dict({"x": rows}, features=datasets.Features(x={"bbox": feature}))
    for data, numbers in ((dataset, [0, 1, 2]), (dataset.select([2, 0]), [2, 0])):
        boxes, counts = read_boxes(data.with_format("arrow")[:]["x"])
        assert boxes.dtype == np.float32
        assert boxes.tolist() == [box for number in numbers for box in rows[number]["bbox"]]
        assert counts.tolist() == [len(rows[number]["bbox"]) for number in numbers]


def test_only_empty_lists_of_unknown_type():
    dataset = datasets.Dataset.from_dict({"x": [{"bbox": [], "category": []}, {"bbox": [], "category": []}]})
    column = dataset.with_format("arrow")[:]["x"]
    boxes, counts = read_boxes(column)
    assert boxes.shape == (0, 4) and counts.tolist() == [0, 0]
    values, counts = read_values(column, "category")
    assert values.shape == (0,) and counts.tolist() == [0, 0]


def test_row_of_a_larger_table():
    dataset = proposed([[[i, i, 5, 5]] * i for i in range(1, 5)]).with_format("arrow")
    boxes, counts = read_boxes(dataset[2]["proposals"])
    assert boxes.tolist() == [[3, 3, 5, 5]] * 3 and counts.tolist() == [3]
    assert read_values(dataset[2]["proposals"], "score")[0].tolist() == [1, 1, 1]
