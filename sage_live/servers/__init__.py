"""Engines as HTTP servers of our own: emulated ones, and one for embedding models. Both speak OpenAI's API."""
