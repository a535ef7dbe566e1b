"""What several test files share: one thread, no network, and a small run of pre-training."""

import os

# Before torch and the Hub client are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import signal

import datasets
import forks
import hypothesis
import pytest

# A suite that a shell has started in the background inherits that Ctrl-C is ignored. Tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


forks.be_quick()

# A busy machine is slow to draw examples, and to run them: neither is a fault of what is tested.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

# No test cuts the power, against which files wait for the disk. What is killed is a fork, which does wait.
os.fsync = lambda descriptor: None


# A worker that gets one of these last is alone in the end.
# The very first compiles what many others use.
LONG = "readme finetune modeling pretrain interrupt distributed compare hub generate export".split()


def pytest_collection_modifyitems(items):
    """The files that take longest come first."""
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def pytest_collection_finish():
    """What is there before the first test stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def few_runs_of_the_clock():
    """Fine-tuning times its detector at its end: no test looks at how long an image takes."""
    from aligndet_hf.evaluation import speed

    speed.RUNS = 2


@pytest.fixture(scope="session")
def proposal_folder(tmp_path_factory):
    """A saved dataset of 8 small scenes, with the true boxes as proposals, twice the same number each: 4."""
    from aligndet_hf.data.columns import proposals_feature
    from aligndet_hf.data.synthetic import make_synthetic_dataset

    scenes = make_synthetic_dataset(8, seed=0, image_size=(64, 80))
    proposals = []
    for row, objects in enumerate(scenes["objects"]):
        boxes = (objects["bbox"] + [[4.0, 6.0, 20.0, 18.0], [30.0, 8.0, 24.0, 30.0], [10.0, 30.0, 40.0, 25.0]] * 2)[:4]
        proposals.append({"bbox": boxes, "score": [0.9, 0.8, 0.7, 0.6], "cluster": [row % 2, 1, 0, 2]})
    features = datasets.Features({"proposals": proposals_feature(with_clusters=True)})
    column = datasets.Dataset.from_dict({"proposals": proposals}, features=features)
    folder = tmp_path_factory.mktemp("data") / "scenes"
    datasets.concatenate_datasets([scenes.remove_columns("objects"), column], axis=1).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def detector_folders(tmp_path_factory):
    """A function from a family to a folder with a tiny detector of it."""
    from tiny_detectors import tiny_detector

    parent, made = tmp_path_factory.mktemp("detectors"), {}

    def folder_of(model_type: str, **fields):
        key = (model_type, repr(sorted(fields.items())))
        if key not in made:
            made[key] = parent / f"{model_type}-{len(made)}"
            tiny_detector(model_type, num_labels=1, **fields).save_pretrained(made[key])
        return made[key]

    return folder_of
