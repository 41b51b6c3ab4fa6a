"""Generation: what is learnt of a row, what is cut or left out, decoding and its metrics."""

from __future__ import annotations

import json

import pytest
import torch

from peftcli.config import rules
from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import GenerationConfig, ModelConfig
from peftcli.data.collate import pad
from peftcli.models import loading
from peftcli.tasks import registry
from peftcli.tasks.intervals import wilson
from peftcli.tasks.scoring import text

QUESTION = {"prompt": "how many apples are left?", "completion": "three apples"}
TURNS = [
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "and apples?"},
    {"role": "assistant", "content": "bad"},
    {"role": "user", "content": "never answered"},
]


def made(**settings):
    return registry.build(GenerationConfig(**settings))


def learnt(task, row, tokenizer):
    """What of an encoded row is learnt, and what is not, as text."""
    encoded = task.encode(row, tokenizer)
    assert encoded["labels"][0] == -100
    assert all(label in (-100, token) for label, token in zip(encoded["labels"], encoded["input_ids"], strict=True))
    kept = [token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != -100]
    return tokenizer.decode(kept), tokenizer.decode(encoded["input_ids"])


def test_plain_learns_the_completion_and_the_end(tokenizer):
    task = made(prompt="Question: {prompt} Answer: ")
    assert (task.needed, task.asked) == (["prompt", "completion"], ["prompt"])
    text, whole = learnt(task, QUESTION, tokenizer)
    assert whole == "Question: how many apples are left? Answer: three apples<|end|>"
    assert text == " three apples<|end|>"
    row = task.encode(QUESTION, tokenizer)
    assert row["prompt_length"] == len(tokenizer("Question: how many apples are left? Answer:")["input_ids"])
    shown = task.show(row, tokenizer)
    assert shown.plain == "Question: how many apples are left? Answer:[[ three apples<|end|>]]"
    assert any("green" in str(span.style) for span in shown.spans)


def test_prompt_too_where_asked(tokenizer):
    text, whole = learnt(made(train_on_prompt=True), QUESTION, tokenizer)
    assert whole.endswith(text)
    assert len(whole) - len(text) <= 8


def test_chat_learns_the_answer_up_to_the_turns_end(tokenizer):
    text, whole = learnt(made(template="chat", system="Question:"), QUESTION, tokenizer)
    assert text == "three apples<|end|>"
    assert whole == (
        "<|start|>system\nQuestion:<|end|>\n<|start|>user\nhow many apples are left?<|end|>\n"
        "<|start|>assistant\nthree apples<|end|>"
    )


@pytest.mark.parametrize("form", [list, json.dumps])
def test_conversations_learn_their_last_assistant_turn(tokenizer, form):
    task = made(template="chat", prompt="{messages}")
    assert task.needed == task.asked == ["messages"]
    text, whole = learnt(task, {"messages": form(TURNS)}, tokenizer)
    assert text == "bad<|end|>"
    assert "never answered" not in whole
    assert "three<|end|>\n<|start|>user\nand apples?" in whole


def test_conversation_without_an_answer_is_left_out_and_counted(tokenizer, splits):
    data = splits([{"messages": json.dumps(TURNS)}, {"messages": json.dumps(TURNS[:1])}])
    encoded = made(template="chat", prompt="{messages}").encode_split(data.train, tokenizer)
    assert (encoded.counts["rows"], encoded.counts["dropped"]) == (1, 1)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_long_prompts_are_cut_inside_and_long_completions_left_out(tokenizer, splits, template):
    rows = [
        QUESTION,
        {"prompt": "apples " * 60, "completion": "good"},
        {"prompt": "how?", "completion": "bad " * 60},
        {"prompt": "how?", "completion": "  "},
    ]
    data = splits(rows)
    task = made(template=template, prompt="Question: {prompt} Answer:", max_length=64)
    encoded = task.encode_split(data.train, tokenizer)
    assert {k: encoded.counts[k] for k in ("rows", "truncated", "dropped")} == {"rows": 2, "truncated": 1, "dropped": 2}
    long = encoded.take([1])[0]
    assert long["row"] == 1
    assert 60 <= len(long["input_ids"]) <= 64
    text = tokenizer.decode(long["input_ids"])
    assert "Question: apples" in text
    assert " Answer:" in text
    assert text.endswith("good<|end|>")
    assert encoded.counts["tokens"] == sum(encoded.lengths)
    assert encoded.counts["trained_tokens"] == sum(task.weight(pad([row], 0)) for row in encoded.take([0, 1]))


def test_long_conversations_lose_the_end_of_their_longest_turn(tokenizer):
    turns = [{"role": "user", "content": "apples " * 90}, {"role": "assistant", "content": "good"}]
    row = made(template="chat", prompt="{messages}", max_length=50).encode({"messages": turns}, tokenizer)
    assert row["truncated"] == 1
    assert len(row["input_ids"]) <= 50
    assert tokenizer.decode(row["input_ids"]).endswith("<|end|>\n<|start|>assistant\ngood<|end|>")


def test_nothing_to_learn_stops_the_run(tokenizer, splits):
    data = splits([{"prompt": "how?", "completion": "bad " * 60}] * 3)
    with pytest.raises(CheckFailed, match="none of 3 rows has a token to learn; 3 were left out") as caught:
        made(max_length=20).encode_split(data.train, tokenizer)
    assert caught.value.check == "no-trainable-tokens"


def test_encoding_is_kept_by_settings_and_tokenizer(tokenizer, splits, monkeypatch):
    data = splits([QUESTION])
    before = made().encode_split(data.train, tokenizer)
    task = made()
    monkeypatch.setattr(task, "encode", lambda *_: pytest.fail("tokenised again"))
    assert task.encode_split(data.train, tokenizer).take([0]) == before.take([0])
    assert made(train_on_prompt=True).encode_split(data.train, tokenizer).take([0]) != before.take([0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "plain", "prompt": "{messages}"}, "task.template=chat"),
        ({"template": "plain", "system": "be brief"}, "system message"),
        ({"completion": "none"}, "names no column"),
        ({"best_metric": "perplexty"}, "unknown metric 'perplexty'"),
        ({"best_metric": "answer_accuracy"}, "unknown metric 'answer_accuracy'"),
        ({"best_metric": "rouge_l", "generated_rows": 0}, "generated_rows"),
        ({"answer": "#### .*"}, "no group"),
        ({"answer": "("}, "no regular expression"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        made(**settings)


def test_chat_without_a_template_and_answers_that_match_nothing(plain_tokenizer, tokenizer, splits):
    with pytest.raises(UserError, match="no chat template"):
        made(template="chat").encode(QUESTION, plain_tokenizer)
    with pytest.raises(UserError, match="matches none of the first 1 completions"):
        made(answer="#### (.*)").fit(splits([QUESTION]))
    with pytest.raises(UserError, match="not a list of turns"):
        made(template="chat", prompt="{messages}").encode({"messages": [{"from": "user"}]}, tokenizer)


def test_a_template_that_opens_answers_otherwise_is_refused(plain_tokenizer):
    plain_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    with pytest.raises(UserError, match="opens an answer with"):
        made(template="chat").encode(QUESTION, plain_tokenizer)


def test_decoding_does_not_depend_on_batches_and_equals_step_by_step(tokenizer, llama):
    task = made(max_new_tokens=6)
    rows = [{"prompt": text} for text in ("how many apples are left?", "good", "The film was bad, the")]
    together = task.predict(llama, rows, tokenizer, batch_size=3, device="cpu")
    apart = task.predict(llama, rows, tokenizer, batch_size=1, device="cpu")
    assert together == apart
    ids = tokenizer(rows[1]["prompt"])["input_ids"]
    length = len(ids)
    with torch.no_grad():
        while len(ids) < length + 6 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
    assert together[1]["predicted"] == tokenizer.decode(ids[length:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_what_was_learnt_is_generated_and_stops(tokenizer, make_llama, splits, template):
    rows = [
        {"prompt": "how many?", "completion": "three #### 1,000"},
        {"prompt": "good film", "completion": "bad #### 7"},
        {"prompt": "the long question about apples", "completion": "stupid"},
    ]
    data, model = splits(rows), make_llama(dtype=torch.float32)
    task = made(template=template, answer=r"#### ([\d,]+)", max_new_tokens=30, generated_rows=9, best_metric="rouge_l")
    task.fit(data)
    encoded = task.encode_split(data.train, tokenizer)
    before = task.evaluate(model, encoded, tokenizer, batch_size=2, device="cpu")
    batch, optimiser = pad(encoded.take(range(3)), 0), torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        loss = task.loss(model, batch)
        (loss.total / loss.weight).backward()
        optimiser.step()
        optimiser.zero_grad()
    after = task.evaluate(model, encoded, tokenizer, batch_size=2, device="cpu", generate=True)
    assert {*after.metrics} == {"loss", "perplexity", *rules.SCORED["text"]}
    assert {*before.metrics} == {*after.metrics}  # the best metric needs decoding
    assert after.metrics["loss"] < 0.1 < before.metrics["loss"]
    assert after.metrics["exact_match"] == after.metrics["rouge_l"] == 1
    assert after.metrics["answer_accuracy"] == pytest.approx(2 / 3)  # no answer is never right
    assert after.metrics["bleu"] == pytest.approx(100)
    assert [e["predicted"] for e in after.examples] == [row["completion"] for row in rows]
    assert after.examples[0]["input"].endswith(rows[0]["prompt"]) or template == "chat"
    assert task.higher_is_better


def test_loss_is_weighted_by_tokens(tokenizer, llama, splits):
    rows = [QUESTION, {"prompt": "a", "completion": "good " * 9}]
    data, task = splits(rows), made()
    encoded = task.encode_split(data.train, tokenizer)
    losses = [task.loss(llama, pad(encoded.take([i]), 0)) for i in range(2)]
    mean = sum(loss.total.item() for loss in losses) / sum(loss.weight for loss in losses)
    found = task.evaluate(llama, encoded, tokenizer, batch_size=8, device="cpu")
    assert found.metrics["loss"] == pytest.approx(mean, rel=1e-6)
    assert found.metrics["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-5)
    assert found.examples == []


def test_answers_compare_as_numbers_or_text():
    assert text.answer(r"#### (.+)", "#### 3 then\n#### 4 ") == "4"
    assert text.answer(r"#### (.+)", "none") is None
    assert text.same_answer("1,000", "$1000.00")
    assert not text.same_answer("1000", "1001")
    assert text.same_answer("yes", "yes")
    assert not text.same_answer(None, None)
    assert not text.same_answer("yes", "7")


@pytest.mark.samples
def test_a_real_chat_model_answers():
    loaded = loading.load(ModelConfig(name="smollm2-135m", source="sample"), "fp32", "causal-lm", None)
    task = made(template="chat", max_new_tokens=12)
    rows = [{"prompt": "What is the capital of France?"}, {"prompt": "Say yes."}]
    found = task.predict(loaded.model, rows, loaded.tokenizer, batch_size=2, device="cpu")
    assert "Paris" in found[0]["predicted"]
    row = task.encode({**rows[0], "completion": "Paris."}, loaded.tokenizer)
    assert task.show(row, loaded.tokenizer).plain.endswith("<|im_start|>assistant\n[[Paris.<|im_end|>]]")


def test_shots_stand_before_each_prompt_and_a_row_never_sees_its_own_answer(tokenizer, splits):
    rows = [
        {"prompt": text, "completion": answer} for text, answer in (("how", "bad"), ("a", "good"), ("film", "cast"))
    ]
    data, task = splits(rows), made(prompt="Question: {prompt} Answer: ", shots=2)
    task.fit(data)
    texts = [tokenizer.decode(task.encode(row, tokenizer)["input_ids"]) for row in [*rows, {**QUESTION}]]
    first, second, third = (f"Question: {row['prompt']} Answer: {row['completion']}" for row in rows)
    own = "Question: {prompt} Answer: {completion}<|end|>"
    assert texts == [
        f"{second}\n\n{third}\n\n{own.format(**rows[0])}",
        f"{first}\n\n{third}\n\n{own.format(**rows[1])}",
        f"{first}\n\n{second}\n\n{own.format(**rows[2])}",
        f"{first}\n\n{second}\n\n{own.format(**QUESTION)}",
    ]
    assert learnt(task, rows[0], tokenizer)[0] == " bad<|end|>"
    assert task.protocol()["shots"] == 2
    with pytest.raises(UserError, match="there are 3 training rows to take them from"):
        made(shots=3).fit(data)


def test_the_protocol_says_what_was_judged():
    assert made(scoring="number").protocol()["scoring"] == "number"
    told = made(scoring="code", tests="{prompt}", samples=3).protocol()
    assert told["scoring"] == "text (no program was run), the first of 3 samples alone"


def test_wilsons_intervals_are_for_proportions_and_none_has_no_width(tokenizer, llama, splits):
    data = splits([{"prompt": "good", "completion": "three apples"}] * 4)
    task = made(generated_rows=4, max_new_tokens=2, best_metric="rouge_l")
    encoded = task.encode_split(data.train, tokenizer)
    found = task.evaluate(llama, encoded, tokenizer, batch_size=4, device="cpu", generate=True)
    assert found.metrics["rouge_l"] in (0, 1)
    assert found.intervals["exact_match"] == pytest.approx(wilson(found.metrics["exact_match"], 4))
    assert not {"rouge_1", "rouge_2", "rouge_l", "bleu"} & set(found.intervals)


def test_the_scorers_columns_travel_with_the_row(tokenizer, make_llama, splits):
    rows = [{**QUESTION, "tests": ["assert a", "assert {b}"]}, {**QUESTION, "tests": ["assert c", ""]}]
    task = made(scoring="code", tests="{tests}", max_new_tokens=2)
    assert task.needed == ["prompt", "completion", "tests"]
    encoded = task.encode_split(splits(rows).train, tokenizer)
    assert [json.loads(row["about"])["tests"] for row in encoded.take([0, 1])] == [row["tests"] for row in rows]
    assert encoded.take([0]) == task.encode_split(splits(rows).train, tokenizer).take([0])  # from the cache
