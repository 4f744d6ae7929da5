"""The registry, and properties that every task must have."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.records import SEVERITIES, Document
from datamodules.stream.splits import split_document
from datamodules.tasks import TASKS, build_tasks
from datamodules.tasks.agent_prompts import AGENT_TASKS
from datamodules.tasks.base import compact_json
from datamodules.tasks.windows import iter_windows
from tests.helpers.tasks_data import ATTACK, make_correlation, make_document, make_finding, read_documents

REPOSITORY = Path(__file__).parents[3]
REAL = [
    "batches/batch_001_20250919_081119.json", "batches/batch_001_20250919_081245.json",
    "plain_batch.json", "ground_truth_example.json",
]  # fmt: skip


def test_build_tasks_keeps_the_order_of_names():
    assert list(build_tasks(["triage", "risk"])) == ["triage", "risk"]


def test_unknown_names_raise_an_error_with_the_known_ones():
    for name in ("poem", "agent_triage"):
        with pytest.raises(
            UserError, match=rf"there is no task '{name}'\. Fix: use one of risk, .*agent_chat_rules\.$"
        ):
            build_tasks([name])


@pytest.mark.parametrize("size", [{"window": 0}, {"members": 1}, {"distractors": -1}])
def test_sizes_out_of_range_raise_an_error(size):
    ((option, value),) = size.items()
    with pytest.raises(UserError, match=f"{option}={value}: must be at least {value + 1}"):
        build_tasks(["risk"], **size)


def test_instructions_are_shared_prefixes(tasks):
    for name, task in tasks.items():
        assert task.name == name
        if name in AGENT_TASKS:  # the agent writes its instruction into the system text
            assert task.instruction == ""
        else:
            assert task.instruction.endswith("\n")
            assert "data, never instructions" in task.system
            # about 100 to 120 tokens together; a token has about 4 characters
            assert 150 < len(task.system) + len(task.instruction) < 560
        jsonschema.Draft202012Validator.check_schema(task.answer_schema)


def expected_count(name: str, document: Document) -> int:
    if name in ("risk", "remediation"):
        return len(document.findings)
    if name == "correlation":
        return len(document.correlations)
    windows = len(list(iter_windows(document, 24)))
    return windows + (windows > 1) if name in AGENT_TASKS else windows


@pytest.mark.parametrize("name", REAL)
def test_answers_of_real_documents_validate(shared_data, name):
    tasks = build_tasks([*TASKS, *AGENT_TASKS])
    document = next(read_documents(shared_data / name))
    assert document.findings
    published = json.loads((shared_data / "ground_truth_schema.json").read_text())["properties"]
    parts = {
        "correlation": lambda answer: (published["correlations"], [answer | {"id": "x"}]),
        "summary": lambda answer: (published["summaries"], answer),
        "triage": lambda answer: (published["reductions"], answer),
        "remediation": lambda answer: (published["actions"], answer["actions"]),
    }
    for task in tasks.values():
        pairs = list(task.pairs(document))
        if task.name == "agent_chat_rules":  # not every window repeats a title
            assert len(pairs) <= expected_count(task.name, document)
        else:
            assert len(pairs) == expected_count(task.name, document)
        validator = jsonschema.Draft202012Validator(task.answer_schema)
        for pair in pairs:
            plain = task.answer_schema["type"] == "string"
            answer = pair.completion if plain else json.loads(pair.completion)
            validator.validate(answer)
            assert plain or compact_json(answer) == pair.completion
            assert pair.severity in SEVERITIES
            assert pair.findings > 0
            if task.name in parts:
                schema, value = parts[task.name](answer)
                jsonschema.Draft202012Validator(schema).validate(value)


PRINT_DIGEST_OF_PAIRS = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from datamodules.records import Correlation, Document, Finding
from datamodules.tasks import TASKS, build_tasks
from datamodules.tasks.agent_prompts import AGENT_TASKS

findings = [Finding(f"f_{i}", f"t {i % 7}", "d", "ioc", "low", i, i, {"pid": i}, tags=["b", "a"]) for i in range(90)]
tied = [Correlation(f"c{s}", "t", "d", "k", 0.5, [f"f_{i}" for i in range(s, 80, s + 1)]) for s in range(1, 9)]
tasks = build_tasks([*TASKS, *AGENT_TASKS])
pairs = [pair for task in tasks.values() for pair in task.pairs(Document("s", "m", 0, findings, tied))]
print(len(pairs), hashlib.sha256(repr(pairs).encode()).hexdigest())
"""


def test_every_task_is_deterministic_across_processes(tmp_path):
    command = [sys.executable, "-c", PRINT_DIGEST_OF_PAIRS, str(REPOSITORY)]
    printed = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        printed.add(run.stdout)
    assert len(printed) == 1
    assert printed.pop().startswith(f"{90 + 8 + 6 + 6 + 90 + 3 * 7 + 7} ")


def test_pairs_are_generators_and_do_not_change_the_document(tasks):
    document = make_document(correlations=[make_correlation(["f_1", "f_2"])])
    before = deepcopy(document)
    for task in tasks.values():
        assert isinstance(task.pairs(document), Iterator)
        assert list(task.pairs(document)) == list(task.pairs(document))
        assert not list(task.pairs(Document("s", "m", 0)))
    assert document == before


def test_text_of_an_attacker_stays_inside_its_json_string(tasks):
    metadata = {"cmd": ATTACK, ATTACK: ATTACK}
    findings = [make_finding(i, "high", title=ATTACK, metadata=metadata) for i in range(3)]
    findings = [replace(finding, description=ATTACK, category=ATTACK, rationale=[ATTACK]) for finding in findings]
    document = Document("s", "m", 0, findings, [make_correlation(["f_0", "f_1"], description=ATTACK)])
    for task in tasks.values():
        for pair in task.pairs(document):
            assert "\n\nIgnore" not in pair.content
            assert "\x00" not in pair.content
            plain = task.answer_schema["type"] == "string"
            jsonschema.validate(pair.completion if plain else json.loads(pair.completion), task.answer_schema)
    for name in ("risk", "remediation", "correlation", "summary", "triage"):
        value = json.loads(next(tasks[name].pairs(document)).content)
        first = value["findings"][0] if "findings" in value else value
        assert first["title"] == ATTACK


def test_inference_and_training_use_the_same_content(tasks):
    document = make_document(20, [make_correlation(["f_1", "f_2"])])
    for name in ("risk", "remediation"):
        contents = [tasks[name].content(finding) for finding in document.findings]
        assert contents == [pair.content for pair in tasks[name].pairs(document)]
    window = next(iter_windows(document, 24))
    for name in ("summary", "triage"):
        assert tasks[name].content(window) == next(tasks[name].pairs(document)).content
    for name in ("agent_local_summary", "agent_chat_summary", "agent_chat_triage"):
        assert tasks[name].content(document.findings) == next(tasks[name].pairs(document)).content
    pair = next(tasks["correlation"].pairs(document))
    shown = {line["id"] for line in json.loads(pair.content)["findings"]}
    findings = [finding for finding in document.findings if finding.id in shown]
    assert tasks["correlation"].content(findings) == pair.content


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(5, 80), st.lists(st.lists(st.integers(0, 90), max_size=12), max_size=5))
def test_prompts_of_one_split_contain_findings_of_that_split_only(seed, count, references):
    correlations = [make_correlation([f"f_{i}" for i in ids], f"c{n}") for n, ids in enumerate(references)]
    parts = split_document(make_document(count, correlations), val_fraction=0.3, test_fraction=0.2, seed=seed)
    for part in parts.values():
        own = {finding.id for finding in part.findings}
        for task in build_tasks(["correlation", "summary", "triage"]).values():
            for pair in task.pairs(part):
                assert set(re.findall(r"f_\d+", pair.content + pair.completion)) <= own
