"""Many runs from one command: which points there are, which are done already, how far it is, what failed."""
