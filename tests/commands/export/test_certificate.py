"""The certificate's bounds, measured part and description of a run."""

import hashlib
import json

import pytest

from commands.export import certificate as certificates
from commands.export.certificate import Bounds
from commands.model_source import open_trained_model
from datamodules.tasks.base import Pair
from tests.helpers.trained_run import make_run

QUALITY = {"schema_valid": 1.0, "severity_accuracy": 0.8}
BOUNDS = Bounds(max_kl=0.02, max_drop=0.05)


def measured(kl, valid=1.0, accuracy=0.8):
    exported = {"schema_valid": valid, "severity_accuracy": accuracy}
    return {"kl_mean": kl, "same_answers": 0.5, "n": 4, "trained": QUALITY, "exported": exported}


@pytest.mark.parametrize(("kl", "valid", "accuracy"), [(0.02, 0.95, 0.75), (0.0, 1.0, 0.9)])
def test_values_within_the_bounds_pass(kl, valid, accuracy):
    assert BOUNDS.exceeded(measured(kl, valid, accuracy)) == []


def test_every_exceeded_bound_is_listed_with_its_excess():
    assert BOUNDS.exceeded(measured(0.05)) == ["divergence 0.05 nats per token is 0.03 above --max_kl 0.02"]
    assert BOUNDS.exceeded(measured(None, 0.9, 0.5)) == [
        "divergence is not a number",
        "schema_valid fell from 1 to 0.9, 0.05 more than --max_drop 0.05",
        "severity_accuracy fell from 0.8 to 0.5, 0.25 more than --max_drop 0.05",
    ]


def test_a_task_without_severities_is_compared_by_valid_answers_only():
    values = measured(0.0) | {"trained": {"schema_valid": 1.0}, "exported": {}}
    assert BOUNDS.exceeded(values) == ["schema_valid fell from 1 to 0, 0.95 more than --max_drop 0.05"]


def test_the_state_follows_from_the_bounds():
    reference = {"task": "risk", "origin": "data (val)"}
    passed = certificates.measured_part(measured(0.01), reference, BOUNDS)
    assert (passed["state"], passed["failures"]) == ("passed", [])
    assert passed["reference"] == reference | {"max_kl": 0.02, "max_drop": 0.05} | measured(0.01)
    assert certificates.measured_part(measured(0.1), reference, BOUNDS)["state"] == "failed"
    nothing = certificates.measured_part({}, reference, BOUNDS)
    assert (nothing["state"], nothing["reference"]["n"]) == ("not measured", 0)


def test_the_console_summary_has_state_divergence_and_quality():
    lines = certificates.format_summary(certificates.measured_part(measured(0.05, accuracy=0.5), {}, BOUNDS))
    assert lines[0] == "  certificate  FAILED: divergence 0.05 nats per token (at most 0.02), 50% of 4 answers the same"
    assert lines[1].startswith("  FAILED       divergence 0.05")
    assert lines[-1] == "  severity_accuracy trained 0.8, exported 0.5"
    nothing = certificates.measured_part({}, {}, BOUNDS)
    assert certificates.format_summary(nothing) == ["  certificate  not measured (--num_reference 0)"]


def test_the_description_has_the_run_without_folders_of_this_machine(tmp_path, tiny_llama, chatml_tokenizer):
    run = make_run(tmp_path / "version_0", tiny_llama, chatml_tokenizer)
    described = certificates.describe(open_trained_model(str(run), "--run"), {"format": "merged", "load_as": None})
    assert (described["format"], "load_as" in described) == ("merged", False)
    assert described["run"] == {"state": "finished", "step": 3}
    assert described["config_sha256"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert described["config"]["model"]["init_args"]["backbone"]["model_name_or_path"] == tiny_llama.name
    assert described["base"]["quantization"] == "none"


def test_the_files_are_listed_with_their_digest_but_not_the_certificate(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    certificates.save(tmp_path, {"state": "unfinished"})
    assert json.loads((tmp_path / "certificate.json").read_text()) == {"state": "unfinished"}
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert certificates.file_entries(tmp_path) == {"a.bin": {"sha256": digest, "bytes": 3}}


def test_the_digest_of_pairs_changes_with_a_question_or_an_answer():
    pairs = [Pair("risk", "q", "a", "low", "", 1)]
    others = [[Pair("risk", "q", "b", "low", "", 1)], [Pair("risk", "r", "a", "low", "", 1)], pairs * 2]
    digests = {certificates.pairs_digest(some) for some in (pairs, *others)}
    assert len(digests) == 4
    assert certificates.pairs_digest([Pair("risk", "q", "a", "high", "x", 1)]) in digests
