"""The training stages, and what they share."""
