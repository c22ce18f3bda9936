"""Pixels to codes and back, and pictures for people."""
