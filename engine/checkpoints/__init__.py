"""Reads and writes Janus checkpoints in either format, and adds the tokens of boxes to them."""
