"""Reporting: read a run and render its report and its model card."""
