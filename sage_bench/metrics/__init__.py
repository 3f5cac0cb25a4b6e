"""What a run's rows mean: definitions, measures, and the statistics of comparing runs."""
