"""The error that a person can mend; every package of ours raises it or a class of it."""

from devices.common.errors import UserError, first_line

__all__ = ["UserError", "first_line"]
