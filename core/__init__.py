"""What all three tasks share: options, processes, runs and their files."""
