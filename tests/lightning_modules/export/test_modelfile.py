"""Tests of the Modelfile: its template, filled in by Go's rules, gives the same ids as the tokenizer's template."""

import re

import pytest

from datamodules.errors import UserError
from datamodules.tasks import RiskTask
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.export.modelfile import go_template, modelfile


def fill_in(template, system, prompt):
    """Fills in the parts of Go's text/template that are used: one condition and two values."""
    pattern = r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}"
    chosen = re.sub(pattern, lambda match: match[1] if system else match[2], template, flags=re.DOTALL)
    return chosen.replace("{{ .System }}", system).replace("{{ .Prompt }}", prompt)


@pytest.mark.parametrize("name", ["mistral_tokenizer", "chatml_tokenizer", "real_mistral_tokenizer"])
@pytest.mark.parametrize("system", ["You are an analyst.", ""])
def test_a_prompt_has_the_same_ids_as_in_training(request, name, system):
    tokenizer = request.getfixturevalue(name)
    chat, task = ChatFormat(tokenizer), RiskTask()
    task.system = system
    content = '{"title":"Port 4444","metadata":{"pid":77}}'
    text = fill_in(go_template(tokenizer), system, task.instruction + content)
    assert tokenizer(text)["input_ids"] == chat.prompt_ids(task, [content])[0]


def test_the_modelfile_is_greedy_and_limits_the_context(mistral_tokenizer):
    lines = modelfile(mistral_tokenizer, "You are.", 4096).splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert {"PARAMETER temperature 0", "PARAMETER repeat_penalty 1", "PARAMETER num_ctx 4096"} <= set(lines)
    assert lines[-1] == 'SYSTEM """You are."""'
    assert "PARAMETER num_ctx 8192" in modelfile(mistral_tokenizer, "", 1 << 20)


def test_a_template_with_text_of_gos_syntax_is_a_user_error(chatml_tokenizer, monkeypatch):
    template = chatml_tokenizer.chat_template
    monkeypatch.setattr(chatml_tokenizer, "chat_template", "{{ '{{ x }}' }}" + template)
    with pytest.raises(UserError, match="can't be quoted"):
        go_template(chatml_tokenizer)
