"""A run on disk: Parquet tables, the log and the manifest."""
