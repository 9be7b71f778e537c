"""Forgetting: losses before and after, of an adapter and of a whole model, and what is said of the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import slimtune
from slimtune.data.batches import Encoded
from slimtune.data.rows import Pair
from slimtune.errors import ConfigError, DataError
from slimtune.evaluate.domain_texts import DOMAINS, read_texts, texts
from slimtune.evaluate.forgetting import all_passages, compare, measure
from slimtune.evaluate.language_loss import Passage, losses, passages, require_language_loss
from slimtune.evaluate.tuned import Tuned
from small_text_model import save_base, tiny_model, tiny_tokenizer, write_lines

FEW = {name: found[:4] for name, found in texts().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


def adapter(base: Path, folder: Path, change: float, **config: Any) -> Path:
    """A LoRA whose B is drawn with this size."""
    model, tokenizer = slimtune.load(str(base), device="cpu")
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, change) if change else parameter.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_untrained_adapter_forgot_exactly_nothing(base: Path, tmp_path: Path) -> None:
    found = measure(Tuned.find(str(adapter(base, tmp_path / "a", 0.0))), FEW)
    assert found.difference == 0
    assert found.interval == (0, 0)
    assert all(change.difference == 0 and change.worst == [] for change in found.domains.values())


def test_an_adapter_and_its_merged_model_forgot_the_same(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "a", 0.1)
    model, tokenizer = slimtune.load(str(folder), device="cpu")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    apart = measure(Tuned.find(str(folder)), FEW)
    merged = measure(Tuned.find(str(tmp_path / "merged"), str(base)), FEW)
    assert abs(apart.difference) > 1e-3
    for name, change in apart.domains.items():
        assert change.before == pytest.approx(merged.domains[name].before, abs=1e-6)
        assert change.after == pytest.approx(merged.domains[name].after, abs=1e-4)
        assert change.worst == sorted(change.worst, key=lambda rise: -rise.rise)


def test_losses_are_those_of_the_model_one_by_one() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    read = all_passages(FEW, tokenizer, 200)
    found = losses(model, tokenizer, read, batch_tokens=300)
    for passage, loss in zip(read, found, strict=True):
        labels = torch.tensor(passage.encoded.labels)
        with torch.no_grad():
            logits = model(torch.tensor([passage.encoded.input_ids])).logits[0]
        alone = F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        assert float(loss) == pytest.approx(float(alone), rel=1e-5)
        assert passage.tokens == int((labels[1:] != -100).sum())


def test_of_a_pair_only_the_answer_counts() -> None:
    tokenizer = tiny_tokenizer()
    (asked,) = passages("x", [Pair(prompt="two lattes", completion="yes")], tokenizer, 512)
    learned = [token for token in asked.encoded.labels if token != -100]
    assert tokenizer.decode(learned) == "yes<|im_end|>"
    (plain,) = passages("x", [Pair(prompt="two lattes", completion="yes")], tiny_tokenizer(None), 512)
    assert tokenizer.decode([token for token in plain.encoded.labels if token != -100]) == "yes<|im_end|>"
    assert asked.shown == plain.shown == "user: two lattes\nassistant: yes"


def test_long_texts_are_cut_and_nothing_is_lost() -> None:
    tokenizer, text = tiny_tokenizer(), str(FEW["code"][0])
    whole = passages("code", [text], tokenizer, 10_000)
    pieces = passages("code", [text], tokenizer, 50)
    assert len(pieces) > 1
    assert [token for piece in pieces for token in piece.encoded.input_ids] == whole[0].encoded.input_ids


def passage(domain: str, tokens: int, shown: str = "") -> Passage:
    return Passage(domain, shown, Encoded([1] * (tokens + 1), [1] * (tokens + 1)))


def test_figures_are_per_token_and_domains_count_the_same() -> None:
    read = [passage("a", 10, "short"), passage("a", 30, "long"), passage("b", 5)]
    found = compare(read, np.array([10.0, 60, 5]), np.array([20.0, 60, 10]), worst=2)
    assert found.domains["a"].before == pytest.approx(70 / 40)
    assert found.domains["a"].difference == pytest.approx(10 / 40)
    assert [(rise.text, rise.rise) for rise in found.domains["a"].worst] == [("short", 1.0)]
    assert found.domains["b"].interval is None
    assert found.difference == pytest.approx((0.25 + 1) / 2)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    read = [passage("a", 1) for _ in range(60)]
    hits = 0
    for _ in range(200):
        before = rng.normal(3, 1, 60)
        interval = compare(read, before, before + rng.normal(0.5, 1, 60)).domains["a"].interval
        assert interval is not None
        hits += interval[0] <= 0.5 <= interval[1]
    assert 0.9 <= hits / 200 <= 0.98


def test_the_shipped_sets_are_whole() -> None:
    found = texts()
    assert list(found) == list(DOMAINS)
    assert sum(map(len, found.values())) > 200
    for name, domain in found.items():
        assert len({str(text) for text in domain}) == len(domain) >= 25, name
    assert texts() == found
    assert [len(domain) for domain in texts(["code", "facts"], 3).values()] == [3, 3]
    with pytest.raises(ConfigError, match="did you mean 'german'"):
        texts(["germn"])


def test_files_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\nStill one.\n\n\n\nTwo.\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["One.\nStill one.", "Two."]
    assert read_texts(write_lines(tmp_path / "b.jsonl", {"text": "x"}, {"text": "y"})) == ["x", "y"]
    (row,) = read_texts(write_lines(tmp_path / "c.jsonl", {"prompt": "x", "completion": "y"}))
    assert isinstance(row, Pair)
    (tmp_path / "d.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no text"):
        read_texts(tmp_path / "d.txt")
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: text: "):
        read_texts(write_lines(tmp_path / "b.jsonl", {"text": "x"}, {"text": 3}))


def test_what_cant_be_scored_is_named() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="text 2 of 'x' has no token to predict"):
        passages("x", ["two lattes", "a"], tokenizer, 512)
    with pytest.raises(DataError, match="--max-length"):
        passages("x", [Pair(prompt="two lattes " * 9, completion="yes")], tokenizer, 10)
    with pytest.raises(DataError, match="no text to measure"):
        all_passages({}, tokenizer, 10)
    model = tiny_model(vocab_size=16)
    with pytest.raises(ConfigError, match="16 embeddings"):
        losses(model, tokenizer, passages("x", ["two lattes"], tokenizer, 512))
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not a number"):
        losses(model, tokenizer, passages("x", ["two lattes"], tokenizer, 512))


def test_models_without_a_language_loss_say_what_to_do_instead() -> None:
    import transformers

    config = tiny_model().config
    with pytest.raises(ConfigError, match=r"predicts no next token.*slimtune evaluate"):
        require_language_loss(transformers.LlamaForSequenceClassification(config), "x")
    seq2seq = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="slimtune evaluate"):
        require_language_loss(transformers.T5ForConditionalGeneration(seq2seq), "x")


def test_a_whole_model_must_name_its_base(base: Path, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "full")
    with pytest.raises(ConfigError, match="--base"):
        Tuned.find(str(folder))
    assert Tuned.find(str(folder), "x").base == "x"
    (folder / "README.md").write_text(f"# full\n\nA full fine-tune of `{base}`.\n")
    assert Tuned.find(str(folder)).base == str(base)
    (folder / "recipe.yaml").write_text("model:\n  name: smollm2-135m-instruct\n")
    assert Tuned.find(str(folder)).base == "smollm2-135m-instruct"
    (folder / "recipe.yaml").write_text("model: [\n")
    with pytest.raises(ConfigError, match="pass --base"):
        Tuned.find(str(folder))
