"""The examples of docs/data_pipeline.md agree with the code."""

from pathlib import Path

import numpy as np

from datamodules.packing import Row, to_batch
from datamodules.tokenization.chat_format import ChatFormat, Example, load_tokenizer
from tests.helpers.pipeline_examples import example_pairs, system_text, task_sections

PAGE = (Path(__file__).parents[2] / "docs/data_pipeline.md").read_text("utf-8")


def test_the_task_sections_are_generated_from_the_code():
    assert system_text() in PAGE
    for section in task_sections():
        assert section in PAGE, "run python -m tests.helpers.pipeline_examples and replace the section by its output"


def test_the_token_counts_of_the_risk_example(embedded_model):
    task, pair = example_pairs()["risk"]
    (example,) = ChatFormat(load_tokenizer("embedded:smollm2-135m-instruct")).encode(task, [pair])
    counts = f"{example.prefix_length} tokens of prefix,\n{len(example.prompt_ids)} tokens of prompt (with the prefix)"
    assert f"{counts} and {len(example.completion_ids)} tokens of completion" in PAGE


def test_the_drawing_of_a_row():
    """The rows of the drawing, read back from the page, are those of a batch of two examples after a prefix of 2."""
    drawing = PAGE.partition("tokens      BOS")[2]
    lines = dict(line.split(maxsplit=1) for line in ("tokens BOS" + drawing).partition("```")[0].strip().splitlines())
    drawn = {name: cells.split("   (")[0].split() for name, cells in lines.items()}
    names = {1: "BOS", 2: "inst", 3: "a1", 4: "a2", 5: "b1", 6: "b2", 9: "EOS", 0: "pad", -100: "."}

    def example(first: int, second: int) -> Example:
        prompt, completion = np.array([1, 2, first], np.int32), np.array([second, 9], np.int32)
        return Example("t", 2, prompt, completion, 0, 0, "low", "dns", 1)

    batch = to_batch([Row([example(3, 4), example(5, 6)], prefix_length=2)], 9)
    assert drawn["tokens"] == [names[i] for i in batch.input_ids_BT[0].tolist()]
    assert drawn["segments"] == [str(i) for i in batch.segment_ids_BT[0].tolist()]
    assert drawn["positions"] == [str(i) for i in batch.position_ids_BT[0].tolist()]
    assert drawn["labels"] == [names[i] for i in batch.labels_BT[0].tolist()]
