"""A run of several processes, replicated or sharded."""
