"""What a soft prompt can't do is said in one sentence, before anything was changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening

import slimtune
from slimtune.data.batches import Encoded, PackRows
from slimtune.errors import BaseMismatchError, ConfigError, SlimtuneError, TargetError
from tensors import assert_near, loss_of, predict, trainable
from zoo import (
    BERT,
    GEMMA3,
    GPT2,
    HIDDEN,
    LAYERS,
    LLAMA,
    MIXTURE,
    T5,
    VIT,
    VOCABULARY,
    Specimen,
    token_ids,
    word_tokenizer,
)

PROMPT, PREFIX, P_TUNING = slimtune.PromptTuningConfig, slimtune.PrefixTuningConfig, slimtune.PromptEncoderConfig
ALL = [PROMPT, PREFIX, P_TUNING]
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w5"}


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("count", [0, -3, 2.5, True, None, "8"])
def test_the_number_of_tokens(config: Any, count: Any) -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens must be a whole number of at least 1"):
        config(num_virtual_tokens=count)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (PROMPT, {"prompt_tuning_init": "TXT"}, "prompt_tuning_init must be one of .* did you mean 'TEXT'"),
        (PROMPT, {**TEXT}, "name it in tokenizer_name_or_path"),
        (PROMPT, {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"}, "give it in prompt_tuning_init_text"),
        (PROMPT, {"tokenizer_kwargs": {"use_fast": True}}, "leave them out"),
        (
            PROMPT,
            {**TEXT, "tokenizer_name_or_path": "x", "tokenizer_kwargs": {"trust_remote_code": True}},
            "would let an adapter run code",
        ),
        (PROMPT, {"prompt_tuning_int": "TEXT"}, "has no field 'prompt_tuning_int'; did you mean 'prompt_tuning_init'"),
        (P_TUNING, {"encoder_reparameterization_type": "LTSM"}, "did you mean 'LSTM'"),
        (P_TUNING, {"encoder_num_layers": 3}, "encoder_num_layers is for the LSTM"),
        (P_TUNING, {"encoder_dropout": 0.1}, "encoder_dropout is for the LSTM"),
        (P_TUNING, {"encoder_dropout": 1.0, "encoder_reparameterization_type": "LSTM"}, r"lie in \[0, 1\)"),
        (P_TUNING, {"encoder_hidden_size": 0}, "encoder_hidden_size must be a whole number of at least 1"),
        (PREFIX, {"init_weights": "ones"}, "init_weights must be None or 'zero'"),
        (PREFIX, {"prefix_init": "TEXT"}, "tokenizer_name_or_path"),
        (PREFIX, {"prefix_init": "SAMPLE_VOCAB", "init_weights": "zero"}, "choose one of them"),
        (PREFIX, {"prefix_init": "SAMPLE_VOCAB", "prefix_projection": True}, "choose one of them"),
    ],
)
def test_fields_that_can_not_be_meant(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def unchanged(build: Callable[[], Any], config: Any, error: type[SlimtuneError], message: str) -> None:
    model = build()
    kinds, names = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(error, match=message) as caught:
        slimtune.get_peft_model(model, config)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("specimen", [VIT, MIXTURE], ids=lambda specimen: specimen.name)
def test_a_model_without_tokens(config: Any, specimen: Specimen) -> None:
    unchanged(specimen.model, config(), TargetError, "tokens|attention with a cache")


def distilbert() -> Any:
    config = transformers.DistilBertConfig(vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=4, hidden_dim=48)
    return transformers.DistilBertForSequenceClassification(config).eval()


def test_a_prefix_on_an_attention_without_a_cache() -> None:
    unchanged(distilbert, PREFIX(), TargetError, "an attention with a cache")
    model = slimtune.get_peft_model(distilbert(), PROMPT(num_virtual_tokens=3))
    assert predict(model, {"input_ids": token_ids()}).shape == (2, 2)


def test_an_encoder_that_reads_no_cache_is_found_out_at_the_first_step() -> None:
    """T5's stack has attentions that would take a prefix, but as an encoder it passes none on to them."""
    base = transformers.T5EncoderModel(T5.model().config).eval()
    with pytest.raises(SlimtuneError):
        slimtune.get_peft_model(base, PREFIX())(input_ids=token_ids())


@pytest.mark.parametrize("config", ALL)
def test_more_tokens_than_positions(config: Any) -> None:
    unchanged(GPT2.model, config(num_virtual_tokens=64), ConfigError, "choose at most 63")
    assert slimtune.get_peft_model(GPT2.model(), config(num_virtual_tokens=63)) is not None


@pytest.mark.parametrize("config", ALL)
def test_an_adapter_of_another_base(config: Any, tmp_path: Path) -> None:
    slimtune.get_peft_model(LLAMA.model(), config()).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="made for a model with"):
        slimtune.PeftModel.from_pretrained(LLAMA.build(hidden_size=48, num_key_value_heads=4).eval(), tmp_path)


@pytest.mark.parametrize(
    ("computed", "direct"),
    [(P_TUNING(num_virtual_tokens=3), PROMPT), (PREFIX(num_virtual_tokens=3, prefix_projection=True), PREFIX)],
    ids=["p-tuning", "prefix"],
)
def test_training_on_from_a_file_without_the_encoder(computed: Any, direct: Any, tmp_path: Path) -> None:
    """As peft stores them. The sentence names a way to train the tokens themselves, which is one."""
    own, theirs = copy.deepcopy(computed), copy.deepcopy(computed)
    own.inference_mode = True
    slimtune.get_peft_model(LLAMA.model(), own).save_pretrained(tmp_path / "ours")
    theirs = {**theirs.stored_fields(), "peft_type": str(theirs.peft_type)}
    peft_config = peft.get_peft_config({k: v for k, v in theirs.items() if v is not None} | {"task_type": "CAUSAL_LM"})
    peft.get_peft_model(LLAMA.model(), peft_config).save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        used = predict(slimtune.PeftModel.from_pretrained(LLAMA.model(), folder), LLAMA.batch())
        model = LLAMA.model()
        name = direct.__name__
        with pytest.raises(ConfigError, match=rf"without the network .* config={name}\(num_virtual_tokens=3\)"):
            slimtune.PeftModel.from_pretrained(model, folder, is_trainable=True)
        assert type(model) is type(LLAMA.model())
        config = direct(num_virtual_tokens=3)
        model = slimtune.PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)
        assert_near(predict(model, LLAMA.batch()), used)
        loss_of(model.train(), LLAMA.batch()).backward()
        assert all(parameter.grad.any() for parameter in trainable(model).values())


PACKED = {
    "positions": lambda: PackRows(pad_id=0)([[Encoded([5, 6, 7], [5, 6, 7]), Encoded([8, 9], [8, 9])]]),
    "one-token-each": lambda: {"input_ids": token_ids(1, 3), "position_ids": torch.zeros(1, 3).long()},
    "flattened": lambda: DataCollatorWithFlattening()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]),
    "lengths": lambda: {"input_ids": token_ids(1, 4), "cu_seq_lens_q": torch.tensor([0, 2, 4])},
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("config", ALL)
def test_several_examples_in_a_row(config: Any, packed: str) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), config(num_virtual_tokens=3))
    batch = PACKED[packed]()
    with pytest.raises(ConfigError, match="only the first would have them; leave packing") as told:
        model.train()(**batch)
    assert "\n" not in str(told.value)
    with model.disable_adapter():
        model(**batch)


@pytest.mark.parametrize("config", ALL)
def test_positions_that_one_text_has_are_no_packing(config: Any) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), config(num_virtual_tokens=3)).eval()
    ids = token_ids()
    expected = predict(model, {"input_ids": ids})
    assert_near(predict(model, {"input_ids": ids, "position_ids": torch.arange(7).expand(2, -1)}), expected)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    by_mask = predict(model, {"input_ids": ids, "attention_mask": mask})
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = predict(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    assert_near(given[:, 3:], by_mask[:, 3:])


def test_a_prefix_that_pads_push_out_of_a_window() -> None:
    model = slimtune.get_peft_model(GEMMA3.model(), PREFIX(num_virtual_tokens=3)).eval()
    ids = token_ids(length=14)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ConfigError, match=r"window of 16 tokens .* found 17"):
        model(input_ids=ids, attention_mask=mask)
    assert predict(model, {"input_ids": ids, "attention_mask": mask.flip(1)}).shape == (2, 14, VOCABULARY)
    assert predict(model, {"input_ids": ids[:, 1:], "attention_mask": mask[:, 1:]}).shape == (2, 13, VOCABULARY)


@pytest.mark.parametrize("config", [PROMPT, P_TUNING])
def test_pads_that_are_read_in_two_parts(config: Any) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), config(num_virtual_tokens=3)).eval()
    ids = token_ids(length=9)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pytest.raises(ConfigError, match="leave out prefill_chunk_size"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=4)
    whole = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)
    chunks = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=6)
    assert torch.equal(whole, chunks)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    config = PROMPT(**TEXT, tokenizer_name_or_path=str(tmp_path))
    unchanged(LLAMA.model, config, ConfigError, "the tokenizer .* can't be loaded")


def test_a_text_without_tokens_and_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    options = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": str(tmp_path)}
    unchanged(LLAMA.model, PROMPT(**options, prompt_tuning_init_text=" "), ConfigError, "has no tokens")
    small = lambda: LLAMA.build(vocab_size=50).eval()  # noqa: E731
    config = PROMPT(**options, prompt_tuning_init_text="w60")
    unchanged(small, config, ConfigError, "has the token 60, beyond the 50 of this model")


def test_words_for_an_encoder_decoder() -> None:
    unchanged(T5.model, PREFIX(prefix_init="SAMPLE_VOCAB"), ConfigError, "use 'RANDOM'")


@pytest.mark.parametrize("config", ALL)
def test_a_static_cache(config: Any) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), config(num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="static cache"):
        model.generate(input_ids=token_ids(), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("config", ALL)
def test_what_a_call_must_bring(config: Any) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), config(num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="pass input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))
    with pytest.raises(
        ConfigError, match=r"attention_mask as \(rows, tokens\); found a tensor of shape \(2, 1, 7, 7\)"
    ):
        model(input_ids=token_ids(), attention_mask=torch.ones(2, 1, 7, 7))


@pytest.mark.parametrize("config", ALL)
def test_prompts_are_not_combined_nor_mixed_in_a_batch(config: Any) -> None:
    model = slimtune.get_peft_model(BERT.model(), config(num_virtual_tokens=3))
    model.add_adapter("other", config(num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="can't be combined"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    with pytest.raises(ConfigError, match="run its rows as a batch of their own"):
        model.eval()(input_ids=token_ids(), adapter_names=["default", "other"])
