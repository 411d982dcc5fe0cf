"""How a command says that it cannot do what it was asked for."""


class WrongUsage(Exception):
    """Wrong usage of a command: the text says what is wrong and what to do. Ends the command with exit status 2."""
