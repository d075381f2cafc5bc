"""Papers as settings of gradient matching, and attacks that wrap it."""
