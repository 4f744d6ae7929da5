"""Generates labeled findings in the wire format of the scanner's archive.

``labeling_rules`` defines the labels as a function of the inputs, ``sampling`` draws features and noise,
``finding_text`` and ``documents`` write them, and ``generator`` is the public interface.
"""

from datamodules.synthetic.generator import (
    ARCHIVE_SUFFIXES,
    GENERATOR_VERSION,
    REPORT_NAME,
    Layout,
    SynthesisReport,
    check_arguments,
    correlate,
    ground_truth_labels,
    iter_documents,
    synthesize,
)

__all__ = [
    "ARCHIVE_SUFFIXES",
    "GENERATOR_VERSION",
    "REPORT_NAME",
    "Layout",
    "SynthesisReport",
    "check_arguments",
    "correlate",
    "ground_truth_labels",
    "iter_documents",
    "synthesize",
]
