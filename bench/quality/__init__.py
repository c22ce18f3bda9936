"""The quality experiments: does each stage help? Cells of training, and the tables made of them."""
