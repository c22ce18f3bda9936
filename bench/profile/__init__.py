"""Where the time of one piece of work goes: by range, by kernel, and as a trace to look at."""
