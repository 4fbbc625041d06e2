"""What a run shows beside its numbers: a page of all."""

from autoglm_compress.report.page import write_report

__all__ = ["write_report"]
