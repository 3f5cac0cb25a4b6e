"""Figures for print, drawn from a run's Parquet rows only."""
