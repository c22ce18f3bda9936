"""The scheduler over HTTP."""
