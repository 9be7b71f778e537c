"""What callers of `from_pretrained` and `load_adapter` pass besides: `peft`'s keywords and the Hub's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimtune.errors import ConfigError, warn

WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("dtype", "torch_dtype"), "an adapter is in float32 on a base of 16 bits, see autocast_adapter_dtype"
    ),
    **dict.fromkeys(
        ("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "offload_buffers"),
        "each tensor of an adapter lies on the device of the module that it changes",
    ),
    **dict.fromkeys(("torch_device", "ephemeral_gpu_offload"), "tensors go straight to the device of their module"),
    "trust_remote_code": "no code is read from an adapter's folder",
}
"""Keywords of `peft` that can have no meaning here, with the reason."""


@dataclass(frozen=True)
class ReadOptions:
    """How the file of an adapter is read.

    Attributes:
        key_mapping: expressions over the file's keys, and what to put in their place.
        ignore_mismatched_sizes: leave tensors of another shape alone.
        hub: what goes to the Hub's client.
    """

    key_mapping: Mapping[str, str] | None = None
    ignore_mismatched_sizes: bool = False
    hub: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ReadOptions:
        """The options among a caller's keywords; those without effect are warned of if they are set.

        Raises:
            ConfigError: `use_safetensors=False`.
        """
        left = dict(options)
        left.pop("low_cpu_mem_usage", None)  # which is how an adapter is always read
        if left.pop("use_safetensors", None) is False:
            raise ConfigError(
                "use_safetensors=False asks for a pickle, which can run code when it is read; adapters are read from "
                "safetensors alone"
            )
        # The older name of `token`, which scripts for `peft` still pass.
        auth = left.pop("use_auth_token", None)
        if auth is not None:
            left.setdefault("token", auth)
        for name in [name for name in left if name in WITHOUT_EFFECT]:
            if left.pop(name) not in (None, False):
                warn(f"{name} has no effect on loading an adapter: {WITHOUT_EFFECT[name]}")
        mapping, any_shape = left.pop("key_mapping", None), bool(left.pop("ignore_mismatched_sizes", False))
        return cls(mapping, any_shape, left)
