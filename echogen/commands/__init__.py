"""The commands of the command line, one dataclass each; heavy imports wait until one runs."""
