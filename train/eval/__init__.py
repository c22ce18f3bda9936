"""The judge and every metric; training evaluates with them too."""
