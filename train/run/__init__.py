"""The step loop, and what a run keeps, shows and survives."""
