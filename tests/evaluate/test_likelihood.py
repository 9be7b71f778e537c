"""The loss of answers is that of the model on the whole text, whatever is batched, cached or padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from slimtune import LoraConfig, PromptTuningConfig, get_peft_model
from slimtune.data.batches import IGNORED
from slimtune.data.encode import encode_row
from slimtune.data.rows import Conversation, Pair
from slimtune.evaluate.likelihood import PromptWithAnswer, answer_losses, answered_ids
from slimtune.evaluate.tasks import answered, read_task
from small_text_model import orders, tiny_model, tiny_tokenizer, write_lines

TOKENIZER = tiny_tokenizer()


def gpt2() -> Any:
    """Absolute positions: padding in front would move them."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=512)).eval()


def adopted() -> Any:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    return model.eval()


def prompted() -> Any:
    return get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()


def by_hand(model: Any, row: PromptWithAnswer) -> float:
    ids = torch.tensor([[*row.prompt, *row.answer]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]
    begin = len(row.prompt)
    return F.cross_entropy(logits[begin - 1 : -1], ids[0, begin:], reduction="sum").item()


@pytest.mark.parametrize("make", [tiny_model, gpt2, adopted, prompted])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_as_one_by_one(tmp_path: Any, make: Any, batch_size: int) -> None:
    model = make()
    task = read_task(write_lines(tmp_path / "t.jsonl", *({"messages": e.messages()} for e in orders(5))))
    rows = [answered_ids(model, TOKENIZER, *answered(TOKENIZER, q, [], "", q.expected)) for q in task.questions]
    found = answer_losses(model, TOKENIZER, rows, batch_size)
    assert found == pytest.approx([by_hand(model, row) for row in rows], rel=1e-4)


def test_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model: Any = T5ForConditionalGeneration(config).eval()
    rows = [PromptWithAnswer([5, 6, 7, 2], [8, 9, 2]), PromptWithAnswer([5, 2], [9, 9, 9, 9, 2])]
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([r.prompt]), labels=torch.tensor([r.answer])).loss.item() * len(r.answer)
            for r in rows
        ]
    assert answer_losses(model, TOKENIZER, rows, 2) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("template", [True, False])
def test_the_answer_has_the_tokens_that_training_learns(tmp_path: Any, template: bool) -> None:
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
    value = {"prompt": "one latte for bo.", "completion": ' {"name": "Bo"}'}
    task = read_task(write_lines(tmp_path / "t.jsonl", value))
    question = task.questions[0]
    row = answered_ids(tiny_model(), tokenizer, *answered(tokenizer, question, [], "", question.expected))
    learned = encode_row(Pair(**value), tokenizer)
    # What a template writes behind the end of turn is neither learned nor read here.
    assert row.prompt + row.answer == learned.input_ids[: len(row)]
    assert row.answer == [label for label in learned.labels if label != IGNORED]


def test_only_the_last_answer_counts(tmp_path: Any) -> None:
    turns = [*orders(1)[0].messages(), {"role": "user", "content": "again"}, {"role": "assistant", "content": "no"}]
    question = read_task(write_lines(tmp_path / "t.jsonl", {"messages": turns})).questions[0]
    row = answered_ids(tiny_model(), TOKENIZER, *answered(TOKENIZER, question, [], "", question.expected))
    assert TOKENIZER.decode(row.answer) == "no<|im_end|>"
    whole = encode_row(Conversation.model_validate({"messages": turns}), TOKENIZER)
    assert row.prompt + row.answer == whole.input_ids[: len(row)]
