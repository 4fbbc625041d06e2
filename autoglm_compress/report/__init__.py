"""The HTML page of a run, and the page that compares several runs."""

from autoglm_compress.report.page import write_report

__all__ = ["write_report"]
