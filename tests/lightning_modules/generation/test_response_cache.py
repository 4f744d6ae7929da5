"""The response cache: each prompt is answered once, also after an interrupt, and every setting is part of the key."""

import json
from types import SimpleNamespace

import pytest

from datamodules.errors import UserError
from lightning_modules.generation import response_cache
from lightning_modules.generation.response_cache import CachedGenerator, Response
from tests.helpers.byte_chat import Bytes, load, one_by_one

RISK = SimpleNamespace(name="risk", system="s", instruction="i", answer_schema={})
TRIAGE = SimpleNamespace(name="triage", system="s", instruction="i", answer_schema={})


@pytest.fixture
def generated(monkeypatch):
    """Replaces generation by an echo; returns the list of contents that were generated."""
    contents = []

    def echo(model, chat, requests, *, on_answer, progress, **options):
        for index, request in enumerate(requests):
            contents.append(request.content)
            output = SimpleNamespace(text=f"{request.task.name} {request.content}", stopped=request.content != "cut",
                                     prompt_tokens_cut=len(request.content) % 2)  # fmt: skip
            on_answer(index, output)
            progress((index + 1) / len(requests))

    monkeypatch.setattr(response_cache, "generate_requests", echo)
    monkeypatch.setattr(CachedGenerator, "_constraint", lambda self, task: None)
    return contents


def generator(file=None, **options):
    return CachedGenerator(None, None, **{"identity": "model", "constrained": False, "cache_file": file} | options)


def test_equal_prompts_are_answered_once(generated):
    ask, fractions = generator(), []
    responses = ask([(RISK, "a"), (TRIAGE, "a"), (RISK, "a"), (RISK, "cut")], fractions.append)
    assert responses == [
        Response("risk a", True, 1), Response("triage a", True, 1), Response("risk a", True, 1),
        Response("risk cut", False, 1),
    ]  # fmt: skip
    assert generated == ["a", "a", "cut"]
    assert fractions == pytest.approx([1 / 3, 2 / 3, 1])
    assert ask([(RISK, "cut"), (RISK, "b")]) == [Response("risk cut", False, 1), Response("risk b", True, 1)]
    assert generated[3:] == ["b"]
    assert ask.reused == 1


def test_responses_are_read_from_the_file(tmp_path, generated):
    questions = [(RISK, "a"), (RISK, "é\ud800"), (TRIAGE, "line\nbreak")]
    first = generator(tmp_path / "cache.jsonl")(questions)
    again = generator(tmp_path / "cache.jsonl")
    assert again(questions) == first
    assert len(generated) == 3
    assert again.reused == 3


def test_a_line_cut_short_is_generated_again_and_the_rest_is_kept(tmp_path, generated):
    file = tmp_path / "cache.jsonl"
    questions = [(RISK, name) for name in "abc"]
    first = generator(file)(questions)
    file.write_text(file.read_text()[:-9] + "\n[1]\n{}\nnull", encoding="utf-8")
    again = generator(file)
    assert again(questions) == first
    assert generated == ["a", "b", "c", "c"]
    assert again.reused == 2
    assert generator(file)(questions) == first
    assert len(generated) == 4
    assert json.loads(file.read_text().splitlines()[-1])["text"] == "risk c"


@pytest.mark.parametrize(
    ("options", "task"),
    [
        ({"identity": "another model"}, {}),
        ({"max_new_tokens": {"risk": 7}}, {}),
        ({"constrained": True}, {}),
        ({"max_new_tokens": {"other": 256}}, {"name": "other"}),
        ({}, {"system": None}),
        ({}, {"instruction": "another"}),
        ({}, {"answer_schema": {"type": "object"}}),
    ],
)
def test_every_setting_is_part_of_the_key(tmp_path, generated, options, task):
    file = tmp_path / "cache.jsonl"
    generator(file)([(RISK, "a")])
    other = generator(file, **options)
    other([(SimpleNamespace(**vars(RISK) | task), "a")])
    assert (generated, other.reused) == (["a", "a"], 0)
    generator(file, **options)([(SimpleNamespace(**vars(RISK) | task), "a")])
    assert len(generated) == 2


def test_a_file_that_can_not_be_written_is_an_error(tmp_path, generated):
    with pytest.raises(UserError, match=r"missing/cache.jsonl: .*--output"):
        generator(tmp_path / "missing" / "cache.jsonl")([(RISK, "a")])


def test_responses_of_a_model_are_its_greedy_outputs(tiny_llama, tmp_path):
    model, chat = load(tiny_llama), Bytes(eos_id=999)
    ask = CachedGenerator(
        model, chat, identity="x", constrained=False, max_new_tokens={"risk": 5}, cache_file=tmp_path / "cache.jsonl"
    )
    contents = ["port 22", "suid"]
    expected = [chat.decode(tokens) for tokens, _ in one_by_one(model, chat, contents, 5)]
    assert ask([(RISK, content) for content in contents]) == [Response(text, False, 0) for text in expected]
