"""Other implementations that this project is measured against."""
