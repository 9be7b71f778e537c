"""P-tuning: virtual tokens that a small network computes while they are trained (Liu et al. 2021, arXiv:2103.10385).

h_0 = [f(Z); E(ids)],  Z (n, dim) trained, f an MLP or a bidirectional LSTM with an MLP on top
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import Tensor, nn

from slimtune.core.config import register
from slimtune.errors import ConfigError, check_whole, did_you_mean, listing
from slimtune.methods.prompt.prompt_tuning import EmbeddedPromptConfig


class PromptEncoderReparameterizationType(StrEnum):
    """The network f."""

    MLP = "MLP"
    LSTM = "LSTM"


@register
@dataclass
class PromptEncoderConfig(EmbeddedPromptConfig):
    """P-tuning; names, defaults and meanings are those of `peft.PromptEncoderConfig`.

    `encoder_hidden_size=None` is the width of the embeddings. Layers and dropout are those of the LSTM; the MLP has
    three layers.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "P_TUNING"
    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = list(PromptEncoderReparameterizationType)
        kind = self.encoder_reparameterization_type
        if kind not in kinds:
            near = did_you_mean(str(kind).upper(), kinds)
            raise ConfigError(f"encoder_reparameterization_type must be one of {listing(kinds)}, found {kind!r}{near}")
        check_whole("encoder_num_layers", self.encoder_num_layers)
        if self.encoder_hidden_size is not None:
            check_whole("encoder_hidden_size", self.encoder_hidden_size)
        if not 0 <= self.encoder_dropout < 1:
            raise ConfigError(f"encoder_dropout must lie in [0, 1), found {self.encoder_dropout!r}")
        for name, used in {
            "encoder_num_layers": self.encoder_num_layers != 2,
            "encoder_dropout": self.encoder_dropout,
        }.items():
            if kind == PromptEncoderReparameterizationType.MLP and used:
                raise ConfigError(f"{name} is for the LSTM, found it with an MLP; leave it out")

    def encoder(self, rows: int) -> nn.Module:
        """f with its inputs Z."""
        dim = self.token_dim or 0
        self.encoder_hidden_size = hidden = self.encoder_hidden_size or dim
        if self.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP:
            return PromptMlp(rows, dim, hidden)
        return PromptLstm(rows, dim, hidden, self.encoder_num_layers, self.encoder_dropout)


class PromptMlp(nn.Module):
    """P = W_3 relu(W_2 relu(W_1 Z + b_1) + b_2) + b_3, with Z and P (n, dim)."""

    def __init__(self, rows: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)
        widths = (nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim))
        self.mlp_head = nn.Sequential(widths[0], nn.ReLU(), widths[1], nn.ReLU(), widths[2])

    def forward(self) -> Tensor:
        return self.mlp_head(self.embedding.weight)


class PromptLstm(nn.Module):
    """P = W_2 relu(W_1 LSTM(Z) + b_1) + b_2, the LSTM bidirectional over the n virtual tokens."""

    def __init__(self, rows: int, dim: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)
        # torch drops between layers of an LSTM, and warns where there is but one.
        between = dropout if layers > 1 else 0.0
        # Not batch_first and without a batch: (n, dim) is one sequence of n steps; out come (n, 2 * hidden), both
        # directions.
        self.lstm_head = nn.LSTM(dim, hidden, layers, dropout=between, bidirectional=True)
        self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))

    def forward(self) -> Tensor:
        # The n rows of Z are the LSTM's time steps: a virtual token knows of those before and behind it.
        return self.mlp_head(self.lstm_head(self.embedding.weight)[0])
