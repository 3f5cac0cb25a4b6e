"""Declared pipelines: files, what a simulation draws of them, and how they are shown."""
