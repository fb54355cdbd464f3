"""What goes wrong in a way that is the user's to read: one line, exit code 1, no traceback."""


class OperationError(Exception):
    """Root of the errors that the command line shows as their message alone."""
