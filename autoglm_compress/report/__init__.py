"""What a run shows beside its numbers: a plot of what each stage decided, and a page of all."""

from autoglm_compress.report.page import write_report
from autoglm_compress.report.stage_plots import draw, draw_missing

__all__ = ["draw", "draw_missing", "write_report"]
