"""The `README.md` beside an adapter, with the metadata by which the Hub shows it under its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimtune.storage.atomic import staged_file

PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
"""What the Hub calls each task."""

_TEXT = """
# An adapter

The file holds an adapter by {methods} alone; it needs its base model{base}.

```python
from slimtune import AutoPeftModel

model = AutoPeftModel.from_pretrained("the folder or id of this adapter")
```
"""
_IN_PEFT = "\n`peft` reads the format, too.\n"

CONSTRAINED = (
    "What it was trained as is its merged weight, held to a constraint: {constraint}. slimtune alone takes it as an "
    "adapter; every other program takes the model that `slimtune merge` writes, which is the very same."
)


def write_model_card(
    folder: Path,
    base: str | None,
    methods: Sequence[str],
    task_type: str | None,
    in_peft: bool,
    constraint: str = "",
) -> None:
    """Write the card of an adapter; of one that is there the text stays, and what its metadata says.

    Args:
        base: the Hub id of the base model; a path on this machine is left out, and so is what can be no id.
        in_peft: whether `peft` has the methods.
        constraint: what the merged weights are held to, in words; empty for nothing.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / "README.md"
    on_hub = base if base and _is_hub_id(base) and not Path(base).exists() else None
    if path.is_file():
        try:
            card = ModelCard(path.read_text(encoding="utf-8"))
        except ValueError:  # metadata that is no YAML is its author's to mend
            return
    else:
        text = _TEXT.format(methods=", ".join(methods), base=f", `{on_hub}`" if on_hub else "")
        text += f"\n{CONSTRAINED.format(constraint=constraint)}\n" if constraint else _IN_PEFT if in_peft else ""
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n{text}")
    tags = {method.lower() for method in methods} | {"slimtune"}
    tags |= {f"base_model:adapter:{on_hub}"} if on_hub else set()
    data: Any = card.data
    data.tags = sorted({*(data.tags or []), *tags})
    for name, value in (
        ("library_name", "peft" if in_peft else "slimtune"),
        ("base_model", on_hub),
        ("pipeline_tag", PIPELINES.get(str(task_type))),
    ):
        if value is not None and getattr(data, name, None) is None:
            setattr(data, name, value)
    with staged_file(path) as pending:
        pending.write_text(str(card), encoding="utf-8")


def _is_hub_id(name: str) -> bool:
    """Whether a name may stand in the card: a file of a stranger can name anything, Markdown and line breaks too."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
