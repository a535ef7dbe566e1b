"""The command line: flags, recipes, help and errors."""

import errno
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import datasets
import pytest
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from aligndet_hf import ChainArguments, FinetuneArguments, KnnArguments, PretrainArguments, cli
from aligndet_hf.data.errors import DataError
from aligndet_hf.parser import parse_arguments
from aligndet_hf.recipes import recipe_names


@dataclass
class BoxArguments:
    source: str = field(metadata={"help": "where the boxes are"})


@dataclass(kw_only=True)
class DemoArguments(BoxArguments):
    help_groups = {"rate": "Optimisation"}

    settings: dict = field(default_factory=dict, metadata={"help": "anything"})
    options: dict[str, Any] | None = field(default=None, metadata={"help": "anything or nothing"})
    rate: float = field(default=1e-4, metadata={"help": "how fast"})
    limit: int | None = field(default=None, metadata={"help": "how many"})
    flip: bool = field(default=True, metadata={"help": "whether to flip"})
    crop: bool = field(default=False, metadata={"help": "whether to crop"})
    sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "how large"})
    mode: Literal["top", "random"] = field(default="top", metadata={"help": "which"})


@dataclass(kw_only=True)
class TrainerArguments(TrainingArguments):
    head_rate: float = field(default=0.5, metadata={"help": "a rate of our own"})


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def parse(*argv):
    return parse_arguments(DemoArguments, list(argv))


def test_flags():
    arguments = parse(
        "--source", "a b", "--rate", "2", "--sizes", "3", "4", "5", "--no_flip", "--crop",
        "--settings", '{"a": {"b": 1}}',
    )  # fmt: skip
    assert asdict(arguments) == {
        "source": "a b", "settings": {"a": {"b": 1}}, "options": None, "rate": 2.0, "limit": None, "flip": False,
        "crop": True, "sizes": [3, 4, 5], "mode": "top",
    }  # fmt: skip


def test_a_recipe_is_the_default_and_flags_win(recipe):
    text = "source: here\nrate: 1e-3\nsettings: {a: [1, 2]}\noptions: {b: null}\nflip: false\nsizes: [7]\nlimit: 5\n"
    arguments = parse("--config", recipe(text), "--rate", "5", "--sizes", "8", "9")
    assert (arguments.source, arguments.rate, arguments.sizes) == ("here", 5.0, [8, 9])
    assert (arguments.settings, arguments.options) == ({"a": [1, 2]}, {"b": None})
    assert (arguments.flip, arguments.limit, arguments.mode) == (False, 5, "top")


def test_a_recipe_knows_what_yaml_does_not(recipe):
    # YAML 1.1 reads 1e-3 as text and a bare number as a number; the field's type decides.
    arguments = parse("--config", recipe("source: 2017\nrate: 1e-3\nlimit: null\nsizes: []\n"))
    assert (arguments.source, arguments.rate, arguments.limit, arguments.sizes) == ("2017", 0.001, None, [])


def test_what_is_required_may_come_from_either(recipe):
    assert parse("--config", recipe("rate: 1"), "--source", "x").source == "x"
    assert parse("--config", recipe("source: y")).source == "y"
    with pytest.raises(ValueError, match="required: --source"):
        parse("--config", recipe("rate: 1"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("source: x\nrat: 1", "unknown key 'rat'; did you mean 'rate'?"),
        ("source: x\nrat: 1", ".yaml, as a recipe of aligndet"),
        ("source: x\nconfig: other.yaml", "unknown key 'config'"),
        ("source: x\nrate: fast", "--rate: 'fast' is not a number"),
        ("source: x\nlimit: 2.5", "--limit: '2.5' is not a whole number"),
        ("source: x\nsizes: [1, two]", "--sizes: 'two' is not a whole number"),
        ("source: x\nmode: best", "invalid choice: 'best'"),
        ("source: x\nsettings: [1]", "--settings"),
        ("source: x\nflip: maybe", "--flip"),
        ("source: {", "not valid YAML"),
        ("- source", "must be a mapping"),
    ],
)
def test_a_wrong_recipe_is_one_clear_error_that_names_the_file(recipe, text, message):
    path = recipe(text)
    with pytest.raises(ValueError) as error:
        parse("--config", path)
    assert message in str(error.value) and path in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--source", "x", "--rat", "1"], "unknown argument --rat; did you mean '--rate'?"),
        (["--source", "x", "--rate=fast"], "--rate: 'fast' is not a number"),
        (["--source", "x", "--settings", "{"], "not valid JSON"),
        (["--source", "x", "--settings", "[1]"], "a JSON mapping is due"),
        ([], "the following arguments are required: --source"),
        (["--sourze", "x"], "unknown argument --sourze; did you mean '--source'?"),
        (["--config"], "--config"),
    ],
)
def test_wrong_flags_are_one_clear_error(argv, message):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert message in str(error.value)


def test_a_missing_recipe_is_an_error_that_names_it():
    with pytest.raises(OSError, match="nowhere.yaml"):
        parse("--config", "nowhere.yaml")


def help_of(cls, capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(cls, [*argv, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_has_sections_defaults_and_one_spelling(capsys):
    text = help_of(DemoArguments, capsys)
    sections = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["options", "Required", "Box", "Optimisation", "Common"]
    assert "--rate FLOAT" in text and "how fast (default: 0.0001)" in text
    assert text.index("Required:") < text.index("where the boxes are") < text.index("Box:")
    assert "--settings JSON" in text and "{top,random}" in text
    assert "--no_flip" not in text and "None" not in text


def test_help_shows_the_recipe_as_defaults(capsys, recipe):
    assert "how fast (default: 7.0)" in help_of(DemoArguments, capsys, "--config", recipe("rate: 7"))


def test_inherited_flags_are_folded(capsys):
    text = help_of(TrainerArguments, capsys)
    assert "--head_rate" in text and "--adam_beta1" not in text and "--help-all" in text
    text = help_of(TrainerArguments, capsys, "--help-all")
    assert "--adam_beta1" in text and text.index("--head_rate") < text.index("--adam_beta1")


def test_inherited_flags_are_accepted(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--adam_beta1", "0.8", "--head_rate", "2", "--debug", "underflow_overflow"]
    arguments = parse_arguments(TrainerArguments, flags)
    assert (arguments.adam_beta1, arguments.head_rate) == (0.8, 2.0)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_the_commands(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: aligndet {command} [--config") and "--output" in text


def test_overview(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"aligndet {command} " in text for command in cli.COMMANDS)


def test_unknown_command(capsys):
    assert cli.main(["pretrian"]) == 2
    assert "did you mean 'pretrain'?" in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch):
    """A command `demo` whose function raises what the test gives it."""

    def install(error=None):
        seen = []

        def work(arguments):
            seen.append(arguments)
            if error is not None:
                raise error

        module = SimpleNamespace(DemoArguments=DemoArguments, work=work)
        monkeypatch.setitem(sys.modules, "aligndet_hf.commands.demo", module)
        monkeypatch.setitem(cli.COMMANDS, "demo", cli.Command("demo", "a demo", "work"))
        return seen

    return install


def test_a_command_runs(command):
    seen = command()
    assert cli.main(["demo", "--source", "x", "--limit", "3"]) == 0
    assert (seen[0].source, seen[0].limit) == ("x", 3)


@pytest.mark.parametrize("error", [ValueError("row 3 is wrong"), OSError("row 3 is wrong")])
def test_bad_input_is_one_line_and_code_2(command, error, capsys):
    command(error)
    assert cli.main(["demo", "--source", "x"]) == 2
    assert capsys.readouterr().err == "error: row 3 is wrong\n"


def test_a_full_disk_is_told_with_the_places_that_were_written_to(command, capsys):
    command(OSError(errno.ENOSPC, "No space left on device"))
    assert cli.main(["demo", "--source", "x"]) == 2
    message = capsys.readouterr().err
    assert str(datasets.config.HF_DATASETS_CACHE) in message and "run the same command again" in message


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("row 3 is wrong")


def test_an_error_in_a_loading_process_is_one_line_too(command, capsys):
    with pytest.raises(DataError) as raised:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert "Original Traceback" in str(raised.value)
    command(raised.value)
    assert cli.main(["demo", "--source", "x"]) == 2
    assert capsys.readouterr().err == "error: row 3 is wrong\n"


def test_a_bug_keeps_its_traceback(command):
    command(KeyError("bug"))
    with pytest.raises(KeyError):
        cli.main(["demo", "--source", "x"])


def test_the_traceback_can_be_asked_for(command, monkeypatch):
    command(ValueError("row 3 is wrong"))
    with pytest.raises(ValueError):
        cli.main(["demo", "--source", "x", "--traceback"])
    monkeypatch.setenv("ALIGNDET_DEBUG", "1")
    with pytest.raises(ValueError):
        cli.main(["demo", "--source", "x"])


def test_ctrl_c_has_no_traceback(command, capsys):
    command(KeyboardInterrupt())
    assert cli.main(["demo", "--source", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_recipes_of_the_package_are_found_by_name(tmp_path, monkeypatch, capsys):
    assert cli.main(["recipes"]) == 0
    names = capsys.readouterr().out.split()
    assert {"aligndet_rt_detr_bccd", "accelerate_fsdp2"} <= set(names)
    assert cli.main(["recipes", "--help"]) == 0 and "usage: aligndet recipes" in capsys.readouterr().out
    assert cli.main(["recipes", "chain_bcd"]) == 2
    assert "error: there is no file chain_bcd, and no recipe" in capsys.readouterr().err
    assert cli.main(["recipes", "accelerate_fsdp2"]) == 0
    assert "fsdp" in Path(capsys.readouterr().out.strip()).read_text()

    monkeypatch.chdir(tmp_path)
    given = ["--dataset", "d", "--output_dir", "o"]
    from_name = parse_arguments(PretrainArguments, ["--config", "aligndet_rt_detr_bccd", *given])
    assert from_name.detector == "rt_detr" and from_name.aligndet_config
    assert parse_arguments(PretrainArguments, ["--config", "scripts/recipes/aligndet_rt_detr_bccd.yaml", *given]) == (
        from_name
    )
    with pytest.raises(OSError, match="no recipe of that name; did you mean 'aligndet_rt_detr_bccd'?"):
        parse_arguments(PretrainArguments, ["--config", "aligndet_rtdetr_bccd", *given])
    (tmp_path / "twice.yaml").write_text("image_sizes: 96\nmax_steps: 3\nimage_sizes: 128\n")
    with pytest.raises(ValueError, match="twice.yaml is not valid YAML: the key 'image_sizes' is there twice"):
        parse_arguments(PretrainArguments, ["--config", "twice.yaml", *given])
    (tmp_path / "latin.yaml").write_bytes("run_name: hérisson\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.yaml is not valid YAML: unacceptable character #x00e9"):
        parse_arguments(PretrainArguments, ["--config", "latin.yaml", *given])
    (tmp_path / "wide.yaml").write_text("max_steps: 3\n", encoding="utf-16")
    assert parse_arguments(PretrainArguments, ["--config", "wide.yaml", *given]).max_steps == 3
    (tmp_path / "wide.yaml").write_text("max_step: 3\n", encoding="utf-16")
    with pytest.raises(ValueError, match="unknown key 'max_step'; did you mean 'max_steps'?"):
        parse_arguments(PretrainArguments, ["--config", "wide.yaml", *given])
    with pytest.raises(OSError, match="no file nowhere.yaml, and no recipe of that name; there are .*chain_bccd"):
        parse_arguments(PretrainArguments, ["--config", "nowhere.yaml", *given])


def test_a_recipe_of_another_command_is_named_as_such():
    for name in recipe_names():
        if not name.startswith("accelerate"):
            with pytest.raises(ValueError, match=r"unknown key '\w+'\. It is a recipe of `aligndet \w+`$"):
                parse_arguments(KnnArguments, ["--config", name], "aligndet knn")
    with pytest.raises(ValueError, match="of aligndet finetune: unknown key .*It is a recipe of `aligndet pretrain`"):
        parse_arguments(FinetuneArguments, ["--config", "soco_r50_fpn_coco"], "aligndet finetune")


def test_recipes_refer_to_others_beside_them(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "start.yaml").write_text("detector: detr\n")
    chain = "stages:\n  pretrain: {config: start.yaml, dataset: d}\n  finetune: {config: finetune_rt_detr_bccd}\n"
    (tmp_path / "mine" / "chain.yaml").write_text(chain)
    monkeypatch.chdir(tmp_path)
    arguments = parse_arguments(ChainArguments, ["--config", "mine/chain.yaml", "--output_dir", "o"])
    assert arguments.stages["pretrain"]["config"] == "mine/start.yaml"
    assert arguments.stages["finetune"]["config"] == "finetune_rt_detr_bccd"
