"""The score of a classifier, of whatever kind it is, on texts with labels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from slimtune.console.progress import Watch
from slimtune.errors import ConfigError, DataError, listing
from slimtune.evaluate.likelihood import refuse_no_number
from slimtune.evaluate.result import Evaluation, ScoredAnswer, summarised
from slimtune.evaluate.scorers import CHOICE
from slimtune.models.load import LoadOptions, load_model
from slimtune.storage.source import folder_of, is_adapter
from slimtune.storage.text_files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from slimtune.data.rows import Text
    from slimtune.evaluate.answers import AnswerFile
    from slimtune.evaluate.run import PreparedTask


def label_texts(
    source: str,
    texts: list[Text],
    options: LoadOptions,
    batch_size: int = 32,
    too_long: str = "error",
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> tuple[list[str], list[int], Tensor]:
    """The L labels of a classifier, the numbers of the N texts that it classified, and their p_NL.

    Args:
        source: a folder that was trained on texts with labels: an adapter, a model, or a classifier on features.
        too_long: "error", "drop" or "truncate".
    """
    from slimtune.data.features import is_feature_classifier

    if is_feature_classifier(source):
        return _by_features(source, texts, options, batch_size, too_long)
    from slimtune.data.texts import longest_input, tokenize
    from slimtune.metrics.classification import classify

    model, tokenizer = load_model(source, "classification", options)
    tokenized = tokenize(texts, tokenizer, longest_input(model, tokenizer, None), too_long)
    watch.start("judging texts", len(tokenized.rows))
    p_NL = classify(model, tokenizer, tokenized.rows, batch_size, watch.step)
    return list(model.config.id2label.values()), tokenized.kept, p_NL


def evaluate_classifier(
    source: str,
    prepared: PreparedTask,
    options: LoadOptions,
    answers: AnswerFile | None = None,
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> Evaluation:
    """Accuracy, macro F1 and the loss, -log p(label), of a classifier on a task with labels.

    Raises:
        ConfigError: a scorer other than accuracy, or examples in front of the questions.
        DataError: the task has no labels, or some that the classifier doesn't know.
    """
    began, questions = time.monotonic(), prepared.questions
    _check_classes(source, prepared)
    texts = [question.text for question in questions if question.text is not None]
    settings = prepared.settings
    labels, kept, p_NL = label_texts(source, texts, options, settings.batch_size, settings.too_long, watch)
    unknown = {question.expected for question in questions} - set(labels)
    if unknown:
        raise DataError(
            f"{prepared.task.source} has labels that {source} doesn't know: {listing(unknown)}; "
            f"it knows {listing(labels)}"
        )
    refuse_no_number(p_NL.sum(-1).tolist())
    # 1e-38 is about the smallest that float32 holds: a certain mistake is dear, and not infinite.
    losses_NL = -p_NL.clamp_min(1e-38).log()
    scored = []
    for row, index in enumerate(kept):
        question, answer = questions[index], labels[int(p_NL[row].argmax())]
        loss = float(losses_NL[row, labels.index(question.expected)])
        scored.append(ScoredAnswer(question, answer, dict(prepared.scorers[0].score(answer, question)), loss, 1))
    facts = {"dropped": len(questions) - len(kept), "shots": 0}
    evaluation = summarised(scored, time.monotonic() - began, facts, of_tokens=False)
    if answers:
        answers.finish(evaluation.answers)
    return evaluation


def _check_classes(source: str, prepared: PreparedTask) -> None:
    if any(question.text is None for question in prepared.questions):
        raise DataError(f"{source} gives texts labels, but {prepared.task.source} has none; pass rows with text, label")
    if not prepared.chooses:
        raise ConfigError(f"{source} gives texts labels, which the scorer '{CHOICE}' is for; leave --scorer out")
    if prepared.shots.count:
        raise ConfigError(f"{source} gives texts labels and reads no examples; leave --shots out")


def _by_features(
    source: str, texts: list[Text], options: LoadOptions, batch_size: int, too_long: str
) -> tuple[list[str], list[int], Tensor]:
    from slimtune.data.features import FeatureClassifier, extract

    if options.quantize is not None:
        raise ConfigError(f"{source} was trained on features of the base as it is; leave --quantize out")
    if too_long == "drop":
        raise ConfigError(f"{source} judges all texts; leave --too-long out, or train an adapter")
    classifier = FeatureClassifier.load(source)
    model, tokenizer = load_model(classifier.base, "features", options)
    features_ND = extract(
        model, tokenizer, texts, classifier.pooling, batch_size, None, classifier.max_length, too_long
    )
    return classifier.labels, list(range(len(texts))), classifier.probabilities(features_ND)


def is_classifier(source: str) -> bool:
    """Whether a folder or Hub id is of what gives texts labels, so that it writes no answers."""
    from slimtune.data.features import is_feature_classifier

    return is_feature_classifier(source) or _has_head(source, "SEQ_CLS", "ForSequenceClassification")


def writes_text(source: str) -> bool:
    """Whether this is an adapter or a model that continues texts, so that it has no labels."""
    return any(
        _has_head(source, task, kind)
        for task, kind in (("CAUSAL_LM", "ForCausalLM"), ("SEQ_2_SEQ_LM", "ForConditionalGeneration"))
    )


def is_tagger(source: str) -> bool:
    """Whether a folder or Hub id is of what gives words tags."""
    return _has_head(source, "TOKEN_CLS", "ForTokenClassification")


def _has_head(source: str, task_type: str, architecture: str) -> bool:
    """Whether this is an adapter for this type of task, or a model of this kind of architecture."""
    if is_adapter(source):
        from slimtune.core.config import PeftConfig

        return PeftConfig.from_pretrained(folder_of(source)).task_type == task_type
    try:
        # The file and not a configuration of transformers, which may run code of the model's to make one.
        config = read_json(Path(folder_of(source, weights=False)) / "config.json")
        named = config.get("architectures") or []
    except (OSError, ValueError, AttributeError):
        # Loading the model reports what can't be read.
        return False
    return any(str(name).endswith(architecture) for name in named)
