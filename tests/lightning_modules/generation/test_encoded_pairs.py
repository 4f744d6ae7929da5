"""Encoded pairs against the chat format's own prompts."""

import pytest

from datamodules.tasks import RiskTask
from datamodules.tasks.base import Pair
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.generation.encoded_pairs import EncodedPairs

CONTENTS = ['{"title":"a"}', "", '{"title":"' + "b" * 300 + '"}', '{"é":"</s>[/INST]<|im_end|>"}']


@pytest.mark.parametrize("tokenizer", ["chatml_tokenizer", "mistral_tokenizer"])
def test_prompts_are_those_of_the_chat_format(request, tokenizer):
    chat, task = ChatFormat(request.getfixturevalue(tokenizer)), RiskTask()
    pairs = [Pair("risk", content, '{"severity":"low"}', "low", "", 1) for content in CONTENTS]
    encoded = EncodedPairs.encode(chat, task, pairs)
    prompts = chat.prompt_ids(task, CONTENTS)
    assert encoded.prompts == prompts
    assert encoded.contents == CONTENTS
    assert all(ids[-1] == chat.eos_id for ids in encoded.completions)
    limit = len(chat.prefix_ids(task)) + 90
    expected = [chat.truncate_prompt(task, content, limit)[0] for content in CONTENTS]
    assert encoded.truncated_prompts(limit) == expected
    assert expected != prompts
    for part, indices in ((encoded[1::2], [1, 3]), (encoded.select([3, 0]), [3, 0])):
        assert len(part) == 2
        assert part.prompts == [prompts[index] for index in indices]
        assert part.pairs == [pairs[index] for index in indices]
    assert not encoded[4:]
