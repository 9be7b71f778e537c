"""What GGUF calls each architecture, its settings and its tensors, and how the numbers in them are ordered.

A row says what llama.cpp computes for an architecture. A model whose config says anything else is refused by the
field's name: a file that runs and answers differently is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import ConfigError, listing

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF.

    Attributes:
        name: what GGUF calls it.
        activations: those that llama.cpp computes for it, by their names in a config.
        describe: its settings, without the name in front.
        check: refuses a config that llama.cpp would compute differently.
        is_permuted: whether the rows of q and k go from halves, as transformers rotates them, to pairs.
        transposed: the modules whose weights are (in, out) in transformers.
        norm_offset: what is added to the weights of the norms.
        left_out: tensors that the format has no place for and that its answers don't need.
        needs_head: whether a head that is tied to the embedding is written all the same.
    """

    name: str
    activations: frozenset[str]
    describe: Callable[[Any], Metadata]
    check: Callable[[Any], None] = lambda config: None
    is_permuted: bool = False
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
    left_out: re.Pattern[str] = field(default=re.compile(r"(?!)"))
    needs_head: bool = False


@dataclass(frozen=True)
class Place:
    """Where a tensor of transformers stands in the file, and in which form."""

    name: str
    heads: int = 0
    is_transposed: bool = False
    offset: float = 0.0

    def rows(self, count: int) -> Tensor | None:
        """For each row of the file the row of transformers; None where they are the same."""
        if not self.heads:
            return None
        # Of each head, transformers rotates row i with row i + half, and llama.cpp row 2i with 2i + 1.
        # Row h * d + p * d/2 + i (half p, pair i) goes to h * d + 2 i + p.
        return torch.arange(count).view(self.heads, 2, -1).transpose(1, 2).reshape(-1)

    def to_file(self, tensor: Tensor) -> Tensor:
        """The tensor as the file has it."""
        tensor = tensor.T if self.is_transposed else tensor
        rows = self.rows(len(tensor))
        tensor = tensor if rows is None else tensor[rows.to(tensor.device)]
        return tensor + self.offset if self.offset else tensor

    def from_file(self, tensor: Tensor) -> Tensor:
        """The tensor as transformers has it."""
        rows = self.rows(len(tensor))
        tensor = tensor if rows is None else tensor[rows.argsort()]
        tensor = tensor - self.offset if self.offset else tensor
        return tensor.T if self.is_transposed else tensor


def architecture_of(model: Any) -> Architecture:
    """The row for a model of transformers. Raises: ConfigError, with those that there are."""
    return architecture_named(_class_name(model), model.config)


def architecture_named(class_name: str, config: Any) -> Architecture:
    """The row for a class of transformers with this config. Raises: ConfigError."""
    if class_name not in ARCHITECTURES:
        raise ConfigError(
            f"GGUF of a {class_name} is not known here ({listing(ARCHITECTURES, 20)} are); convert it by llama.cpp's "
            "own script with --converter llama.cpp/convert_hf_to_gguf.py"
        )
    architecture = ARCHITECTURES[class_name]
    # Some configs have both names for it.
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = activation or getattr(config, "activation_function", None)
    _require("the activation", activation, *architecture.activations)
    architecture.check(config)
    return architecture


def places_of(architecture: Architecture, config: Any, names: list[str]) -> dict[str, Place]:
    """The place of each tensor, by its name in transformers.

    Raises ConfigError, for tensors that the format has no place for.
    """
    import gguf

    known = gguf.get_tensor_name_map(_enum_of(architecture), config.num_hidden_layers)
    places, strangers = {}, []
    for name in names:
        if architecture.left_out.search(name):
            continue
        module, _, parameter = name.rpartition(".")
        base = known.get_name(module) or known.get_name(re.sub(r"^(model|bert|transformer)\.", "", module))
        if base is None or parameter not in ("weight", "bias"):
            strangers.append(name)
            continue
        heads = 0
        if architecture.is_permuted and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
        is_matrix = parameter == "weight"
        places[name] = Place(
            f"{base}.{parameter}",
            heads,
            is_matrix and module.endswith(architecture.transposed or ("\0",)),
            architecture.norm_offset if is_matrix and module.endswith("norm") else 0.0,
        )
    if strangers:
        raise ConfigError(
            f"GGUF's {architecture.name} has no place for {listing(strangers, 4)}; merge an adapter first, and leave "
            "out what was added to the architecture"
        )
    return places


def rope_factors(architecture: Architecture, config: Any) -> dict[str, Tensor]:
    """Tensors that say by what each rotation is slowed down, where the config asks for that."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        steps = torch.arange(0, 2 * len(slowed), 2, dtype=torch.float32) / (2 * len(slowed))
        # llama.cpp divides its own frequencies theta^(-2i/d) by these factors: (d / 2,) of plain over slowed.
        return {"rope_freqs.weight": rope["rope_theta"] ** -steps / slowed}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}


_WINDOWED = ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3")


def context_limit(config: Any) -> int | None:
    """The window of a model that looks back no further, where llama.cpp would; None where it looks at everything."""
    window = getattr(config, "sliding_window", None)
    is_used = getattr(config, "use_sliding_window", True)
    if window and is_used and config.model_type in _WINDOWED:
        return window if window < config.max_position_embeddings else None
    return None


def _class_name(model: Any) -> str:
    # An adapted model is a class made of its own.
    return next(
        (kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")),
        type(model).__name__,
    )


def _enum_of(architecture: Architecture) -> Any:
    import gguf

    return next(enum for enum, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)


def _require(what: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        raise ConfigError(
            f"llama.cpp computes this architecture with {what} {listing(map(str, allowed))} alone, and the model's "
            f"config says {value}; it can't be written as GGUF"
        )


def _rope(config: Any) -> dict[str, Any]:
    """The settings of the rotations; those of full attention where there are two kinds of layers."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention", rope))


def _sizes(config: Any) -> Metadata:
    return {
        "block_count": config.num_hidden_layers,
        "context_length": context_limit(config) or config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }


def _decoder(config: Any) -> Metadata:
    """What decoders with RMS norms and rotations have in common."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = _rope(config)
    settings = _sizes(config) | {
        "vocab_size": config.vocab_size,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        settings |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        settings["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return settings


def _check_decoder(config: Any) -> None:
    rope = _rope(config)
    _require("the rope type", rope.get("rope_type", "default"), "default", "linear", "yarn", "llama3")
    _require("a part of each head rotated,", rope.get("partial_rotary_factor", 1.0), 1.0)
    # The rest of YaRN has the values that llama.cpp computes with.
    for name, usual in {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None}.items():
        if rope.get("rope_type") == "yarn":
            _require(f"YaRN's {name}", rope.get(name) or usual, usual)


def _mixtral(config: Any) -> Metadata:
    return _decoder(config) | {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


def _qwen3_moe(config: Any) -> Metadata:
    return _decoder(config) | {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _check_qwen3_moe(config: Any) -> None:
    _check_decoder(config)
    _require("norm_topk_prob", config.norm_topk_prob, True)
    _require("decoder_sparse_step", config.decoder_sparse_step, 1)
    _require("mlp_only_layers", list(config.mlp_only_layers), [])


def _gemma3(config: Any) -> Metadata:
    rope = dict(config.rope_parameters)
    settings = _decoder(config) | {"attention.sliding_window": config.sliding_window}
    return settings | {"rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}


def _check_gemma3(config: Any) -> None:
    _check_decoder(config)
    # Five layers with a window and one without, in turn: that is compiled in, and no key of the file says otherwise.
    expected = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    _require("layers that look back", ", ".join(config.layer_types), ", ".join(expected))
    largest = config.num_hidden_layers == 62
    # llama.cpp scales Gemma 3's queries by the head's width, but for the 27B, which it tells by its 62 layers.
    scale = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    _require("query_pre_attn_scalar", config.query_pre_attn_scalar, scale)
    _require("final_logit_softcapping", config.final_logit_softcapping, None)
    _require("attn_logit_softcapping", config.attn_logit_softcapping, None)


def _phi2(config: Any) -> Metadata:
    size = config.hidden_size // config.num_attention_heads
    rope = _rope(config)
    return _sizes(config) | {
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }


def _check_phi2(config: Any) -> None:
    _require("the rope type", _rope(config).get("rope_type", "default"), "default")
    _require("qk_layernorm", config.qk_layernorm, False)


def _phi3(config: Any) -> Metadata:
    rope = _rope(config)
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    settings = _decoder(config) | {
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings", original),
        "attention.sliding_window": config.sliding_window or 0,
    }
    if rope.get("rope_type") == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        settings["rope.scaling.attn_factor"] = float(ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))[1])
    return settings


def _check_phi3(config: Any) -> None:
    _require("the rope type", _rope(config).get("rope_type", "default"), "default", "longrope")


def _gpt2(config: Any) -> Metadata:
    settings = _sizes(config) | {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    return settings | ({"feed_forward_length": config.n_inner} if config.n_inner else {})


def _check_gpt2(config: Any) -> None:
    _require("scale_attn_weights", config.scale_attn_weights, True)
    _require("scale_attn_by_inverse_layer_idx", config.scale_attn_by_inverse_layer_idx, False)


def _bert(config: Any) -> Metadata:
    return _sizes(config) | {
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "attention.causal": False,
        # 1 is the mean over the tokens, what sentence embeddings are; llama.cpp's --pooling takes another.
        "pooling_type": 1,
    }


def _check_bert(config: Any) -> None:
    _require("is_decoder", config.is_decoder, False)


_SWIGLU = frozenset(("silu", "swish"))
# llama.cpp has the approximation by a tanh for all kinds of GELU.
_GELU = frozenset(("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"))

_LLAMA = Architecture("llama", _SWIGLU, _decoder, _check_decoder, is_permuted=True)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", _SWIGLU, _decoder, _check_decoder),
    "Qwen3ForCausalLM": Architecture("qwen3", _SWIGLU, _decoder, _check_decoder),
    "MixtralForCausalLM": Architecture("llama", _SWIGLU, _mixtral, _check_decoder, is_permuted=True),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", _SWIGLU, _qwen3_moe, _check_qwen3_moe),
    "Gemma3ForCausalLM": Architecture(
        "gemma3", frozenset(("gelu_pytorch_tanh",)), _gemma3, _check_gemma3, norm_offset=1.0
    ),
    "PhiForCausalLM": Architecture("phi2", _GELU, _phi2, _check_phi2, needs_head=True),
    "Phi3ForCausalLM": Architecture("phi3", _SWIGLU, _phi3, _check_phi3),
    "GPT2LMHeadModel": Architecture(
        "gpt2", _GELU, _gpt2, _check_gpt2, transposed=("c_attn", "c_fc", "c_proj"),
        left_out=re.compile(r"\.attn\.(masked_)?bias$"),
    ),
    "BertModel": Architecture("bert", _GELU, _bert, _check_bert, left_out=re.compile(r"pooler|position_ids")),
}  # fmt: skip
"""By the class of transformers."""
