"""The experiments of a paper: what each runs, and what it says of what was run."""
