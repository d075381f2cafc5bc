"""What a server and its clients do and know: the leak, who made it, and what each attack may use of it."""
