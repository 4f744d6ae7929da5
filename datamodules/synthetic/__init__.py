"""Generated findings in the scanner's wire format: ``rules`` is what there is to learn, ``generator`` writes shards."""

from datamodules.synthetic.generator import (
    ARCHIVE_SUFFIXES,
    GENERATOR_VERSION,
    REPORT_NAME,
    Layout,
    SynthesisReport,
    check_arguments,
    correlate,
    iter_documents,
    synthesize,
    truth,
)

__all__ = [
    "ARCHIVE_SUFFIXES",
    "GENERATOR_VERSION",
    "REPORT_NAME",
    "Layout",
    "SynthesisReport",
    "check_arguments",
    "correlate",
    "iter_documents",
    "synthesize",
    "truth",
]
