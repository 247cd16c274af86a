"""Equipment of tests: what stands in for hardware that is not there."""
