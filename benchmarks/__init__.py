"""Speed and memory against the tools one would use instead."""
