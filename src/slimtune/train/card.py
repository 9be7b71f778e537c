"""The model card that is written beside an adapter or a fully tuned model."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.console.markdown import code, escaped
from slimtune.models.auto import BY_TASK
from slimtune.recipe.method import find
from slimtune.recipe.training import TrainSettings
from slimtune.storage.hub import at_revision
from slimtune.storage.model_card import CONSTRAINED, PIPELINES
from slimtune.storage.source import PACKAGED, id_on_hub
from slimtune.train.loop import Outcome
from slimtune.train.results import versions


@dataclass(frozen=True)
class Card:
    """The contents of a model card."""

    name: str
    base: str
    task_type: str
    method: dict[str, Any]
    data: dict[str, Any]
    settings: TrainSettings
    outcome: Outcome
    quantize: str | None = None
    """How the base was quantized while it was loaded."""
    revision: str | None = None
    """Of the base on the Hub; None for main."""

    def write(self, folder: Path) -> None:
        """Write README.md into `folder`."""
        (folder / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The card as Markdown with the metadata that the Hub reads."""
        sections = [
            self._front_matter(),
            f"# {escaped(self.name)}\n\n{'An adapter for' if self.is_adapter else 'A full fine-tune of'} "
            + code(self.base)
            + (f" at revision {code(self.revision)}." if self.revision else "."),
            "## How to load it\n\n" + self._loading(),
            "## Method\n\n" + _table(self.method),
            "## Data\n\n" + _table(self.data),
            "## Settings\n\n" + _table(vars(self.settings)),
            "## Result\n\n" + _table(self._result()) + "\n\n![loss](loss.png)",
            "## Versions\n\n" + _table(versions()),
        ]
        return "\n\n".join(sections) + "\n"

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter, and not a whole model."""
        return self.method["method"] != "full"

    @property
    def has_head(self) -> bool:
        """Whether it gives labels or tags by a head of its own, and doesn't write text."""
        return self.task_type in ("SEQ_CLS", "TOKEN_CLS")

    def _result(self) -> dict[str, Any]:
        result = {
            "steps": self.outcome.steps,
            "tokens": f"{self.outcome.tokens:,}",
            "seconds": f"{self.outcome.seconds:.0f}",
            "tokens per second": f"{self.outcome.tokens_per_second:,.0f}",
            "loss of the last step": f"{self.outcome.final_loss:.4f}",
        }
        if self.outcome.eval_loss is not None:
            result["loss on held-out examples"] = f"{self.outcome.eval_loss:.4f}"
        for name, value in self.outcome.scores.items():
            result[f"{name.replace('_f1', ' F1')} on held-out examples"] = f"{value:.3f}"
        return result

    def _front_matter(self) -> str:
        base = id_on_hub(self.base)
        # A folder of this machine means nothing to the Hub, and it refuses cards that name one.
        named = [] if Path(base).is_absolute() or base.startswith(".") else [f"base_model: {_as_yaml(base)}"]
        kind = (
            ["library_name: peft", f"tags: [{self.method['method']}, slimtune]"]
            if self.is_adapter
            else ["library_name: transformers", "tags: [slimtune]"]
        )
        return "\n".join(["---", *named, *kind, f"pipeline_tag: {PIPELINES[self.task_type]}", "---"])

    def _loading(self) -> str:
        auto = BY_TASK[self.task_type]
        if not self.is_adapter:
            return _python(
                f"from transformers import {auto}, AutoTokenizer\n",
                f'model = {auto}.from_pretrained("path/to/this/folder")',
                'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            )
        quantize = f', quantize="{self.quantize}"' if self.quantize else ""
        loading = _python("import slimtune\n", f'model, tokenizer = slimtune.load("path/to/this/folder"{quantize})')
        use = use_of(self.task_type, "path/to/this/folder", at_revision(self.base, self.revision))
        use += f" --quantize {self.quantize}" if self.quantize else ""
        text = f"With slimtune, on the command line:\n\n```shell\n{use}\n```\n\nor in Python:\n\n"
        return (
            text
            + "\n\nor on a base that is loaded already:\n\n".join([loading, self._attaching(auto, "slimtune")])
            + (f"\n\nWith peft:\n\n{self._attaching(auto, 'peft')}" if self._is_known_to_peft() else "")
            + (f"\n\n{CONSTRAINED.format(**self.method)}" if self.method.get("constraint") else "")
        )

    def _attaching(self, auto: str, library: str) -> str:
        is_packaged = self.base in PACKAGED
        names = f"{'AutoConfig, ' if self.has_head else ''}{auto}, AutoTokenizer"
        names += ", BitsAndBytesConfig" if self.quantize else ""
        head = ['config = AutoConfig.from_pretrained("path/to/this/folder")'] if self.has_head else []
        base = f"resolve({_quoted(self.base)})" if is_packaged else _quoted(self.base)
        revision = f", revision={_quoted(self.revision)}" if self.revision else ""
        return _python(
            f"from transformers import {names}",
            f"from {library} import PeftModel",
            *(["from slimtune.storage.source import resolve"] if is_packaged else []),
            "",
            *head,
            *([f"quantization = {_as_bitsandbytes(self.quantize)}"] if self.quantize else []),
            f"model = {auto}.from_pretrained({base}{', config=config' if head else ''}{revision}"
            f"{', quantization_config=quantization' if self.quantize else ''})",
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        )

    def _is_known_to_peft(self) -> bool:
        return find(self.method["method"]).in_peft and not self.method.get("constraint")


def _quoted(text: str) -> str:
    """Text as a string of Python or YAML, in double quotation marks, that can't end them or the line."""
    return json.dumps(text)


def _as_yaml(name: str) -> str:
    return name if re.fullmatch(r"[\w./-]+", name, re.ASCII) else _quoted(name)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _as_bitsandbytes(kind: str) -> str:
    if kind == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    return (
        f'BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant=True,\n'
        '    bnb_4bit_compute_dtype="bfloat16",\n)'
    )


def use_of(task_type: str, folder: str, base: str = "") -> str:
    """The command that puts what was trained to use; with a base, `folder` is its adapter."""
    if task_type in ("SEQ_CLS", "TOKEN_CLS"):
        return f"slimtune predict {folder} texts.jsonl"
    model = f"{shlex.quote(base)} --adapter {folder}" if base else folder
    return f'slimtune generate {model} "..."' if task_type == "SEQ_2_SEQ_LM" else f"slimtune chat {model}"


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {escaped(key)} | {escaped(_shown(value))} |" for key, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple, set)):
        return ", ".join(map(str, sorted(value)))
    return "-" if value is None else str(value)
