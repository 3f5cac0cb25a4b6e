"""Findings of studies as pages, tables and figures that can be printed."""
