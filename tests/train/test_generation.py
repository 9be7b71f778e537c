"""Batched generation gives what generating one by one gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from slimtune.adapters.merge import compare_outputs
from slimtune.data.chat_template import render
from slimtune.engine import weights
from slimtune.errors import ConfigError
from slimtune.evaluate.generation import equal_prompts_read_once, generate_batch, generate_replies
from small_text_model import orders, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [render(TOKENIZER, example.question(), for_answer=True) for example in orders(7)]


def one_by_one(model: Any, prompt: str) -> str:
    ids = TOKENIZER(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    produced = model.generate(ids, max_new_tokens=10, do_sample=False)
    return TOKENIZER.decode(produced[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("is_worth_it", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_as_one_by_one(batch_size: int, is_worth_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights in another order while the answers are written, as for many of them, and without."""
    monkeypatch.setattr(weights, "_WORTH_IT", 0 if is_worth_it else 10**9)
    model = tiny_model()
    assert generate_batch(model, TOKENIZER, PROMPTS, 10, batch_size=batch_size) == [
        one_by_one(model, prompt) for prompt in PROMPTS
    ]


def test_prompts_with_nothing_in_common() -> None:
    model, prompts = tiny_model(), ["abc", "de f", "g"]
    assert generate_batch(model, TOKENIZER, prompts, 10) == [one_by_one(model, prompt) for prompt in prompts]


def test_a_prompt_that_is_the_beginning_of_another() -> None:
    model, prompts = tiny_model(), ["abc", "abcabcabc", "abc"]
    assert generate_batch(model, TOKENIZER, prompts, 10) == [one_by_one(model, prompt) for prompt in prompts]


def test_windows_that_slide() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model: Any = MistralForCausalLM(
        MistralConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, sliding_window=8, initializer_range=0.2,
            bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )
    ).eval()  # fmt: skip
    assert generate_batch(model, TOKENIZER, PROMPTS[:3], 10) == [one_by_one(model, prompt) for prompt in PROMPTS[:3]]


def test_an_encoder_reads_from_the_left() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    model: Any = BartForConditionalGeneration(
        BartConfig(
            vocab_size=512, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, init_std=0.5,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, forced_eos_token_id=None,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=2,
        )
    ).eval()  # fmt: skip
    prompts = [prompt[:length] for prompt, length in zip(PROMPTS, (30, 80, 140), strict=False)]
    alone = [generate_batch(model, TOKENIZER, [prompt], 10)[0] for prompt in prompts]
    assert generate_batch(model, TOKENIZER, prompts, 10) == alone
    assert len(set(alone)) == 3


def test_answers_that_end_and_answers_that_are_cut_off() -> None:
    model = tiny_model()
    (whole,) = generate_replies(model, TOKENIZER, PROMPTS[:1], 10)
    assert not whole.ended
    stop = whole.text[6:9]
    assert generate_replies(model, TOKENIZER, PROMPTS[:1], 10, stop=stop) == [
        (whole.text.partition(stop)[0].strip(), True)
    ]
    first = TOKENIZER(whole.text, add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [2, first[1]]
    (short,) = generate_replies(model, TOKENIZER, PROMPTS[:1], 10)
    assert short.ended
    assert whole.text.startswith(short.text)
    told: dict[int, Any] = {}
    replies = generate_replies(model, TOKENIZER, PROMPTS, 10, batch_size=2, on_batch=told.update)
    assert [told[number] for number in range(len(PROMPTS))] == replies


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = tiny_model().train()
    generate_batch(model, TOKENIZER, PROMPTS[:2], 2)
    assert model.training


def test_a_negative_temperature() -> None:
    with pytest.raises(ConfigError, match="-1"):
        generate_batch(tiny_model(), TOKENIZER, PROMPTS[:1], 2, temperature=-1.0)


def test_no_drift_between_equal_outputs() -> None:
    logits = torch.randn(3, 5, 11)
    drift = compare_outputs(logits, logits.clone())
    assert (drift.max_abs, drift.mean_abs, drift.relative, drift.kl, drift.top1_agreement) == (0, 0, 0, 0, 1)


def test_drift_against_the_textbook() -> None:
    before, after = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]).softmax(0)
    drift = compare_outputs(before, after)
    assert drift.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)
    assert (drift.max_abs, drift.mean_abs) == (1.0, 0.5)
    # A shift of all logits changes no probability.
    assert compare_outputs(after, after + 3).kl == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="shapes"):
        compare_outputs(before, after[:, :1])


def test_equal_prompts_are_read_once_and_answered_as_each_alone() -> None:
    """Two prompts twice each, the shorter one padded on the left."""
    model: Any = tiny_model()
    pad = TOKENIZER.pad_token_id
    prompts = [[7, 8, 9, 10, 11], [pad, pad, 7, 8, 9], [7, 8, 9, 10, 11], [pad, pad, 7, 8, 9]]
    ids = torch.tensor(prompts)
    given = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]] * 2)}
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=pad)
    expected, read = model.generate(**given, generation_config=config), []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    with equal_prompts_read_once(model):
        assert torch.equal(model.generate(**given, generation_config=config), expected)
    hook.remove()
    # Two prompts but for their last tokens, which all rows read, and then a token a row for each step.
    assert read[:2] == [8, 4]
    assert "generate" not in vars(model)
