"""sys-scan-graph's agent can load an exported adapter and parse the answers, with its own loader and parser."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from datamodules.records import Document, Finding
from datamodules.tasks import build_tasks
from lightning_modules.models.backbone import Backbone
from tests.helpers.trained_run import export, make_run, write_evaluation


def load_as_the_agent_does(base, adapter):
    """Loads an NF4 base with double quantisation and float16 products, an adapter, and the base's tokenizer."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")
    return PeftModel.from_pretrained(model, adapter), AutoTokenizer.from_pretrained(base)


def parse_as_the_agent_does(answer):
    """Parses an answer as the agent does: from the first brace to the last one."""
    return json.loads(answer[answer.find("{") : answer.rfind("}") + 1])


@pytest.fixture(scope="module")
def nf4_run(tmp_path_factory, tiny_llama, chatml_tokenizer):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("runs") / "version_0"
    return write_evaluation(make_run(folder, tiny_llama, chatml_tokenizer, quantization="nf4", dtype="float32"))


def test_the_agent_loads_the_folder_and_gets_the_trained_model(nf4_run, tiny_llama, tmp_path):
    assert export(nf4_run, tmp_path / "out", "--num_reference", "0")[0] == 0
    model, tokenizer = load_as_the_agent_does(tiny_llama, tmp_path / "out")
    ids = tokenizer("Analyze the following security scan results", return_tensors="pt")["input_ids"]
    trained = Backbone(str(tiny_llama), "nf4", "float32", adapter=str(nf4_run / "adapter" / "best")).build()
    with torch.no_grad():
        difference = (model(ids).logits.float() - trained.eval()(ids).logits).norm()
        with model.disable_adapter():
            untuned = (model(ids).logits.float() - trained(ids).logits).norm()
    assert difference < 0.02 * untuned  # the rounding of float16 products
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_the_certificate_measures_what_the_agent_loads(nf4_run, tmp_path):
    status, certificate = export(nf4_run, tmp_path / "out", "--num_reference", "3", "--load_as", "agent")
    assert (status, certificate["state"], certificate["load_as"]) == (0, "passed", "agent")
    assert 0 < certificate["reference"]["kl_mean"] < 1e-3


def test_the_agents_parser_reads_every_answer():
    names = ["risk", "correlation", "summary", "triage", "remediation", "agent_chat_summary", "agent_chat_triage"]
    tasks = build_tasks(names)
    findings = [
        Finding(f"id{n}", "Text {with} braces }", '{"severity": "x"} }{', "network", "high", 70.0, 70.0)
        for n in range(3)
    ]
    document = Document("source", "", 0, findings=findings)
    completions = {name: [pair.completion for pair in task.pairs(document)] for name, task in tasks.items()}
    assert completions["risk"]
    assert completions["agent_chat_summary"]
    assert completions["agent_chat_triage"]
    for completion in (text for texts in completions.values() for text in texts):
        assert parse_as_the_agent_does(completion) == json.loads(completion)
        assert parse_as_the_agent_does(f" {completion}</s>") == json.loads(completion)
