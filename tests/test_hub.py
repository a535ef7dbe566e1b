"""Uploads to a Hub and downloads from it, over HTTP: commands, cards, interruptions, permissions and secrets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from local_hub import USERS, LocalHub
from safetensors.torch import load_file
from tiny_detectors import SMALL_DETR, tiny_detector
from tiny_soco import SMALL

from aligndet_hf.cards import BEGIN, END
from aligndet_hf.convnets import modeling_torchvision
from aligndet_hf.data.synthetic import write_synthetic_folder

HERE = Path(__file__).parent
WRITER, READER = USERS


class Outcome(NamedTuple):
    """The exit code of a command, and what it printed."""

    code: int
    output: str

    @property
    def error(self) -> str:
        """The one line in which a command fails."""
        lines = re.findall("error: .*", self.output)  # which may follow a progress bar
        assert self.code == 2 and len(lines) == 1 and "Traceback" not in self.output, self.output
        return lines[0]


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as server:
        yield server


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    """What makes a process talk to the local Hub, and only to it."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent),
    }


@pytest.fixture(scope="module")
def aligndet(environment, tmp_path_factory):
    """A function that runs a command as a user, without a token if that is `None`."""
    client = subprocess.Popen(
        [sys.executable, HERE / "hub_client.py"],
        env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    output = tmp_path_factory.mktemp("output") / "output.txt"

    def run(*argv, token: str | None = WRITER) -> Outcome:
        task = {"argv": [str(arg) for arg in argv], "environment": {"HF_TOKEN": token or ""}, "output": str(output)}
        client.stdin.write(json.dumps(task) + "\n")
        client.stdin.flush()
        outcome = Outcome(int(client.stdout.readline()), output.read_text())
        assert not any(secret in outcome.output for secret in (*USERS, "Bearer"))
        return outcome

    yield run
    client.stdin.close()
    client.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes of two splits, and a tiny detector."""
    folder = tmp_path_factory.mktemp("hub")
    write_synthetic_folder(folder / "scenes", {"train": 6, "validation": 2}, seed=0, image_size=(64, 80))
    tiny_detector("detr", num_labels=1).save_pretrained(folder / "tiny")
    tiny_detector("torchvision_mask_rcnn", num_labels=1).save_pretrained(folder / "mask_rcnn")
    return folder


@pytest.fixture(scope="module")
def commands(folder):
    """The commands of the journey; each reads from the Hub what the one before has uploaded."""
    short = (
        "--image_sizes", 64, "--max_steps", 2, "--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", 1,
    )  # fmt: skip
    public = ("--hub_private_repo", "false")
    return {
        "proposals": (
            "proposals", "--dataset", folder / "scenes", "--output_dir", folder / "boxes",
            "--dataloader_num_workers", 0,
            "--preset", "tiny", "--push_to_hub", "true", *public, "--disable_tqdm", "true",
        ),
        "pretrain": (
            "pretrain", "--dataset", "writer/boxes", "--detector", folder / "tiny", "--output_dir", folder / "start",
            "--card_license", "apache-2.0", "--push_to_hub", "true", *public, *short,
        ),
        "finetune": (
            "finetune", "--dataset", folder / "scenes", "--detector", "writer/start", "--output_dir", folder / "cells",
            "--report_to", "none", "--dataloader_num_workers", 0, "--dataloader_persistent_workers", "false",
            "--num_pictures", 1, "--push_to_hub", "true", *public, *short,
        ),
        "convnet": (
            "finetune", "--dataset", folder / "scenes", "--detector", folder / "mask_rcnn",
            "--output_dir", folder / "convnet", "--report_to", "none", "--dataloader_num_workers", 0,
            "--dataloader_persistent_workers", "false", "--push_to_hub", "true", *public, *short,
        ),
        "soco": (
            "pretrain", "--method", "soco", "--dataset", "writer/boxes", "--backbone", "test_resnet",
            "--soco_config", json.dumps(SMALL | {"level_sizes": [8, 16, 32, 64]}), "--output_dir", folder / "trunk",
            "--push_to_hub", "true", *short, "--image_sizes", 64, 64, 32,
        ),
        "from soco": (
            "pretrain", "--dataset", "writer/boxes", "--detector", "detr", "--backbone", "writer/trunk",
            "--detector_config", json.dumps(SMALL_DETR), "--output_dir", folder / "from_trunk", *short,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def journey(aligndet, commands):
    """All of it, done once."""
    for name in ("proposals", "pretrain", "finetune", "convnet", "soco"):
        outcome = aligndet(*commands[name])
        assert outcome.code == 0 and "Uploaded to http://" in outcome.output, outcome.output


LOADING = """
import json, sys
sys.modules["aligndet_hf"] = None  # `import aligndet_hf` fails
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

start = AutoModelForObjectDetection.from_pretrained("writer/start")
AutoImageProcessor.from_pretrained("writer/start")
start.save_pretrained("start")
names = {0: "cat", 1: "dog"}
AutoModelForObjectDetection.from_pretrained(
    "writer/start", id2label=names, label2id={"cat": 0, "dog": 1}, ignore_mismatched_sizes=True
)
boxes = load_dataset("writer/boxes")
detect = pipeline("object-detection", model="writer/cells")
found = detect(boxes["validation"][0]["image"], threshold=0.0)
convnet = pipeline("object-detection", model="writer/convnet", trust_remote_code=True)
with open("found.json", "w") as file:
    json.dump({
        "labels": sorted({one["label"] for one in found}),
        "convnet": len(convnet(boxes["validation"][0]["image"], threshold=0.0)),
        "rows": {split: len(rows) for split, rows in boxes.items()},
        "columns": boxes["train"].column_names,
        "boxes": [len(row["bbox"]) for row in boxes["train"]["proposals"]],
    }, file)
"""


def test_what_is_uploaded_needs_no_package_of_ours(journey, folder, environment, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", LOADING],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    saved, loaded = (load_file(f / "model.safetensors") for f in (folder / "start" / "detector", tmp_path / "start"))
    assert saved.keys() == loaded.keys() and all(saved[name].equal(loaded[name]) for name in saved)
    found = json.loads((tmp_path / "found.json").read_text())
    config = json.loads((folder / "cells" / "config.json").read_text())
    assert set(found["labels"]) <= set(config["id2label"].values()) and found["labels"]
    assert found["convnet"] > 0
    assert found["rows"] == {"train": 6, "validation": 2} and {"image", "proposals", "objects"} <= set(
        found["columns"]
    )
    counts = json.loads((folder / "boxes" / "proposals.json").read_text())["statistics"]["train"]["boxes_per_image"]
    assert (min(found["boxes"]), max(found["boxes"])) == (counts["min"], counts["max"]) and counts["max"] > 0


def test_what_a_repository_holds(journey, hub, folder):
    start = hub.repositories["models", "writer/start"]
    model = {"config.json", "model.safetensors"}
    assert start.files().keys() == {
        *model, "preprocessor_config.json", "README.md", "report.html", "log.jsonl", "aligndet/config.json",
        "aligndet/model.safetensors",
    }  # fmt: skip
    (title,) = start.titles()[1:]
    assert title.startswith("DETR pre-trained with AlignDet on writer/boxes: 2 steps")
    cells = hub.repositories["models", "writer/cells"]
    assert cells.files().keys() == {
        *model, "preprocessor_config.json", "README.md", "report.html", "transfer_report.json"
    }  # fmt: skip
    convnet = hub.repositories["models", "writer/convnet"].files()
    code = Path(modeling_torchvision.__file__).read_bytes()
    assert convnet.keys() == cells.files().keys() | {"modeling_torchvision.py"}
    assert convnet["modeling_torchvision.py"] == code
    for repository in hub.repositories.values():
        for path, content in repository.files().items():
            if not path.endswith((".safetensors", ".parquet")):
                assert str(folder).encode() not in content, path
                assert not any(secret.encode() in content for secret in USERS), path


def test_a_backbone_of_soco_is_loaded_by_its_id(journey, hub, aligndet, commands, folder):
    trunk = hub.repositories["models", "writer/trunk"]
    assert trunk.files().keys() == {
        "config.json", "model.safetensors", "preprocessor_config.json", "torchvision.safetensors", "README.md",
        "report.html", "log.jsonl", "soco/config.json", "soco/model.safetensors",
    }  # fmt: skip
    card = trunk.files()["README.md"]
    assert metadata(card)["pipeline_tag"] == "image-feature-extraction" and b'backbone="writer/trunk"' in card
    assert b'hf_hub_download("writer/trunk", "torchvision.safetensors")' in card
    saved = load_file(folder / "trunk" / "backbone" / "model.safetensors")
    outcome = aligndet(*commands["from soco"])
    assert outcome.code == 0, outcome.output
    assert "backbone from writer/trunk: " in outcome.output and " 0 missing, 0 mismatched" in outcome.output
    # Frozen in this stage, and normalised with its own mean.
    loaded = load_file(folder / "from_trunk" / "detector" / "model.safetensors")
    prefix = next(name for name in loaded if name.endswith("conv1.0.weight")).removesuffix("conv1.0.weight")
    saved = {name: tensor for name, tensor in saved.items() if not name.endswith("num_batches_tracked")}
    assert saved and all(loaded[prefix + name].equal(tensor) for name, tensor in saved.items())
    mean = json.loads((folder / "trunk/backbone/preprocessor_config.json").read_text())["image_mean"]
    assert json.loads((folder / "from_trunk/detector/preprocessor_config.json").read_text())["image_mean"] == mean
    # A person's words stay here, too.
    trunk.edit("README.md", card + b"\nOur microscope.\n")
    assert aligndet(*commands["soco"], "--card_license", "mit").code == 0
    again = trunk.files()["README.md"]
    assert again.endswith(b"\nOur microscope.\n") and metadata(again)["license"] == "mit"


def metadata(card: bytes) -> dict:
    return yaml.safe_load(re.match(rb"---\n(.*?)\n---", card, re.DOTALL)[1])


def test_the_cards_on_the_hub(journey, hub):
    start = hub.repositories["models", "writer/start"].files()["README.md"]
    assert metadata(start)["license"] == "apache-2.0" and metadata(start)["datasets"] == ["writer/boxes"]
    assert b'path = "writer/start"' in start and b"subfolder" not in start
    cells = hub.repositories["models", "writer/cells"].files()["README.md"]
    assert metadata(cells)["base_model"] == "writer/start" and b'model="writer/cells"' in cells
    result = metadata(cells)["model-index"][0]["results"][0]
    assert result["dataset"]["split"] == "validation" and result["metrics"][0]["name"].startswith("AP")
    boxes = hub.repositories["datasets", "writer/boxes"].files()["README.md"]
    assert metadata(boxes)["task_categories"] == ["object-detection"] and "configs" in metadata(boxes)
    assert b'load_dataset("writer/boxes", split="train")' in boxes and b"| train | 6 | 0 |" in boxes
    assert b"preset tiny" in boxes and b"preset: tiny" in boxes and b"Uijlings" in boxes


def test_a_card_keeps_what_a_person_wrote(journey, hub, aligndet, commands):
    repository = hub.repositories["models", "writer/cells"]
    card = repository.files()["README.md"].decode()
    edited = card.replace("---\n\n" + BEGIN, f"---\nOur cells.\n\n{BEGIN}", 1) + "\n## Thanks\n\nTo all.\n"
    edited = edited.replace("\ntags:\n", "\nlanguage: en\ntags:\n- blood\n", 1).replace("## Limits", "## Gone")
    assert edited != card and "Our cells" in edited and "## Gone" in edited
    repository.edit("README.md", edited.encode())
    sent, commits = len(hub.uploaded), len(repository.titles())

    outcome = aligndet(*commands["finetune"], "--card_license", "mit")
    assert outcome.code == 0 and "is finished" in outcome.output
    after = repository.files()["README.md"].decode()
    assert "Our cells." in after and after.endswith("## Thanks\n\nTo all.\n")
    assert "## Gone" not in after and after.count(BEGIN) == after.count(END) == after.count("## Limits") == 1
    assert metadata(after.encode())["license"] == "mit" and metadata(after.encode())["language"] == "en"
    assert {"blood", "aligndet-hf"} <= set(metadata(after.encode())["tags"])
    # Only the card has changed, and only it was sent.
    assert len(hub.uploaded) == sent and len(repository.titles()) == commits + 1
    assert aligndet(*commands["finetune"], "--card_license", "mit").code == 0
    assert len(repository.titles()) == commits + 1


def test_a_card_that_is_edited_during_the_upload(journey, hub, aligndet, commands):
    repository = hub.repositories["models", "writer/cells"]
    edited = repository.files()["README.md"] + b"\nJust written.\n"
    hub.meanwhile("POST .*/commit/", lambda: repository.edit("README.md", edited))
    again = (*commands["finetune"], "--card_license", "apache-2.0")
    assert "somebody changed the repository meanwhile" in aligndet(*again).error
    assert repository.files()["README.md"] == edited
    assert aligndet(*again).code == 0
    card = repository.files()["README.md"]
    assert card.endswith(b"\nJust written.\n") and metadata(card)["license"] == "apache-2.0"


@pytest.mark.parametrize("request_", ["PUT /lfs", "POST .*/commit/"])
@pytest.mark.parametrize("command", ["pretrain", "proposals"])
def test_an_upload_that_breaks_off_is_completed_by_the_same_command(
    journey, hub, aligndet, commands, command, request_
):
    name = re.sub(r"\W", "", f"again{command}{request_}")
    flag, kind = ("--hub_dataset_id", "datasets") if command == "proposals" else ("--hub_model_id", "models")
    again = (*commands[command], flag, name)
    hub.break_down(request_)
    try:
        error = aligndet(*again).error
    finally:
        hub.mend()
    assert re.match(rf"error: cannot upload to writer/{name}: .* run the same command again$", error)
    repository = hub.repositories[kind, f"writer/{name}"]
    assert repository.files() == {}
    assert aligndet(*again).code == 0
    whole = hub.repositories[kind, "writer/boxes" if command == "proposals" else "writer/start"].files()
    assert repository.files().keys() == whole.keys()
    sent = [request for request in hub.requests if request.startswith(f"PUT /lfs/writer/{name}/")]
    # What had arrived was not sent again; the file at which the connection broke was.
    large = sum(path.endswith((".safetensors", ".parquet")) for path in whole)
    stored = [key for key in hub.large_files if key[0] == f"writer/{name}"]
    assert len(stored) == large <= len(sent) and (request_ == "PUT /lfs" or len(sent) == large)


@pytest.mark.parametrize(
    "token, name, message",
    [
        (None, "new", "cannot upload to new: there is no token: run `hf auth login`, or set HF_TOKEN"),
        ("hf_Wrong", "new", "does not accept the token"),
        (READER, "new", r"may not write there.*\(403\)"),
        (READER, "writer/boxes", r"cannot upload to writer/boxes: the token may not write there.*\(403\)"),
        (WRITER, "nobody/new", "cannot upload to nobody/new: .*there is no such owner"),
        (WRITER, "not a name", "not a name"),
    ],
)
def test_who_may_not_write_learns_it_before_any_work(journey, hub, aligndet, commands, folder, token, name, message):
    output = folder / "never"
    words = [output if word == folder / "boxes" else word for word in commands["proposals"]]
    error = aligndet(*words, "--hub_dataset_id", name, token=token).error
    assert re.search(message, error) and not output.exists()


def test_repositories_are_private_and_without_pictures_unless_asked(journey, hub, aligndet, commands, folder):
    assert hub.repositories["models", "writer/trunk"].private
    assert not hub.repositories["models", "writer/start"].private  # with `--hub_private_repo false`
    cells, heading = hub.repositories["models", "writer/cells"], b"<h2>Pictures</h2>"
    assert heading in (folder / "cells" / "report.html").read_bytes()
    assert heading not in cells.files()["report.html"]
    outcome = aligndet(*commands["finetune"])
    assert (
        "without the 2 pictures of your images (predictions.jpg, worst.jpg): --push_pictures uploads them"
        in outcome.output
    )
    outcome = aligndet(*commands["finetune"], "--push_pictures", "true")
    assert "with 2 pictures of your images (predictions.jpg, worst.jpg) in report.html" in outcome.output
    assert heading in cells.files()["report.html"]


def test_a_public_repository_is_not_taken_for_a_private_one(journey, aligndet, commands):
    outcome = aligndet(*commands["pretrain"], "--hub_private_repo", "true")
    assert "writer/start is to be private, but is there and public" in outcome.error


def test_an_unknown_licence_is_refused_before_any_work(journey, aligndet, commands):
    outcome = aligndet(*commands["pretrain"], "--card_license", "mine")
    assert "card_license: the Hub does not know the licence 'mine'" in outcome.error


def test_a_token_given_to_a_command_is_written_nowhere(journey, aligndet, commands, folder, hub):
    flags = ("--hub_token", WRITER, "--hub_model_id", "by-token")
    assert aligndet(*commands["finetune"], *flags, token=None).code == 0
    assert "model.safetensors" in hub.repositories["models", "writer/by-token"].files()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not any(WRITER.encode() in path.read_bytes() for path in files)


def test_private_repositories_and_branches(journey, hub, aligndet, commands):
    flags = ("--hub_model_id", "hidden", "--hub_private_repo", "true", "--hub_revision", "draft")
    assert aligndet(*commands["pretrain"], *flags).code == 0
    hidden = hub.repositories["models", "writer/hidden"]
    assert hidden.private and "model.safetensors" in hidden.files("draft") and hidden.files("main") == {}
    flags = ("--hub_dataset_id", "hidden", "--hub_private_repo", "true", "--hub_revision", "draft")
    assert aligndet(*commands["proposals"], *flags).code == 0
    hidden = hub.repositories["datasets", "writer/hidden"]
    assert hidden.private and "README.md" in hidden.files("draft") and hidden.files("main") == {}


def test_a_private_repository_without_a_token(journey, hub, aligndet, commands, folder):
    for kind in ("models", "datasets"):
        stored = hub.repositories[kind, "writer/start" if kind == "models" else "writer/boxes"]
        hub.repositories[kind, f"writer/secret-{kind}"] = type(stored)(private=True, branches=stored.branches)

    def swapped(command, **changes):
        words = list(commands[command])
        for flag, value in {"push_to_hub": "false", "output_dir": folder / f"never-{command}", **changes}.items():
            words[words.index(f"--{flag}") + 1] = value
        return words

    outcome = aligndet(*swapped("finetune", detector="writer/secret-models"), token=None)
    assert "writer/secret-models" in outcome.error or "secret-models" in outcome.output
    outcome = aligndet(*swapped("pretrain", dataset="writer/secret-datasets"), token=None)
    assert "writer/secret-datasets" in outcome.error
