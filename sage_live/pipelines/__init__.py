"""Declared pipelines on real engines: the payload side of what the plane sees as stages and sizes."""
