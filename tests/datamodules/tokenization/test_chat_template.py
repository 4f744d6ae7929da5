"""Layouts of chat templates: pieces around the texts of a turn, BOS and EOS."""

from copy import deepcopy

import pytest
from tokenizers import AddedToken, processors

from datamodules.errors import UserError
from datamodules.tokenization.chat_template import Layout, _pieces, parse_layout, template_source, with_bos

MESSAGES = "{% for m in messages %}{{ m.content }}{% endfor %}"


def control_of(tokenizer):
    """A tokenizer's control tokens, by text, as tokenizer.json describes them."""
    return {
        token.content: {"id": index, "lstrip": token.lstrip, "rstrip": token.rstrip}
        for index, token in tokenizer.added_tokens_decoder.items()
    }


def layout_of(tokenizer, template=None):
    if template is not None:
        tokenizer = deepcopy(tokenizer)
        tokenizer.chat_template = template
    return parse_layout(tokenizer, control_of(tokenizer))


def test_the_layout_of_mistral(mistral_tokenizer):
    assert layout_of(mistral_tokenizer) == Layout(
        before_user=[1, 3, " "],
        before_system=[1, 3, " "],
        between=["\n\n"],
        after_user=[4],
        lead=" ",
        eos_id=2,
        bos_id=1,
    )


def test_the_layout_of_chatml(chatml_tokenizer):
    assert layout_of(chatml_tokenizer) == Layout(
        before_user=[1, "user\n"],
        before_system=[1, "system\n"],
        between=[2, "\n", 1, "user\n"],
        after_user=[2, "\n", 1, "assistant\n"],
        lead="",
        eos_id=2,
        bos_id=None,  # <|im_start|> begins every turn
    )


@pytest.mark.parametrize(
    ("before_system", "system", "expected"),
    [
        ([1, "S:"], "sys", [1, "S:", "sys", "|", "text"]),
        ([1, "S:"], "", [1, "U:", "text"]),
        (None, "sys", [1, "U:", "sys\n\ntext"]),
        (None, "", [1, "U:", "text"]),
    ],
)
def test_the_pieces_up_to_the_user_text(before_system, system, expected):
    layout = Layout([1, "U:"], before_system, ["|"], [2], "", 2, 1)
    assert layout.opening(system, "text") == expected


def test_a_template_without_system_role(mistral_tokenizer):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}<s>"
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    layout = layout_of(mistral_tokenizer, template)
    assert (layout.before_user, layout.before_system, layout.between) == ([1, 3], None, [])
    assert (layout.after_user, layout.lead, layout.eos_id) == ([4], "", 2)


def test_spaces_before_the_answer_are_the_lead(chatml_tokenizer):
    template = MESSAGES.replace("{{ m.content }}", "{{ m.role }}:   {{ m.content }}<|im_end|>")
    template += "{% if add_generation_prompt %}assistant:   {% endif %}"
    layout = layout_of(chatml_tokenizer, template)
    assert layout.after_user == [2, "assistant:"]
    assert layout.lead == "   "


def test_thinking_is_turned_off(chatml_tokenizer):
    template = "{% if enable_thinking %}{{ raise_exception('on') }}{% endif %}" + chatml_tokenizer.chat_template
    assert layout_of(chatml_tokenizer, template) == layout_of(chatml_tokenizer)


def test_the_date_is_fixed(chatml_tokenizer):
    template = "{{ strftime_now('%Y') }}|" + chatml_tokenizer.chat_template
    assert layout_of(chatml_tokenizer, template).before_user == ["01 Jan 2025|", 1, "user\n"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}x{% endfor %}{{ nothing.at_all.here }}",
        "{{ raise_exception('never') }}",
        "{% for m in messages",
    ],
)
def test_a_template_that_loses_a_text_is_a_user_error(template, chatml_tokenizer):
    with pytest.raises(UserError, match=r"does not keep user and assistant text\. Fix: choose another model"):
        layout_of(chatml_tokenizer, template)


def test_no_template_is_a_user_error(chatml_tokenizer):
    tokenizer = deepcopy(chatml_tokenizer)
    tokenizer.chat_template = None
    for function in (template_source, layout_of):
        with pytest.raises(UserError, match=r"no chat template\. Fix: .*chat_template\.jinja next to its tokenizer"):
            function(tokenizer)
    assert template_source(chatml_tokenizer) == chatml_tokenizer.chat_template


def test_no_eos_is_a_user_error(chatml_tokenizer):
    tokenizer = deepcopy(chatml_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no EOS token\. Fix: set eos_token in its tokenizer_config\.json"):
        layout_of(tokenizer, MESSAGES)
    assert layout_of(tokenizer).eos_id == 2  # the token that the template ends a turn with


def test_bos_is_added_if_the_tokenizer_adds_it(chatml_tokenizer, mistral_tokenizer):
    assert with_bos(chatml_tokenizer, ["x"]) == ["x"]
    assert with_bos(mistral_tokenizer, ["x"]) == [1, "x"]
    assert with_bos(mistral_tokenizer, [3, 1, "x"]) == [3, 1, "x"]
    tokenizer = deepcopy(chatml_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert with_bos(tokenizer, []) == [1]


def test_output_is_split_into_control_tokens_and_text():
    control = {
        "<a>": {"id": 1, "lstrip": False, "rstrip": False},
        "<a>b": {"id": 2, "lstrip": False, "rstrip": False},  # the longer token is matched first
        "|": {"id": 3, "lstrip": True, "rstrip": False},
        "<r>": {"id": 4, "lstrip": False, "rstrip": True},
    }
    assert _pieces("x <a> <a>b y", control) == ["x ", 1, " ", 2, " y"]
    assert _pieces("x \n| y<r> \nz", control) == ["x", 3, " y", 4, "z"]
    assert _pieces("", control) == []
    assert _pieces("<a>", {}) == ["<a>"]


def test_a_token_that_is_not_special_is_control_too(chatml_tokenizer):
    tokenizer = deepcopy(chatml_tokenizer)
    tokenizer.add_tokens([AddedToken("<call>", special=False, normalized=False)])
    layout = layout_of(tokenizer, "<call>" + tokenizer.chat_template)
    assert layout.before_user == [259, 1, "user\n"]
