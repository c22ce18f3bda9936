"""Janus checkpoints, in either format: read, written, given the tokens of boxes."""
