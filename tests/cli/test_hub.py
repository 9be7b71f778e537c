"""Models, data and adapters by id, through a server that speaks the Hub's API, into a cache of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from small_hub import commit_of, serving
from small_text_model import orders, save_base, tiny_model, tiny_tokenizer, write_lines

SCRIPT = Path(__file__).with_name("through_a_hub.py")
QUESTION = "I want two teas"
FAST = ["--max-steps", "6", "--batch-size", "4", "--lr", "0.03", "model.device=cpu"]


@dataclass(frozen=True)
class Outcome:
    """What each command came to, by its name here."""

    results: dict[str, dict[str, Any]]
    tuned: Path
    cache: Path
    root: Path

    def printed(self, name: str) -> str:
        """What a command that went well wrote to standard output."""
        found = self.results[name]
        assert found["exit_code"] == 0, found["stderr"]
        return found["stdout"]

    def sentence(self, name: str) -> str:
        """The one sentence that a command which was refused said."""
        found = self.results[name]
        assert found["exit_code"] == 2, found
        said = [line for line in found["stderr"].splitlines() if line.startswith("slimtune: ")]
        assert len(said) == 1, found["stderr"]
        assert "Traceback" not in found["stderr"]
        return said[0]


def commands(tuned: Path) -> dict[str, list[str]]:
    ask = ["--max-new-tokens", "8", "--device", "cpu"]
    return {
        "train": ["train", "small/base", "small/rows", "model.revision=v1", "--output", str(tuned), *FAST],
        "info of a model": ["info", "small/base@v1", "--json"],
        "info of an adapter": ["info", "small/tuned", "--json"],
        "asked by id": ["generate", "small/tuned", QUESTION, *ask],
        "asked by folder": ["generate", str(tuned), QUESTION, *ask],
        "asked on its base": ["generate", "small/base@v1", QUESTION, "--adapter", "small/tuned", *ask],
        "preview": ["data", "preview", "small/rows", "--model", "small/other", "--json"],
        "streamed": [
            "train", "small/base", "small/rows", "--output", f"{tuned}-streamed", *FAST, "data.streaming=true",
        ],
        "rows at v1": [
            "train", "small/base", "small/rows", "--output", f"{tuned}-v1", *FAST,
            "data.train=[{path: small/rows, revision: v1}]",
        ],
        "no model": ["train", "small/nothing", "small/rows", "-o", "x"],
        "no adapter": ["generate", "small/base", QUESTION, "--adapter", "small/nothing"],
        "no revision": ["train", "small/base", "small/rows", "model.revision=v9", "-o", "x"],
        "no data": ["train", "small/base", "small/nothing", "-o", "x"],
        "no split": ["train", "small/base", "small/rows", "-o", "x", "data.held_out=[{path: small/rows, split: tset}]"],
        "no weights": ["train", "small/other", "small/rows", "-o", "x"],
        "info of nothing": ["info", "small/nothing"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("hub")
    root, cache = folder / "served", folder / "cache"
    models, rows = root / "models" / "small", root / "datasets" / "small" / "rows"
    save_base(models / "base" / "main")
    save_base(models / "base" / "v1", seed=7)
    tiny_model().config.save_pretrained(models / "other" / "main")
    tiny_tokenizer().save_pretrained(models / "other" / "main")
    (models / "other" / "main" / "pytorch_model.bin").write_bytes(b"pickled")
    for revision, count in (("main", 24), ("v1", 12)):
        (rows / revision).mkdir(parents=True)
        write_lines(rows / revision / "train.jsonl", *({"messages": e.messages()} for e in orders(count)))
    wanted = commands(models / "tuned" / "main")
    (folder / "commands.json").write_text(json.dumps(list(wanted.values())))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
    }
    with serving(root) as address:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(folder / "commands.json"), str(folder / "results.json"), "small/tuned"],
            capture_output=True, text=True, timeout=240, check=False, cwd=folder,
            env={**environment, "HF_ENDPOINT": address, "HF_HOME": str(cache), "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")]))},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    results = dict(zip(wanted, json.loads((folder / "results.json").read_text()), strict=True))
    return Outcome(results, models / "tuned" / "main", cache, root)


def test_a_run_takes_model_and_data_from_the_hub_at_the_revision(outcome: Outcome) -> None:
    said = outcome.printed("train")
    assert "small/rows: format messages, 24 rows" in said
    stored = json.loads((outcome.tuned / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("small/base", "v1")
    card = (outcome.tuned / "README.md").read_text()
    assert "base_model: small/base\n" in card
    assert "An adapter for `small/base` at revision `v1`." in card
    assert 'from_pretrained("small/base", revision="v1")' in card
    assert json.loads((outcome.tuned / "results.json").read_text())["revision"] == "v1"
    assert "  revision: v1\n" in (outcome.tuned / "recipe.yaml").read_text()


def test_an_adapter_by_id_brings_the_revision_of_its_base(outcome: Outcome) -> None:
    """The base at v1 is another model than that of main."""
    asked = outcome.printed("asked by id")
    assert asked == outcome.printed("asked by folder") == outcome.printed("asked on its base")
    assert asked.strip()


def test_python_loads_by_id_as_peft_does(outcome: Outcome) -> None:
    logits = load_file(outcome.cache / "logits.safetensors")
    assert logits["slimtune.load"].equal(logits["AutoPeftModelForCausalLM"])
    assert (logits["slimtune.load"] - logits["peft"]).abs().max() < 1e-4
    assert not logits["slimtune.load"].equal(logits["base"])


def test_info_reads_headers_alone(outcome: Outcome) -> None:
    model = json.loads(outcome.printed("info of a model"))
    assert model["parameters"] == sum(p.numel() for p in tiny_model().state_dict().values())
    adapter = json.loads(outcome.printed("info of an adapter"))
    assert (adapter["base"], adapter["revision"], adapter["method"]) == ("small/base", "v1", "LoRA")


def test_what_needs_no_weights_fetches_none(outcome: Outcome) -> None:
    assert json.loads(outcome.printed("preview"))["unit"] == "tokens"
    snapshot = outcome.cache / "hub" / "models--small--other" / "snapshots"
    (folder,) = snapshot.iterdir()
    assert folder.name == commit_of(outcome.root / "models" / "small" / "other" / "main")
    assert not list(folder.glob("*.safetensors"))
    assert not list(folder.glob("*.bin"))


def test_data_of_the_hub_streams_and_has_revisions(outcome: Outcome) -> None:
    assert "small/rows: format messages, streamed" in outcome.printed("streamed")
    assert "small/rows: format messages, 12 rows" in outcome.printed("rows at v1")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no model", "no model 'small/nothing': it is neither a folder nor a packaged name, and the Hub has none"),
        ("no adapter", "no model 'small/nothing'"),
        ("no revision", "'small/base' has no revision 'v9' on the Hub"),
        ("no data", "small/nothing"),
        ("no split", "tset"),
        ("no weights", "no safetensors weights"),
        ("info of nothing", "no model 'small/nothing'"),
    ],
)
def test_what_is_not_there_is_told_in_a_sentence(name: str, said: str, outcome: Outcome) -> None:
    assert said in outcome.sentence(name)
