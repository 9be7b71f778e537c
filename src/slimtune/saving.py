"""The adapters of a model written to disk alone, and their tensors by the names that they have there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from slimtune.adapter import adapter_tensors, attached, fill
from slimtune.carrying import Carrying
from slimtune.errors import ConfigError
from slimtune.storage.checkpoint import is_checkpoint, offer_to_trainer
from slimtune.storage.peft_format import KEY_PREFIX, save_adapter


class Saving(Carrying):
    """What a `PeftModel` writes in place of the model's own weights."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write the adapters alone: `default` into the folder, others into subfolders of their names.

        Args:
            state_dict: the model's gathered tensors, where they are sharded.
            hub: what transformers' `push_to_hub` takes.

        Raises:
            AdapterFileError: the disk didn't take it; what was there is unharmed.
        """
        if not safe_serialization:
            raise ConfigError(
                "safe_serialization=False would write a pickle, which can run code when it is read; adapters are "
                "always written as safetensors"
            )
        _check_embeddings(save_embedding_layers)
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._check_known(*names)
        for name in names:
            # Gathering sharded tensors takes part of every process.
            tensors = adapter_tensors(self, name, state_dict)
            if is_main_process:
                save_adapter(Path(save_directory, "" if name == "default" else name), self._stored(name), tensors)
        if is_main_process and is_checkpoint(save_directory) and self.active_adapter in names:
            active = self.active_adapter
            offer_to_trainer(save_directory, Path(save_directory, "" if active == "default" else active))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As the model's own; an adapter's tensors by their names on disk go into the active adapter.

        That is how transformers' Trainer resumes. Raises: BaseMismatchError.
        """
        stored = adapter_tensors(self, self.active_adapter) if "prompt_embeddings" in state_dict else {}
        if state_dict and all(name.startswith(KEY_PREFIX) or name in stored for name in state_dict):
            set_peft_model_state_dict(self, state_dict, self.active_adapter)
            return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]

    def _stored(self, name: str) -> dict[str, Any]:
        """The config of an adapter as it is stored."""
        fields = self.peft_config[name].stored_fields() | {"inference_mode": True}
        if fields["task_type"] is None:
            own = self.adopted_from
            fields["auto_mapping"] = {"base_model_class": own.__name__, "parent_library": own.__module__}
        return fields


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter by their names on disk. Raises: AdapterNotFoundError, ConfigError."""
    _check_embeddings(save_embedding_layers)
    model._check_known(adapter_name)
    return adapter_tensors(model, adapter_name, state_dict)


def set_peft_model_state_dict(
    model: Any, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Copy tensors, by their names on disk, into an adapter. Raises: AdapterNotFoundError, BaseMismatchError."""
    model._check_known(adapter_name)
    fill(attached(model, adapter_name), peft_model_state_dict, "the state dict")


def _check_embeddings(save_embedding_layers: str | bool) -> None:
    if save_embedding_layers not in ("auto", False):
        raise ConfigError(
            "to save an embedding, train it: put it into modules_to_save; found "
            f"save_embedding_layers={save_embedding_layers!r}"
        )
