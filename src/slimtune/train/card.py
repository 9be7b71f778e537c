"""The model card that is written beside an adapter or a fully tuned model."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slimtune.train.run import Outcome
from slimtune.train.settings import TrainSettings


@dataclass(frozen=True)
class Card:
    """What a card tells."""

    name: str
    base: str
    method: dict[str, Any]
    data: dict[str, Any]
    settings: TrainSettings
    outcome: Outcome

    def write(self, folder: Path) -> None:
        """Write README.md into `folder`."""
        (folder / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The card as Markdown with the metadata that the Hub reads."""
        is_adapter = self.method["method"] != "full"
        outcome = {
            "steps": self.outcome.steps,
            "tokens": f"{self.outcome.tokens:,}",
            "seconds": f"{self.outcome.seconds:.0f}",
            "tokens per second": f"{self.outcome.tokens_per_second:,.0f}",
            "loss of the last step": f"{self.outcome.final_loss:.4f}",
        }
        if self.outcome.eval_loss is not None:
            outcome["loss on held-out examples"] = f"{self.outcome.eval_loss:.4f}"
        versions = {name: version(name) for name in ("slimtune", "torch", "transformers")}
        sections = [
            _front_matter(self.base, is_adapter),
            f"# {self.name}\n\n{'An adapter for' if is_adapter else 'A full fine-tune of'} `{self.base}`.",
            "## How to load it\n\n" + (_loading_adapter(self.base) if is_adapter else _LOADING_FULL),
            "## Method\n\n" + _table(self.method),
            "## Data\n\n" + _table(self.data),
            "## Settings\n\n" + _table(vars(self.settings)),
            "## Result\n\n" + _table(outcome) + "\n\n![loss](loss.png)",
            "## Versions\n\n" + _table({"python": platform.python_version(), **versions}),
        ]
        return "\n\n".join(sections) + "\n"


def _front_matter(base: str, is_adapter: bool) -> str:
    # A folder of this machine means nothing to the Hub, and it refuses cards that name one.
    named = [] if Path(base).is_absolute() or base.startswith(".") else [f"base_model: {base}"]
    kind = (
        ["library_name: peft", "tags: [lora, slimtune]"]
        if is_adapter
        else ["library_name: transformers", "tags: [slimtune]"]
    )
    return "\n".join(["---", *named, *kind, "pipeline_tag: text-generation", "---"])


def _loading_adapter(base: str) -> str:
    def code(library: str) -> str:
        return (
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"from {library} import PeftModel\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
            "```"
        )

    shell = f"```shell\nslimtune chat {base} --adapter path/to/this/folder\n```"
    ours, theirs = code("slimtune"), code("peft")
    return f"With slimtune, on the command line:\n\n{shell}\n\nor in Python:\n\n{ours}\n\nWith peft:\n\n{theirs}"


_LOADING_FULL = (
    "```python\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
    'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
    "```"
)


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {key} | {_shown(value)} |" for key, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple, set)):
        return ", ".join(map(str, sorted(value)))
    return "-" if value is None else str(value).replace("|", "\\|")
