"""The report: runs put together on one HTML page that needs nothing else."""

from bozzetto.evaluate.report.page import build_report

__all__ = ["build_report"]
