"""The sampled values: shares of severities, links between findings, prompt injections."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from datamodules.records import CATEGORIES, SEVERITIES
from datamodules.synthetic import iter_documents
from datamodules.synthetic.labeling_rules import labels_of
from datamodules.synthetic.sampling import FEATURES, LABELS, RandomStream, sample_findings
from tests.helpers.synthetic_data import findings_of


def test_every_category_has_every_severity_and_the_shares_are_exact(findings):
    assert set(Counter((f["category"], f["severity"]) for f in findings)) == {
        (category, severity) for category in CATEGORIES for severity in SEVERITIES
    }
    shares = Counter(f["severity"] for f in findings)
    for severity, share in zip(SEVERITIES, (0.50, 0.15, 0.18, 0.12, 0.05), strict=True):
        assert shares[severity] / len(findings) == pytest.approx(share, abs=0.001)


def test_some_findings_share_a_key_without_a_correlation():
    """Otherwise a model could answer "correlated" whenever two PIDs are equal."""
    for document in iter_documents(5000, 2):
        groups = defaultdict(list)
        for finding in findings_of(document):
            if "pid" in finding["metadata"]:
                groups[str(finding["metadata"]["pid"])].append(finding)
        pairs = [group for group in groups.values() if len(group) > 1]
        benign = [group for group in pairs if not any(f["correlation_refs"] for f in group)]
        assert 0.02 < len(benign) / len(pairs) < 0.5
        assert all(f["tags"][0] == "expected" for group in benign for f in group)


def test_the_combinations_of_features_are_distinct_and_have_every_severity():
    assert len(set(FEATURES)) == len(FEATURES) == 96
    assert [labels_of(features) for features in FEATURES] == LABELS
    assert {labels.severity for labels in LABELS} == set(SEVERITIES)


def test_the_stream_is_the_raw_output_of_pcg64():
    raw = np.random.PCG64(np.random.SeedSequence((1, 2, 3))).random_raw(6)
    assert RandomStream(1, 2, 3).integers(2, 3).tolist() == (raw >> np.uint64(33)).reshape(2, 3).tolist()
    assert not np.array_equal(RandomStream(1, 2, 3).integers(6), RandomStream(1, 2, 4).integers(6))


@pytest.mark.parametrize("n", [1, 7, 100, 1001])
def test_a_systematic_sample_has_every_share_to_one(n):
    shares = (0.5, 0.3, 0.15, 0.05)
    counts = np.bincount(RandomStream(0).systematic(shares, n), minlength=4)
    assert counts.sum() == n
    assert np.all(np.abs(counts - np.array(shares) * n) <= 1)


def test_a_permutation_has_every_number_once():
    assert sorted(RandomStream(4).permutation(1000).tolist()) == list(range(1000))


def test_process_ids_are_unique_except_for_linked_findings():
    samples = sample_findings(RandomStream(0), 3000)
    by_pid = defaultdict(list)
    for sample in samples:
        by_pid[sample.pid].append(CATEGORIES[sample.category])
    linked = [tuple(sorted(group)) for group in by_pid.values() if len(group) > 1]
    assert len(linked) > 100
    assert set(linked) <= {
        ("network", "processes"), ("dns", "processes"), ("kernel_params", "processes"), ("kernel_params", "modules"),
    }  # fmt: skip


def test_the_noise_is_bounded_and_keeps_the_severity():
    for sample in sample_findings(RandomStream(5), 2000):
        labels = LABELS[sample.features]
        assert abs(sample.risk - labels.score) <= 3
        assert SEVERITIES[min(sample.risk // 20, 4)] == labels.severity
        noiseless = (*labels.subscores, labels.probability)
        assert all(abs(a - b) <= 2 for a, b in zip(sample.hundredths, noiseless, strict=True))
