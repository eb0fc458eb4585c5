"""The one exception that means "the user can fix this": a message of one line, exit status 2."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake of the user's: the message states the rule, the value given and the choices, on one line."""
