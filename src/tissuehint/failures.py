"""What went wrong, in one line: every failure that a user can cause or mend."""

from __future__ import annotations

import errno
import re
import sys
from dataclasses import dataclass
from typing import Any

from tissuehint.errors import InputError

DEBUG_VARIABLE = "TISSUEHINT_DEBUG"
REFUSED, FAILED, INTERRUPTED = 2, 1, 130

# a data-loading process hands over its exception as the text of the traceback
_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")
_INPUT_ERROR = re.compile(r"^(?:tissuehint\.errors\.)?InputError: (.+)$", re.MULTILINE)
_RULES = {
    errno.ENOSPC: ("the disk is full", "free space, or choose another folder, and run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free space, or choose another folder"),
    errno.EACCES: ("permission denied", "change the permissions, or choose another place"),
    errno.EPERM: ("permission denied", "change the permissions, or choose another place"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.ENOENT: ("does not exist", "check the path"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
    errno.EISDIR: ("is a folder, not a file", "check the path"),
    errno.EEXIST: ("is a file, where a folder is needed", "choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "shorten it"),
}
# libraries that write through their own code report a failed write as text
_FULL_DISK = re.compile(r"No space left on device|PytorchStreamWriter failed|unexpected pos \d+ vs", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_LOST_WORKER = re.compile(r"DataLoader worker \(pid[^)]*\) (?:is killed|exited unexpectedly)", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """One line for stderr, and the exit code."""

    line: str
    code: int = REFUSED


class InterruptedRunError(Exception):
    """The user stopped the command; the message says how to go on."""


def describe(error: BaseException) -> Failure | None:
    """The failure as a line; None for what no user caused: a defect, whose traceback is worth seeing.

    Example:
        >>> describe(InputError("recipe x", "is no file", "give a file")).line
        'recipe x: is no file; give a file'
    """
    if isinstance(error, InterruptedRunError):
        return Failure(str(error), INTERRUPTED)
    if was_interrupted(error):
        return Failure("interrupted; files that were written are whole, run the same command again", INTERRUPTED)
    if not isinstance(error, Exception):
        return None
    line = _line(error)
    return None if line is None else Failure(" ".join(line.split()))


def line_about(error: Exception, subject: object) -> str:
    """The failure of one item of a batch in one line that names the item; also for what no user caused.

    Example:
        >>> line_about(ValueError("no such thing"), "a.svs")
        'a.svs: ValueError: no such thing'
    """
    failure = describe(error)
    line = " ".join((f"{type(error).__name__}: {error}" if failure is None else failure.line).split())
    return line if str(subject) in line else f"{subject}: {line}"


def was_interrupted(error: BaseException) -> bool:
    """Ctrl-C, also where a library turned it into an exit (Lightning does, to stop its other processes)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _line(error: Exception) -> str | None:
    if isinstance(error, InputError):
        return str(error)
    if hasattr(error, "format_message"):
        return _usage(error)
    if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):
        return _validation(error)
    text = str(error)
    if _FROM_WORKER.search(text):
        return _from_worker(text)
    if isinstance(error, OSError):
        return _system(error)
    return _resource(error, text)


def _usage(error: Any) -> str:
    """Wrong use of the command line: typer's own message, and where to read more."""
    path = getattr(getattr(error, "ctx", None), "command_path", None) or "tissuehint"
    return f"{error.format_message().rstrip('.')}; see {path} --help"


def _validation(error: Any) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"]) or error.title
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {first['msg']}{more}; correct the value"


def _from_worker(text: str) -> str | None:
    found = _INPUT_ERROR.findall(text)
    if found:
        return str(found[-1])
    last = text.strip().splitlines()[-1]
    kind, _, message = last.partition(": ")
    known = ("OSError", "FileNotFoundError", "PermissionError", "MemoryError")
    return f"{message or kind}; check the file and run the same command again" if kind in known else None


def _system(error: OSError) -> str:
    rule, fix = _RULES.get(error.errno or 0, (error.strerror or str(error) or type(error).__name__, "mend the cause"))
    name = error.filename if error.filename2 is None else error.filename2
    return f"{name}: {rule}; {fix}" if name not in (None, "") and not isinstance(name, int) else f"{rule}; {fix}"


def _resource(error: Exception, text: str) -> str | None:
    torch = sys.modules.get("torch")
    kinds: tuple[type, ...] = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    if isinstance(error, kinds) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)):
        where = "the GPU" if "cuda" in text.lower() or "mps" in text.lower() else "the computer"
        return f"{where} has not enough memory; take a smaller batch size or smaller windows, or free memory"
    if _FULL_DISK.search(text):
        rule, fix = _RULES[errno.ENOSPC]
        return f"{rule}; {fix}"
    if _LOST_WORKER.search(text):
        return "a data-loading process died, for lack of memory as a rule; use -o data.workers=0, or free memory"
    if type(error).__name__ == "DecompressionBombError":
        return f"an image is too large to be opened whole ({text}); cut it into smaller images"
    return None
