"""How a command says that it cannot do what it was asked for."""


class WrongUsage(Exception):
    """Its text says what is wrong and what to do. Ends the command with exit status 2."""
