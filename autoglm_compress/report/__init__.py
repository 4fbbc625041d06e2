"""What a run shows beside its numbers: a plot of what each stage decided."""

from autoglm_compress.report.stage_plots import draw, draw_missing

__all__ = ["draw", "draw_missing"]
