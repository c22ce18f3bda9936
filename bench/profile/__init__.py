"""Where the time of a piece of work goes: by range, by kernel, and as a trace to look at."""
