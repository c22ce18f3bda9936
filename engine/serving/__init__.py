"""What continuous batching is made of; see `echogen.engine.serving.scheduler`."""
