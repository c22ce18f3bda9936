"""What is learnt in each stage, and what stages share."""
