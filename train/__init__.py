"""The data, the training stages, the step loop they share, and the evaluation."""
