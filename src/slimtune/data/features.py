"""Feature-based tuning: a linear classifier on what a frozen model makes of each text.

f = pool(model(x)) in R^D,  p(label | x) = softmax(W f + b)

The model runs once over each text: its features are kept on disk. Without backward passes this is the cheapest
tuning there is (the feature-based approach of Devlin et al. 2018, arXiv:1810.04805, section 5.3).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slimtune.data.rows import Text
from slimtune.data.texts import longest_input, tokenize
from slimtune.errors import (
    AdapterFileError,
    ConfigError,
    DataError,
    check_choice,
    check_number,
    check_whole,
    first_line,
    require,
    warn,
)
from slimtune.storage.atomic import staged_file
from slimtune.storage.permissions import write_tensors
from slimtune.storage.text_files import read_json

POOLINGS, SOLVERS = ("mean", "cls", "last"), ("sklearn", "torch")
CLASSIFIER, WEIGHTS = "features.json", "classifier.safetensors"


@dataclass
class FeatureTuning:
    """How features are made and a classifier is trained on them.

    Attributes:
        pooling: the mean over the tokens, the first token ("cls") or the last one, which is what a decoder wants.
        solver: of the same problem: scikit-learn, or torch where that is not installed.
        strength: C of scikit-learn, the inverse of the penalty on W.
        max_iter: the most iterations of L-BFGS.
    """

    pooling: str = "mean"
    solver: str = "sklearn"
    strength: float = 1.0
    max_iter: int = 1000

    learning_rate: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("solver", self.solver, SOLVERS)
        check_number("strength", self.strength, 0)
        check_whole("max_iter", self.max_iter)
        if self.strength == 0:
            raise ConfigError("strength must be above 0: with 0 the penalty would be infinite")


def extract(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    pooling: str = "mean",
    batch_size: int = 32,
    cache: str | Path | None = None,
    max_length: int | None = None,
    too_long: str = "error",
) -> Tensor:
    """The features of texts as f_ND in float32, in their order, computed once if there is a cache.

    Args:
        model: any transformers model of texts; its heads are not used.
        pooling: "mean" over the tokens, "cls" for the first token, "last" for the last.
        cache: a folder. What is kept there is found by a SHA-256 of everything that the features follow from: the
            model's config and all of its weights, the tokenizer, the texts, the pooling and the lengths.
        too_long: "error", or "truncate" for texts beyond `max_length` (or the model's positions).

    Raises:
        DataError: a text is too long, or there is none.
        ConfigError: an unknown pooling, or a model without hidden states.
    """
    check_choice("pooling", pooling, POOLINGS)
    check_choice("too_long", too_long, ("error", "truncate"))
    check_whole("batch_size", batch_size)
    if not texts:
        raise DataError("there are no texts to compute features of")
    limit = longest_input(model, tokenizer, max_length)
    rows = tokenize(texts, tokenizer, limit, too_long).rows
    if cache is None:
        return _computed(model, tokenizer, rows, pooling, batch_size)
    key = _key(model, tokenizer, rows, pooling)
    file = Path(cache) / f"{key}.safetensors"
    features = _read(file, key, len(rows))
    if features is None:
        features = _computed(model, tokenizer, rows, pooling, batch_size)
        with staged_file(file) as scratch:
            write_tensors(scratch, {"features": features}, {"key": key, "digest": _digest(features)})
    return features


class _StoredFacts(BaseModel):
    """What `features.json` holds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    labels: list[str] = Field(min_length=1)
    pooling: Literal["mean", "cls", "last"]
    base: str = Field(min_length=1)
    max_length: int = Field(ge=1)


@dataclass(frozen=True)
class FeatureClassifier:
    """A linear classifier on the features of a frozen base.

    Attributes:
        labels: in the order of the outputs.
        weight, bias: (K, D) and (K,), of each label; of the second one alone where there are two.
        base: by folder, Hub id or packaged name.
        max_length: tokens of the longest text that it was trained on.
    """

    labels: list[str]
    weight: Tensor
    bias: Tensor
    pooling: str
    base: str
    max_length: int

    @classmethod
    def fit(
        cls, features_ND: Tensor, labels: Sequence[str], names: Sequence[str], how: FeatureTuning, base: str,
        max_length: int,
    ) -> FeatureClassifier:  # fmt: skip
        """Minimise cross-entropy + |W|^2 / (2 C) on standardised features; `names` says the order of the outputs.

        Raises:
            MissingDependencyError: the solver is scikit-learn, which is not installed.
        """
        # The population's deviation, as scikit-learn's StandardScaler has it.
        mean_D, std_D = features_ND.double().mean(0), features_ND.double().std(0, correction=0)
        # A feature that never varies says nothing; divided by 0 it would spoil all others.
        std_D = torch.where(std_D > 0, std_D, 1.0)
        target_N = torch.tensor([list(names).index(label) for label in labels])
        solve = {"sklearn": _by_sklearn, "torch": _by_torch}[how.solver]
        weight_KD, bias_K = solve((features_ND.double() - mean_D) / std_D, target_N, len(names), how)
        # The standardisation goes into the weights, so that what is stored is one linear map.
        # W' = W / s and b' = b - W' m: W ((f - m) / s) + b = W' f + b', exact but for rounding.
        weight_KD = weight_KD / std_D
        bias_K = bias_K - weight_KD @ mean_D
        return cls(list(names), weight_KD.float().contiguous(), bias_K.float(), how.pooling, base, max_length)

    def probabilities(self, features_ND: Tensor) -> Tensor:
        """p_NL of each label. Raises: AdapterFileError, for features f_ND of another width than the classifier's."""
        if features_ND.shape[1] != self.weight.shape[1]:
            raise AdapterFileError(
                f"the classifier is for features of width {self.weight.shape[1]} and {self.base} gives "
                f"{features_ND.shape[1]}; train it again on this base"
            )
        return _logits(features_ND, self.weight, self.bias).softmax(-1)

    def predict(self, features_ND: Tensor) -> list[str]:
        """The likeliest label of each text."""
        return [self.labels[index] for index in self.probabilities(features_ND).argmax(-1).tolist()]

    def save(self, folder: str | Path) -> None:
        """Write `features.json` and `classifier.safetensors` into the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, {"weight": self.weight, "bias": self.bias})
        facts = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        (folder / CLASSIFIER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> FeatureClassifier:
        """The classifier in a folder; raises AdapterFileError."""
        folder = Path(folder)
        try:
            facts = _StoredFacts.model_validate(read_json(folder / CLASSIFIER))
            tensors = load_file(folder / WEIGHTS)
            classifier = cls(weight=tensors["weight"], bias=tensors["bias"], **facts.model_dump())
            outputs = _logits(torch.zeros(1, classifier.weight.shape[1]), classifier.weight, classifier.bias).shape[1]
            is_finite = bool(classifier.weight.isfinite().all() and classifier.bias.isfinite().all())
        except Exception as error:
            # The files are anybody's: whatever they make the reading fail with is their damage.
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
            raise AdapterFileError(f"the classifier in {folder} can't be read ({what}); train it again") from error
        if not is_finite:
            raise AdapterFileError(f"the classifier in {folder} has weights that are no numbers; train it again")
        if outputs != len(classifier.labels):
            raise AdapterFileError(
                f"the classifier in {folder} has {outputs} outputs for {len(classifier.labels)} labels; train it again"
            )
        return classifier


def is_feature_classifier(folder: str | Path) -> bool:
    """Whether a folder holds a classifier on features."""
    return (Path(folder) / CLASSIFIER).is_file()


def _logits(features_ND: Tensor, weight_KD: Tensor, bias_K: Tensor) -> Tensor:
    logits = F.linear(features_ND.to(weight_KD), weight_KD, bias_K)
    # Of two labels the first is the measure for the second.
    return F.pad(logits, (1, 0)) if len(bias_K) == 1 else logits


def check_solver(how: FeatureTuning) -> None:
    """See that the solver is installed, before hours are spent on features. Raises: MissingDependencyError."""
    if how.solver == "sklearn":
        require("scikit-learn", extra="features", purpose="solver=sklearn", otherwise=", or choose solver=torch")


def _by_sklearn(f_ND: Tensor, target_N: Tensor, labels: int, how: FeatureTuning) -> tuple[Tensor, Tensor]:
    check_solver(how)
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=how.strength, max_iter=how.max_iter).fit(f_ND.numpy(), target_N.numpy())
    return torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)


def _by_torch(f_ND: Tensor, target_N: Tensor, labels: int, how: FeatureTuning) -> tuple[Tensor, Tensor]:
    # Two labels need one row: with two the penalty would be split between them, and the optimum another one than
    # scikit-learn's.
    rows = 1 if labels == 2 else labels
    weight_KD = torch.zeros(rows, f_ND.shape[1], dtype=f_ND.dtype, requires_grad=True)
    bias_K = torch.zeros(rows, dtype=f_ND.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight_KD, bias_K], max_iter=how.max_iter, tolerance_grad=1e-6, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        mean = F.cross_entropy(_logits(f_ND, weight_KD, bias_K), target_N)
        # scikit-learn's objective divided by C N: the same minimum, with a loss of the size of one text's. The bias is
        # free of the penalty.
        value = mean + weight_KD.square().sum() / (2 * how.strength * len(f_ND))
        value.backward()
        return value

    solver.step(loss)
    return weight_KD.detach(), bias_K.detach()


@torch.inference_mode()
def _computed(model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], pooling: str, batch_size: int) -> Tensor:
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    features: dict[int, Tensor] = {}
    try:
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            batch = tokenizer.pad([rows[index] for index in chosen], return_tensors="pt").to(model.device)
            pooled = _pooled(_hidden(model, batch), batch["attention_mask"], pooling).float().cpu()
            features |= dict(zip(chosen, pooled, strict=True))
    finally:
        model.train(was_training)
    return torch.stack([features[index] for index in range(len(rows))])


def _hidden(model: Any, batch: Any) -> Tensor:
    """The last hidden states h_BTD, of the encoder where there is one."""
    backbone = getattr(model, model.base_model_prefix, model)
    if backbone.config.is_encoder_decoder:
        backbone = backbone.get_encoder()
    hidden = getattr(backbone(**batch), "last_hidden_state", None)
    if hidden is None:
        raise ConfigError(f"a {type(model).__name__} has no hidden states to make features of; pass a model of texts")
    return hidden


def _pooled(h_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    if pooling == "mean":
        weight_BT1 = mask_BT.unsqueeze(-1).float()
        # In float32: a sum over hundreds of tokens in bfloat16 keeps two digits.
        return (h_BTD.float() * weight_BT1).sum(1) / weight_BT1.sum(1)
    # Padding may stand on either side.
    # `argmax` gives the first of equal ones: flipped, that is the last token that isn't a pad.
    last = mask_BT.shape[1] - 1 - mask_BT.flip(1).argmax(1)
    position_B = mask_BT.argmax(1) if pooling == "cls" else last
    return h_BTD[torch.arange(len(h_BTD), device=h_BTD.device), position_B]


def _key(model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], pooling: str) -> str:
    """A SHA-256 over everything that determines the features; the ids stand for texts, tokenizer and lengths."""
    facts = [pooling, tokenizer.padding_side, tokenizer.pad_token_id, rows, _config(model), _active(model)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    # Every weight is read: that costs less than one batch, and nothing short of it tells two checkpoints apart.
    for name, tensor in model.state_dict().items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _config(model: Any) -> dict[str, Any]:
    """The config without the path that the model was loaded from."""
    return {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}


def _active(model: Any) -> list[Any]:
    """The active adapters and their configs, which the weights don't determine."""
    state = getattr(model, "adapter_state", None)
    return [] if state is None else [[name, model.peft_config[name].to_dict()] for name in state.applied]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _digest(features: Tensor) -> str:
    return hashlib.sha256(_bytes(features)).hexdigest()


def _read(file: Path, key: str, count: int) -> Tensor | None:
    """Features from the cache; None if there are none, or with a warning if they are damaged."""
    if not file.is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            facts, features = stored.metadata() or {}, stored.get_tensor("features")
        if facts.get("key") == key and facts.get("digest") == _digest(features) and len(features) == count:
            return features
    except (OSError, SafetensorError):
        pass
    warn(f"the cached features in {file} are damaged and are computed again")
    return None
