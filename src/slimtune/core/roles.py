"""What a module does in its block, told from its path: the names that models agree on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

Role = Literal["query", "key", "value", "query_key_value", "attention_out", "feed_forward_in", "feed_forward_out"]
"""The linear layers of a transformer block; `query_key_value` is several in one (two, in GPT-2's cross-attention)."""

# A feed-forward may lie inside of what is called attention: diffusers' UNet lists its transformers as `attentions`.
_ATTENTION = re.compile(
    r"(^|[._])(\w*attn\w*|\w*attention\w*)\.(?!(.*\.)?(ffn?|mlp|feed_?forward)(_\w+)?\.)", re.IGNORECASE
)

_IN_ATTENTION: Mapping[Role, str] = {
    # Read with the ending of the path alone: Llama's q_proj, GPT-2's c_attn, DistilBERT's q_lin, diffusers' to_q.
    "query": "q|query|q_proj|query_proj|q_lin|q_attn|to_q|wq|add_q_proj",
    "key": "k|key|k_proj|key_proj|k_lin|to_k|wk|add_k_proj",
    "value": "v|value|v_proj|value_proj|v_lin|to_v|wv|add_v_proj",
    "query_key_value": "c_attn|query_key_value|qkv|qkv_proj|Wqkv|in_proj|to_qkv",
    "attention_out": r"o|o_proj|out_proj|c_proj|dense|out_lin|to_out\.0|to_add_out|wo|Wo|proj|projection",
}
_IN_FEED_FORWARD: Mapping[Role, str] = {
    "feed_forward_in": (
        r"gate_proj|up_proj|gate_up_proj|fc1|fc_in|c_fc|wi|Wi|wi_0|wi_1|w1|w3|lin1|linear1|dense_h_to_4h|ffn"
        r"|intermediate\.dense|intermediate_dense|net\.0\.proj|proj_mlp"
    ),
    # Flux's single blocks have one projection out of attention and feed-forward together.
    "feed_forward_out": (
        r"down_proj|fc2|fc_out|c_proj|wo|Wo|w2|lin2|linear2|dense_4h_to_h|ffn_output|output\.dense|output_dense"
        r"|net\.2|single_transformer_blocks\.\d+\.proj_out"
    ),
}

_GATE = re.compile(r"(^|_)gate(_|$)|^wi_0$|^Wi$|^w1$")


def has_gate(module: Any) -> bool:
    """Whether one of the module's own parts is called as the projection before a gate is."""
    return any(_GATE.search(name) for name in (*module._modules, *module._parameters))


def role_of(path: str) -> Role | None:
    """The role of the linear layer at this path in its block, or None where the name doesn't say."""
    # GPT-2 calls the output of both parts c_proj, and T5 both wo and o: only the parent tells which it is.
    roles = _IN_ATTENTION if _ATTENTION.search(path) else _IN_FEED_FORWARD
    return next((role for role, names in roles.items() if re.search(rf"(^|\.)({names})$", path)), None)


def input_embeddings(model: Any) -> Any:
    """The module that looks the model's token ids up, or None."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        return getter() if getter else None
    except NotImplementedError:  # a model that doesn't start from token ids
        return None


def recomputes(model: Any) -> bool:
    """Whether the model's layers are checkpointed: computed again in the backward pass."""
    # transformers 5.2x renamed the flag and warns of the old name, which older versions and diffusers have alone.
    current = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if current is None else current)
