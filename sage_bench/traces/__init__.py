"""Request traces on disk: one Parquet schema, importers into it, statistics, and generators fitted to it."""
