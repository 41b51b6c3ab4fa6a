"""Templates and the cutting of long texts."""

from __future__ import annotations

from datetime import datetime

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peftcli.config.errors import UserError
from peftcli.tasks.prompts import Template
from peftcli.tasks.tokens import Tokens, cut_to_fit
from tests.tiny import CHAT, SENTENCES, make_tokenizer


def test_template_names_columns_and_takes_values_literally():
    template = Template("{a} and {b.c}, {{a}}: {a}", "task.prompt")
    assert template.columns == ["a", "b.c"]
    values = template.values({"a": "{b.c}", "b.c": 3, "other": None})
    assert template.render(values) == "{b.c} and 3, {a}: {b.c}"
    assert template.values({"a": None, "b.c": ""})["a"] == ""


@pytest.mark.parametrize("text", ["{text", "text}", "{}", "{text:>10}", "{text!r}"])
def test_template_mistakes_name_the_key(text):
    with pytest.raises(UserError, match=r"task\.prompt"):
        Template(text, "task.prompt")


def test_missing_column_names_the_nearest():
    with pytest.raises(UserError, match="unknown column 'txet'") as caught:
        Template("{txet}", "task.prompt").values({"text": "", "label": ""})
    assert caught.value.mistakes[0].nearest == "text"


def test_continuation_keeps_the_prompts_own_tokens(tokenizer):
    tokens = Tokens(tokenizer)
    assert tokens.start == []
    for prompt, text in (("Sentiment:", " good"), ("Answer:", "three"), ("Topi", "c")):
        found = tokens.continuation(prompt, text)
        assert tokenizer.decode(tokens.ids(prompt) + found) == prompt + text


def test_start_tokens_are_found_and_end_tokens_are_not_put_before_the_answer(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    wrapped = deepcopy(tokenizer)
    wrapped.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 2)]
    )
    assert wrapped("a")["input_ids"][0] == 1
    assert Tokens(wrapped).start == [1]
    assert Tokens(wrapped).fingerprint != Tokens(tokenizer).fingerprint


def test_a_chat_template_with_the_date_in_it_is_another_one_tomorrow(monkeypatch):
    import transformers.utils.chat_template_utils as rendering

    def fingerprint(day: int, template: str | None) -> str:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 5, day)

        monkeypatch.setattr(rendering, "datetime", Clock)
        return Tokens(make_tokenizer(template)).fingerprint

    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT
    assert fingerprint(1, dated) == fingerprint(1, dated) != fingerprint(2, dated)
    assert fingerprint(1, CHAT) == fingerprint(2, CHAT)
    for refusing in (None, "{{ raise_exception('no') }}", "{{ messages[0].content.nothing.at_all }}"):
        assert fingerprint(1, refusing)


def test_only_values_are_cut_and_only_as_much_as_needed(tokenizer):
    tokens, template = Tokens(tokenizer), Template("Question: {a} / {b} Answer:", "task.prompt")
    values = {"a": "apples " * 30, "b": "film"}
    room = 25
    ids, cut = cut_to_fit(tokens, lambda v: tokens.ids(template.render(v)), values, room)
    text = tokenizer.decode(ids)
    assert cut
    assert room - 1 <= len(ids) <= room
    assert text.startswith("Question: apples apples")
    assert text.endswith(" / film Answer:")
    assert cut_to_fit(tokens, lambda v: tokens.ids(template.render(v)), {"a": "x", "b": "y"}, 25)[1] is False


def test_two_long_values_are_cut_alike(tokenizer):
    tokens = Tokens(tokenizer)
    values = {"a": "good " * 100, "b": "film " * 80}
    ids, _ = cut_to_fit(tokens, lambda v: tokens.ids(v["a"] + "|" + v["b"]), values, 40)
    first, second = tokenizer.decode(ids).split("|")
    assert len(ids) <= 40
    assert 0.3 < first.count("good") / second.count("film") < 3


def test_what_cannot_fit_is_none(tokenizer):
    tokens = Tokens(tokenizer)
    assert cut_to_fit(tokens, lambda v: tokens.ids("Question: " * 9 + v["a"]), {"a": "x" * 50}, 5) == (None, True)
    assert cut_to_fit(tokens, lambda v: tokens.ids("Question: " * 9), {}, 5) == (None, True)


@pytest.mark.parametrize("text", ["日本語のテキスト" * 20, "🙂" * 40, "Ünïcödé " * 30])
def test_texts_of_many_bytes_a_letter_are_cut_between_letters(tokenizer, text):
    tokens = Tokens(tokenizer)
    ids, cut = cut_to_fit(tokens, lambda v: tokens.ids(v["a"]), {"a": text}, 30)
    assert cut
    assert 20 < len(ids) <= 30
    assert text.startswith(tokenizer.decode(ids))


def test_tokenizers_that_put_a_space_first_do_not_put_one_inside_a_sentence():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    inner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))
    names = tokens.tokenizer.convert_ids_to_tokens
    assert names(tokens.ids("good"))[0].startswith("▁")
    assert "".join(names(tokens.continuation("Sentiment:", " good"))) == "▁good"
    assert "".join(names(tokens.continuation("Sentiment:", "good"))) == "good"
