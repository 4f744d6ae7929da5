"""No network: fit, validate, analyze and export on local paths in a process that can't open a connection.

The process starts without HF_HUB_OFFLINE (conftest sets it, and libraries read it when they are imported). An audit
hook records and blocks every connection and every look-up of a name that Python code or its C modules begin, so that an
attempt is found even if a library ignores its error. Only sockets between processes of this machine (AF_UNIX) are
allowed. A package named kernels replaces the real one, through which libraries fetch code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORT = {"results": [{"scanner": "network", "findings": [
    {"id": "n4", "title": "TCP 4444 listening", "severity": "medium", "risk_score": "50", "metadata": {"port": "4444"}},
]}]}  # fmt: skip
CALLBACKS = """[
    {class_path: callbacks.ConsoleProgress}, {class_path: callbacks.RunRecord},
    {class_path: callbacks.AdapterCheckpoint},
    {class_path: callbacks.Evaluation, init_args: {num_samples: 2, max_new_tokens: 8}},
    {class_path: lightning.pytorch.callbacks.ModelCheckpoint,
     init_args: {filename: best, monitor: val/loss, save_last: true}}]"""
GUARDED = """
import json, socket, sys
attempts = []
def guard(event, args):
    if event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    if event in ("socket.connect", "socket.sendto") and args[0].family == socket.AF_UNIX:
        return
    attempts.append([event, repr(args[-1] if event.startswith("socket.c") else args)])
    raise OSError(f"no network: {event}")
sys.addaudithook(guard)
from main import main
commands = json.loads(sys.argv[1])
statuses = [main(command) for command in commands]
attempts_of_commands = list(attempts)
from huggingface_hub import model_info
try:
    model_info("no-organization/no-such-model", timeout=1)
except Exception:
    pass
print("RESULT " + json.dumps({"statuses": statuses, "attempts": attempts_of_commands,
                            "hub": attempts[len(attempts_of_commands):]}))
"""


KERNELS = "raise AssertionError('the package kernels, which fetches code from the hub, was imported')"


def run_guarded(commands, cache_root, packages):
    """Runs commands one after another in one guarded process; returns its result and the finished process."""
    (packages / "kernels.py").write_text(KERNELS)
    hidden = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"SYS_SCAN_CACHE": str(cache_root), "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, json.dumps(commands)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(results[0].removeprefix("RESULT ")), done


def test_no_command_uses_the_network(tmp_path, tiny_llama, cache_root):
    report, archive, runs = tmp_path / "report.json", tmp_path / "findings.tar.gz", tmp_path / "runs"
    report.write_text(json.dumps(REPORT))
    backbone, data = "--model.init_args.backbone", "--data.init_args"
    short = ["--max_new_tokens", "8"]
    training = [
        f"{backbone}.model_name_or_path={tiny_llama}", f"{backbone}.lora.num_top_layers=1",
        f"{data}.sources=[{archive}]",
        f"{data}.sequence_length=4096", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
        f"--trainer.logger.init_args.save_dir={runs}", f"--trainer.callbacks={' '.join(CALLBACKS.split())}",
    ]  # fmt: skip
    run = runs / "default" / "version_0"
    commands = [
        ["synthesize", "--findings", "300", "--output", str(archive), "--seed", "1"],
        ["fit", *training],
        ["validate", *training],
        ["analyze", "--model", str(run), "--report", str(report), "--output", str(tmp_path / "e.json"), *short],
        ["export", "--run", str(run), "--output", str(tmp_path / "adapter"), "--num_reference", "2"],
        ["export", "--run",
        str(run), "--output", str(tmp_path / "merged"), "--num_reference", "2", "--format", "merged"],
        ["analyze", "--model", str(tmp_path / "merged"), "--report", str(report), "--output", str(tmp_path / "m.md"),
         "--format", "markdown", *short],
    ]  # fmt: skip
    result, done = run_guarded(commands, cache_root, tmp_path)
    assert result["statuses"] == [0] * len(commands), done.stdout[-2000:] + done.stderr[-4000:]
    assert result["attempts"] == []
    assert "was imported" not in done.stderr
    assert result["hub"], "the audit hook did not record a call of the hub"
    assert (run / "evaluation.json").is_file()
    assert (tmp_path / "e.json").is_file()
    assert json.loads((tmp_path / "merged" / "certificate.json").read_text())["state"] == "passed"
