"""The code example of the README runs without changes."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_snippet_trains_saves_and_loads(tiny_mistral, tmp_path):
    code = re.search(r"<!-- tests/test_reuse.py runs this -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    names = {"MODEL": str(tiny_mistral), "FOLDER": str(tmp_path)}
    exec(code, names)
    module, again = names["module"], names["again"]
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    loaded = dict(again.named_parameters())
    assert trained
    assert all(torch.equal(p.cpu(), loaded[name].cpu()) for name, p in trained.items())
    assert any(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)  # zeros at the start
