"""The GGUF export in llama.cpp (the wheel xllamacpp): the same tokens, and answers of the same probability.

llama.cpp rounds at other operations than torch (with 8- and 4-bit weights it also rounds activations to 8 bits), so
that a greedy answer may differ at near ties. Each token of an answer is therefore compared with the exported weights in
float32: it must be the most probable one up to a tolerance in nats, with the same probability.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from datamodules.sources.scanner_report import read_report
from datamodules.synthetic import iter_documents
from datamodules.tasks import RiskTask
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.export.merge import load_exported
from lightning_modules.export.modelfile import go_template
from lightning_modules.models.backbone import Backbone
from tests.helpers.trained_run import export, make_run

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp", reason="llama.cpp as a wheel: pip install xllamacpp")
#: program of a separate process, because llama.cpp's server keeps its threads; prints one answer per line
RUNTIME = """
import json, os, sys
import xllamacpp
params = xllamacpp.CommonParams()
folder = sys.argv[1]
params.model.path, params.n_ctx, params.n_parallel, params.offline = folder + "/model.gguf", 2048, 1, True
if os.path.exists(folder + "/adapter.gguf"):
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = folder + "/adapter.gguf", 1.0
    params.lora_adapters = [adapter]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more threads would wait actively on shared cores
server = xllamacpp.Server(params)
for prompt in json.loads(sys.stdin.read()):
    reply = server.handle_completions({"prompt": prompt, "n_predict": 24, "temperature": 0, "n_probs": 1})
    tokens = reply["choices"][0]["logprobs"]["content"]
    answer = {"ids": [t["id"] for t in tokens], "logprobs": [t["logprob"] for t in tokens]}
    print("ANSWER " + json.dumps(answer | {"prompt_tokens": reply["usage"]["prompt_tokens"]}), flush=True)
os._exit(0)
"""
QUESTIONS = 2


def llama_cpp(folder, prompts):
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME, str(folder)], input=json.dumps(prompts), capture_output=True, text=True
    )
    answers = [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if "ANSWER" in line[:7]]
    assert len(answers) == len(prompts), done.stderr[-2000:]
    return answers


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.05), ("q8_0", 0.4), ("q4_1", 0.5), ("q4_0", 0.5)])
def test_llama_cpp_answers_as_the_exported_model_does(tmp_path, embedded_model, kind, tolerance):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    chat, task = ChatFormat(tokenizer), RiskTask()
    findings = read_report(next(iter_documents(QUESTIONS, seed=3))).document.findings
    contents = [task.content(finding) for finding in findings]
    run = make_run(tmp_path / "version_0", embedded_model, tokenizer)
    status, _ = export(run, tmp_path / "out", "--format", "gguf", "--gguf_type", kind, "--num_reference", "0")
    assert status == 0
    prompts = chat.prompt_ids(task, contents)
    whole = go_template(tokenizer)
    opening = whole.partition("{{ if .System }}")[2].partition("{{ else }}")[0].replace("{{ .System }}", task.system)
    texts = [opening + task.instruction + content + whole.rpartition("{{ .Prompt }}")[2] for content in contents]
    answers = llama_cpp(tmp_path / "out", [*prompts, *texts])
    # the exported model: the dequantised weights, as transformers reads the file, and the adapter if it is separate
    assert (tmp_path / "out" / "adapter.gguf").exists() == kind.startswith("q4")
    trained = Backbone(str(embedded_model), adapter=str(run / "adapter" / "best"))
    model = load_exported(tmp_path / "out", trained, torch.device("cpu"))
    for number, answer in enumerate(answers):  # prompts as ids, and as text with control tokens, as in Ollama
        prompt = prompts[number % QUESTIONS]
        assert answer["prompt_tokens"] == len(prompt)
        ids = torch.tensor([[*prompt, *answer["ids"]]])
        with torch.no_grad():
            logprobs_NV = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logprobs_NV.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert (logprobs_NV.max(1).values - chosen).max() < tolerance
        assert (chosen - torch.tensor(answer["logprobs"])).abs().max() < tolerance
