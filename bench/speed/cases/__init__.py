"""What is measured of each operator, grouped by where it is used; see `echogen.bench.registry`."""
