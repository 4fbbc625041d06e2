"""Whether one checkpoint is worse than another: paired statistics on what `evaluate` wrote of both."""
