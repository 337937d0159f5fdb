"""Small shared pieces: errors of the user's input, atomic JSON files, seconds, and the signal callback."""


class InputError(ValueError):
    """Bad input: the message is one line that names the value and the way out; exit code 2."""
