"""Publish a finished comparison in this repository, without a path of the machine it ran on.

python docs/tools/model_cards.py outputs/compare_bccd --name bccd --license apache-2.0

Writes to `model_cards/<name>/`: `results.json`, the report with its plots, and the cards of the checkpoints of the
first seed, those of the baseline left out; `--runs` chooses others. What a person wrote in a card stays. Then fills
every block

    <!-- results of model_cards/<name>/results.json -->
    <!-- end of results -->

of the README, the pages of `docs/` and those of `model_cards/` with the tables; without a folder it does only that.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from aligndet_hf.cards import write_card
from aligndet_hf.files import write_json
from aligndet_hf.reporting.comparison import summary, told_results, write_report
from aligndet_hf.reporting.model_card import model_card
from aligndet_hf.reporting.run_record import read_run

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- results of (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def publish(comparison: Path, folder: Path, license: str | None = None, runs: Sequence[str] = ()) -> list[Path]:
    """Writes results, report and cards of a comparison to a folder of this repository, and returns the cards."""
    results = told_results(json.loads((comparison / "results.json").read_text(encoding="utf-8")))
    if results["failures"] or len(results["runs"]) < results["planned"]:
        raise ValueError(f"{comparison} is not finished: run the same `aligndet compare` again")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_report(folder, results)
    cards = []
    for run in runs or trained(results):
        record = read_run(comparison / run)
        record.license, record.comparison = license or record.license, summary(results)
        name = f"{folder.name}-{run.replace('/', '-')}"
        cards.append(write_card(folder / f"{name}.md", model_card(record, name, record.product)))
    return cards


def trained(results: Mapping) -> list[str]:
    """The folders of the training stages of the first seed that are not the baseline's alone."""
    first = f"-seed-{results['config']['seeds'][0]}"
    return [
        stage["folder"]
        for stage in results["stages"]
        if stage["command"] in ("pretrain", "finetune")
        and not stage["folder"].startswith(f"{results['baseline']}/")
        and ("-seed-" not in stage["folder"] or stage["folder"].endswith(first))
    ]


def pages(root: Path) -> list[Path]:
    """The pages that may show results."""
    return [root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("model_cards/*.md"))]


def fill(page: str, root: Path) -> str:
    """A page with its blocks filled from the results that they name."""

    def block(found: re.Match) -> str:
        return f"{found[1]}{summary(json.loads((root / found[2]).read_text(encoding='utf-8')))}\n{found[3]}"

    return BLOCK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, nargs="?", help="output_dir of the comparison")
    parser.add_argument("--name", help="folder in model_cards/")
    parser.add_argument("--license", help="licence of the weights, by its Hub name")
    parser.add_argument("--runs", nargs="+", default=[], help="folders in the comparison to write the cards of")
    arguments = parser.parse_args()
    if arguments.comparison is not None:
        name = arguments.name or arguments.comparison.resolve().name
        for card in publish(arguments.comparison, ROOT / "model_cards" / name, arguments.license, arguments.runs):
            print(card.relative_to(ROOT))
    for path in pages(ROOT):
        page = path.read_text(encoding="utf-8")
        if (filled := fill(page, ROOT)) != page:
            path.write_text(filled, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
