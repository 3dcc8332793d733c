"""A warning for what may still change."""


class ExperimentalWarning(FutureWarning):
    """The call may change or go in any release."""
