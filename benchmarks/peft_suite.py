"""How much of `peft`'s own test suite passes with slimtune in its place: `python -m benchmarks.peft_suite TESTS`.

TESTS is the `tests` folder of a checkout of `peft`, of the version that is installed. A random sample of its tests runs
with `peft`; those that pass run again with every public name of slimtune put in the place of `peft`'s. Nothing else is
changed and no test is treated on its own. A test of a method that slimtune hasn't is left out, which is seen by the
configs that it makes; so is a test that doesn't pass here with `peft` itself, most of them for want of the Hub.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from scipy.stats import binomtest

import slimtune
from benchmarks.machine import PACKAGES, installed, today
from slimtune.core.config import methods

LATE = ("peft.helpers", "peft.utils.hotswap", "peft.utils.save_and_load", "peft.utils.loftq_utils")
"""Modules that tests import names from and that `import peft` leaves out."""
FROM_THE_HUB = ("test_decoder_models.py", "test_encoder_decoder_models.py", "test_feature_extraction_models.py",
                "test_seq_classifier.py")  # fmt: skip
"""Files all of whose tests load models from the Hub."""
KEPT = {"PeftType", "PEFT_TYPE_TO_CONFIG_MAPPING", "parts"}
"""Names that stay `peft`'s: its test files need tables of all its methods to be read; `parts` means another thing."""
OURS = {config.__name__ for config in methods().values()}
FOREIGN = {config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()} - OURS
"""The configs of methods that slimtune hasn't."""


def put_in_place() -> None:
    """Each public name of slimtune in the place of the same name in all modules of `peft`."""
    for module in LATE:
        importlib.import_module(module)
    ours = {name: getattr(slimtune, name) for name in dir(slimtune) if name[0] != "_" and name not in KEPT}
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "peft":
            for name in ours.keys() & vars(module).keys():
                setattr(module, name, ours[name])


class Recorder:
    """A plugin of pytest: chooses the tests and writes a line of JSON for each that has run."""

    def __init__(self, output: Path, chosen: set[str] | None, sample: int, seed: int) -> None:
        self.output, self.chosen, self.sample, self.seed = output, chosen, sample, seed
        self.done = set(read(output))
        self.foreign: set[str] = set()
        original = PeftConfigMixin.__post_init__

        def noted(config: Any) -> None:
            self.foreign |= {type(config).__name__} & FOREIGN
            original(config)

        PeftConfigMixin.__post_init__ = noted

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.chosen is None:
            known = sorted(item.nodeid for item in items if not any(name in item.nodeid for name in FOREIGN))
            self.chosen = set(random.Random(self.seed).sample(known, min(self.sample, len(known))))
            print(f"{len(items)} tests, {len(known)} without a foreign method in their names, {len(self.chosen)} drawn")
        items[:] = [item for item in items if item.nodeid in self.chosen - self.done]

    def pytest_runtest_logstart(self) -> None:
        self.outcome, self.why, self.foreign = "passed", "", set()

    def pytest_runtest_setup(self, item: Any) -> None:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        self.foreign |= {type(value).__name__ for value in parameters} & FOREIGN  # made while tests were collected

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped or (report.failed and self.outcome == "passed"):
            self.outcome = report.outcome
            crash = getattr(report.longrepr, "reprcrash", None)
            self.why = f"{crash.path}:{crash.lineno}: {crash.message}" if crash else str(report.longrepr)[-500:]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        line = {"test": nodeid, "outcome": self.outcome, "foreign": sorted(self.foreign), "why": self.why}
        with self.output.open("a") as file:
            print(json.dumps(line), file=file)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file of results by their tests."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {line["test"]: line for line in lines}


def interval(passed: int, total: int) -> tuple[float, float]:
    """Wilson's interval of 95% for a share."""
    shares = binomtest(passed, total).proportion_ci(method="wilson")
    return shares.low, shares.high


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the tests folder of a checkout of peft")
    parser.add_argument("--sample", type=int, default=300, help="how many tests are drawn (300)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--output", type=Path, default=Path("peft-suite"), help="folder of the results; what it holds "
                        "isn't run again")  # fmt: skip
    parser.add_argument("--files", nargs="*", default=[], help="test files to draw from (all but those of the Hub)")
    parser.add_argument("--library", choices=("peft", "slimtune"), help="run this one alone, in this process")
    return parser.parse_args()


def run_tests(asked: argparse.Namespace) -> int:
    """One run of pytest in this process: the sample with `peft`, or what passed there with slimtune."""
    asked.output.mkdir(parents=True, exist_ok=True)
    tests, output = asked.tests.resolve(), asked.output.resolve()
    chosen = None
    if asked.library == "slimtune":
        put_in_place()
        chosen = {test for test, line in read(output / "peft.jsonl").items() if is_counted(line)}
    files = asked.files or sorted(path.name for path in tests.glob("test_*.py") if path.name not in FROM_THE_HUB)
    os.chdir(tests.parent)
    recorder = Recorder(output / f"{asked.library}.jsonl", chosen, asked.sample, asked.seed)
    quiet = ("-q", "--tb=short", "--no-header", "-p", "no:cacheprovider", "-W", "ignore")
    quiet += ("--continue-on-collection-errors",)  # of files whose own dependencies aren't installed
    return pytest.main([*quiet, *(f"{tests.name}/{file}" for file in files)], plugins=[recorder])


def is_counted(line: dict[str, Any]) -> bool:
    """Whether a test passes with `peft` and uses no method that slimtune hasn't."""
    return line["outcome"] == "passed" and not line["foreign"]


def main() -> None:
    asked = options()
    if asked.library:
        sys.exit(run_tests(asked))
    for library in ("peft", "slimtune"):
        # Tests must not wait for the Hub: a port where nothing listens refuses at once.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        command = [sys.executable, "-m", "benchmarks.peft_suite", *sys.argv[1:], "--library", library]
        subprocess.run(command, env=environment, check=False)
    with_peft, with_slimtune = read(asked.output / "peft.jsonl"), read(asked.output / "slimtune.jsonl")
    counted = [test for test, line in with_peft.items() if is_counted(line) and test in with_slimtune]
    failed = [with_slimtune[test] for test in counted if with_slimtune[test]["outcome"] != "passed"]
    for why, count in Counter(line["why"].splitlines()[0] for line in failed).most_common():
        print(f"{count:4}  {why}")
    total, passed = len(counted), len(counted) - len(failed)
    low, high = interval(passed, total)
    versions = {name: installed(name) for name in PACKAGES}
    print(f"{today()}, {versions}: {len(with_peft)} tests, of which {total} count")
    print(f"{passed} pass with slimtune in peft's place: {passed / total:.1%} ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
