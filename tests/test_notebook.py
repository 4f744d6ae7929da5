"""Tests that every cell of the notebook runs, scaled down by the settings that a user can change."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "fine_tune.ipynb"


def execute(runs, *options, steps, findings, limit):
    """Runs every cell in a new kernel; returns the notebook with its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    settings.source += f"\nSTEPS, FINDINGS, LIMIT = {steps}, {findings}, {limit}\n"
    settings.source += f"OPTIONS = {[f'--trainer.logger.init_args.save_dir={runs}', *options]!r}\n"
    client = nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3")
    client.execute(cwd=str(NOTEBOOK.parent))
    return notebook


def outputs(notebook):
    """Returns the printed text of all cells and the MIME types of their outputs."""
    every = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in every)
    return text, {kind for output in every for kind in output.get("data", {})}


def check(notebook, runs, limit):
    run = runs / "default" / "version_0"
    text, kinds = outputs(notebook)
    assert "image/png" in kinds
    assert "text/html" in kinds
    assert "passed" in text
    assert (run / "export" / "adapter_model.safetensors").is_file()
    assert (run / "analysis" / "enriched.html").read_text().count("<tr>") == limit + 1
    # no outputs are committed
    assert not any(cell.get("outputs") for cell in nbformat.read(NOTEBOOK, as_version=4).cells)


def small_evaluation(samples, tokens):
    """Returns an option with the callbacks whose files the notebook reads, and with few evaluated answers."""
    evaluation = (
        f"{{class_path: callbacks.Evaluation, init_args: {{num_samples: {samples}, max_new_tokens: {tokens}}}}}"
    )
    checkpoint = (
        "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: best, save_last: true}}"
    )
    others = "{class_path: callbacks.RunRecord}, {class_path: callbacks.AdapterCheckpoint}"
    return f"--trainer.callbacks=[{others}, {evaluation}, {checkpoint}]"


def test_every_cell_runs_on_a_tiny_model(tmp_path, tiny_llama, monkeypatch):
    options = (
        f"--model.init_args.backbone.model_name_or_path={tiny_llama}",
        "--model.init_args.backbone.lora.num_top_layers=1",
        "--data.init_args.sequence_length=4096", small_evaluation(2, 8),
    )  # fmt: skip
    notebook = execute(tmp_path, *options, steps=2, findings=300, limit=2)
    check(notebook, tmp_path, limit=2)


@pytest.mark.slow
def test_every_cell_runs_on_the_embedded_default(tmp_path, embedded_model):
    notebook = execute(tmp_path, small_evaluation(5, 120), steps=4, findings=600, limit=4)
    check(notebook, tmp_path, limit=4)
