"""The step loop, with a run's checkpoints, metrics, progress and faults."""
