"""What a user may type: arguments.py says what there is, checks.py what is refused."""
