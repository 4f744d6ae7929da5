"""Fixtures of the tests of the data pipeline."""

import pytest

from datamodules import FindingsDataModule
from tests.helpers.findings_data import write_folder


@pytest.fixture
def make_data(mistral_tokenizer_folder, tmp_path):
    """Builds data modules of 100 findings in 5 files of very different sizes."""
    folder = write_folder(tmp_path / "shards", [30, 20, 1, 40, 9])

    def build(**changes):
        options = {
            "sources": [str(folder)], "sequence_length": 1024, "batch_size": 1, "packing": "none", "val_fraction": 0.2,
            "test_fraction": 0.1, "num_workers": 0, "block_findings": 16,
        }  # fmt: skip
        module = FindingsDataModule(tokenizer=mistral_tokenizer_folder, **options | changes)
        module.setup("fit")
        return module

    return build
