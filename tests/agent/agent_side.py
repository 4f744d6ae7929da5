"""Runs in the agent's own environment: reads one JSON request from stdin and writes one JSON answer to stdout.

The project's packages are not importable there. Requests are objects with ``do``, the name of a function below, and its
arguments.
"""

import json
import sys
from unittest import mock


def package():
    """Returns the version of the installed agent."""
    from importlib.metadata import version

    return version("sys-scan-agent")


def validate(document):
    """Validates a document as EnrichedOutput; returns it as the model writes it, and its HTML report."""
    from sys_scan_agent import canonicalize, models, report_html

    output = models.EnrichedOutput.model_validate(document)
    return {
        "output": canonicalize.canonicalize_enriched_output_dict(output.model_dump()),
        "html": report_html.render(output),
    }


def diff(previous, current):
    """Returns the agent's diff of two documents."""
    from sys_scan_agent import models, report_diff

    return report_diff.build_diff(*map(models.EnrichedOutput.model_validate, (previous, current)))


class _Chat:
    """Takes the place of a LangChain chat model and keeps the messages that it gets."""

    def __init__(self, answer):
        self.answer, self.sent = answer, []

    def invoke(self, messages):
        self.sent.append([message.content for message in messages])
        return mock.Mock(content=self.answer, usage_metadata=None, response_metadata={})


def prompts(findings, correlations=(), actions=(), answers=None):
    """Returns the prompts that the providers send about the findings of a report, and the results of given answers.

    Args:
        findings: findings of a report, as the scanner writes them.
        correlations: correlations, with the fields of the agent's model.
        actions: actions, with the fields of the agent's model.
        answers: text of the model by prompt name; a short valid answer is used for a missing one.
    """
    from sys_scan_agent import models, reduction
    from sys_scan_agent.graph import rules, summarization
    from sys_scan_agent.graph.enrichment import enrich_findings
    from sys_scan_agent.providers.langchain_api_provider import LangChainAPIConfig, LangChainAPIProvider
    from sys_scan_agent.providers.local_qwen_provider import LocalQwenLLMProvider

    state = enrich_findings({"raw_findings": findings})
    enriched = summarization._build_finding_models(state["enriched_findings"])
    reductions = reduction.reduce_all(enriched)
    links = [models.Correlation(**item) for item in correlations]
    steps = [models.ActionItem(**item) for item in actions]
    answers = answers or {}
    sent, results = {}, {}

    local = LocalQwenLLMProvider()
    with mock.patch.object(local, "_maybe_generate", return_value=answers.get("agent_local_summary", "text")) as call:
        result, _ = local.summarize(reductions, links, steps)
    sent["agent_local_summary"] = call.call_args.args[0]
    results["agent_local_summary"] = result.executive_summary

    def chat(name, default, ask):
        model = _Chat(answers.get(name, default))
        with mock.patch.object(LangChainAPIProvider, "_build_chat_model", return_value=model):
            result, _ = ask(LangChainAPIProvider(config=LangChainAPIConfig()))
        sent[name] = model.sent[0]
        results[name] = result.model_dump() if hasattr(result, "model_dump") else result

    chat(
        "agent_chat_summary",
        '{"executive_summary": "x"}',
        lambda provider: provider.summarize(reductions, links, steps),
    )
    chat("agent_chat_triage", '{"top_findings": []}', lambda provider: provider.triage(reductions, links))
    suggestions = rules._execute_gap_mining(enriched)["suggestions"]
    if suggestions:
        chat("agent_chat_rules", "[]", lambda provider: provider.refine_rules(suggestions, examples=None))
    return {"prompts": sent, "results": results, "suggestions": suggestions}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    result = globals()[request.pop("do")](**request)
    print("\n" + json.dumps(result))  # on a line of its own, after what the agent prints
