"""The parts of bench/README.md's results: questions, and what the recorded runs answer."""
