"""Speed and quality measurements; nothing imports this package."""
