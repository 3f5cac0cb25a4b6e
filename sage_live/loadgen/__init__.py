"""Open-loop load against an OpenAI-compatible server, measured from the instants at which it was scheduled."""
