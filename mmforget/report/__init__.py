"""The report: one page that shows forgetting, utility, privacy and cost side by side."""

from mmforget.report.exports import headline_rows, text_table
from mmforget.report.page import write_report
from mmforget.report.section import Section

__all__ = ["Section", "headline_rows", "text_table", "write_report"]
