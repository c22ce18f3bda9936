"""Other implementations that this one is measured against."""
