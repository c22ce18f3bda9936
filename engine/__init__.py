"""Layouts, prompts, the unified transformer, and inference with it."""
