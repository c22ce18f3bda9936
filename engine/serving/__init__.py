"""The parts of continuous batching; see `echogen.engine.serving.scheduler`."""
