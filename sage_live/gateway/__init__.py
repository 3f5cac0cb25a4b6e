"""The gateway: an OpenAI-compatible front of a control plane; this package's parts stand beside the data path."""
