"""Cards of data sets with proposals: what was done, counted and how to load it."""

import datasets
import yaml
from huggingface_hub import DatasetCard

from aligndet_hf.cards import BEGIN, END
from aligndet_hf.data.dataset_card import dataset_card, describe_proposals

BOXES = {"min": 0, "median": 12.0, "mean": 14.5, "max": 30}
REPORT = {
    "dataset": "/home/me/photos",
    "settings": {
        "source": "detector", "detector": "/home/me/run/detector", "max_boxes": 30, "nms_threshold": 0.7,
        "input_train": "0f" * 16, "detector_content": "a0" * 16,
    },
    "versions": {"aligndet_hf": "0.1.0", "numpy": "2.0"},
    "statistics": {
        "train": {"images": 1500, "skipped_images": 2, "images_without_boxes": 3, "boxes_per_image": BOXES},
    },
    "skipped": [{"file": "/home/me/photos/broken.jpg"}],
}  # fmt: skip


def test_dataset_card():
    dataset = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict({"image": [1], "proposals": [1], "note": [1]})}
    )
    text = dataset_card(dataset, REPORT, "me/photos-proposals", "cc-by-4.0")
    card = DatasetCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.task_categories == ["object-detection"]
    assert card.data.size_categories == ["1K<n<10K"] and "object-proposals" in card.data.tags
    assert 'load_dataset("me/photos-proposals", split="train")' in text and "# photos with object proposals" in text
    assert "| train | 1500 | 2 | 3 | 14.5 | 0 | 12.0 | 30 |" in text and "1,500 images" in text
    assert "| note | of the data set it was made from |" in text and "| proposals | `bbox`" in text
    settings, versions = (yaml.safe_load(part.split("```")[0]) for part in text.split("```yaml\n")[1:])
    assert settings == {"source": "detector", "detector": "run", "max_boxes": 30, "nms_threshold": 0.7}
    assert versions == {"aligndet_hf": "0.1.0", "numpy": "2.0"}
    assert "what a trained model finds (run), max_boxes 30, nms_threshold 0.7." in text
    assert "Uijlings" not in text and "/home" not in text and text.count(BEGIN) == text.count(END) == 1


def test_pseudo_classes_and_their_agreement():
    agreement = {"matched": 77, "clusters": {"ami": 0.25}, "shuffled": {"ami": 0.001}}
    report = REPORT | {
        "settings": {"source": "selective_search", "preset": "default", "clusters": {"num_clusters": 9}},
        "clusters": {"agreement": agreement},
    }
    dataset = datasets.Dataset.from_dict({"image": [1], "proposals": [1]})
    text = dataset_card(dataset, report, "photos")
    assert (
        "the 77 proposals" in text and "25.0 %; of shuffled ones 0.1 %" in text and "`cluster`: a pseudo-class" in text
    )
    assert "preset default; their 9 pseudo-classes" in text and "Uijlings" in text
    assert "license" not in DatasetCard(text).data.to_dict()


def test_proposals_of_which_nothing_is_known():
    assert describe_proposals(None) is None and describe_proposals({"boxes": 5}) is None
