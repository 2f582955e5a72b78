"""The one error a user can cause: what is wrong, which rule it breaks, how to mend it."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, said in one line.

    The command line prints ``str(error)`` on stderr without a traceback and exits with code 2.

    Args:
        subject: what is wrong, by name: a file (with line), a recipe key, an option and its value.
        rule: the rule that it breaks.
        fix: what the user should do.

    Example:
        >>> print(InputError("labels.csv:3", "tag 'gland' is '2', tags are 0 or 1", "write 0 or 1"))
        labels.csv:3: tag 'gland' is '2', tags are 0 or 1; write 0 or 1
    """

    def __init__(self, subject: object, rule: str = "", fix: str = "") -> None:
        self.subject = str(subject)
        self.rule = rule
        self.fix = fix
        text = f"{self.subject}: {rule}; {fix}" if rule else _last_message(self.subject)
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        """Survive the trip to another process."""
        return type(self), (self.subject, self.rule, self.fix)


def _last_message(text: str) -> str:
    """The message in the printed traceback, all that torch keeps of an error in a data-loading worker."""
    return text.rpartition(f"{InputError.__name__}: ")[2]
