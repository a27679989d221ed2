"""The error that a person can mend; every package of ours raises it or a class of it."""

from devices.common.errors import UserError

__all__ = ["UserError"]
