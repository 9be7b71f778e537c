"""What was tuned beside what it was tuned from: an adapter on its base, or a model beside its base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, ModelNotFoundError
from slimtune.models.load import LoadOptions, load_base, load_model
from slimtune.storage.foreign import reading_files
from slimtune.storage.hub import at_revision
from slimtune.storage.source import base_of, folder_of, is_adapter


@dataclass(frozen=True)
class Tuned:
    """A tuned model by its folder, and its base.

    Attributes:
        source: the folder of an adapter, or a model as `slimtune.load` takes it.
        base: the model that it was tuned from.
    """

    source: str
    base: str
    is_adapter: bool
    options: LoadOptions

    @classmethod
    def find(cls, source: str, base: str | None = None, **loading: Any) -> Tuned:
        """The tuned model with the base that is given, or else the one that its folder names.

        Args:
            loading: fields of `LoadOptions`.

        Raises:
            ModelNotFoundError: there is no such folder or packaged model.
            ConfigError: a fully tuned model that doesn't say what it was tuned from.
        """
        options = LoadOptions(**loading)
        if is_adapter(source):
            return cls(source, base or base_of(source), True, options)
        named = base or _named_base(Path(source))
        if named is None:
            raise ConfigError(
                f"{source} is a whole model and doesn't say which one it was tuned from; name that one with --base"
            )
        return cls(source, named, False, options)

    def load(self, adapter_name: str = "default") -> tuple[Any, Any]:
        """The tuned model, its adapter active under this name, and its tokenizer. Raises: as `slimtune.load`."""
        if not self.is_adapter:
            model, tokenizer = load_model(self.source, options=self.options)
        else:
            from slimtune.adapters.model import PeftModel

            model, tokenizer = load_base(self.source, self.base, self.options)
            model = PeftModel.from_pretrained(model, folder_of(self.source), adapter_name)
        if tokenizer is None:
            raise ModelNotFoundError(f"{self.source} has no tokenizer; save the tokenizer into the folder of the model")
        return model.eval(), tokenizer

    def load_base(self) -> Any:
        """The base of a whole model. Raises: as `slimtune.load`."""
        return load_model(self.base, options=self.options)[0].eval()


@reading_files()
def _named_base(folder: Path) -> str | None:
    """The base that the recipe or the card beside a tuned model names."""
    recipe, card = folder / "recipe.yaml", folder / "README.md"
    if recipe.is_file():
        from slimtune.storage.text_files import read_mapping

        try:
            section = read_mapping(recipe).get("model")
        except ConfigError as error:
            raise ConfigError(f"{error}, or pass --base") from error
        section = section if isinstance(section, dict) else {}
        named = section.get("name")
        if not isinstance(named, str):
            raise ConfigError(f"{recipe} doesn't name the model that was tuned; pass --base")
        return at_revision(named, section.get("revision"))
    if card.is_file():
        match = re.search(r"^base_model: (\S+)$|full fine-tune of `([^`]+)`", card.read_text("utf-8"), re.MULTILINE)
        return (match[1] or match[2]) if match else None
    return None
