from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from torch._utils import ExceptionWrapper

from tissuehint.errors import InputError
from tissuehint.failures import describe


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("a.png", "is damaged", "replace it"), "a.png: is damaged; replace it"),
        (OSError(errno.EIO, "Input/output error", "b.png"), "b.png"),
    ],
)
def test_an_error_inside_a_worker_process_is_the_same_line(error, line):
    try:
        raise error
    except (InputError, OSError):
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")  # what a worker sends to its parent
    with pytest.raises(Exception, match=r"[ab]\.png") as caught:
        wrapped.reraise()
    failure = describe(caught.value)
    assert failure is not None
    assert failure.code == 2
    assert line in failure.line
    assert "\n" not in failure.line
    assert "Traceback" not in failure.line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), ["runs/x", "disk is full", "free space"]),
        (PermissionError(errno.EACCES, "Permission denied", "out"), ["out", "permission denied"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "gone.yaml"), ["gone.yaml", "does not exist"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ["GPU", "memory", "batch size"]),
        (MemoryError(), ["computer", "memory"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["computer", "memory"]),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed"), ["disk"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), ["data.workers=0"]),
    ],
)
def test_what_a_user_can_mend_is_a_line_with_code_2(error, words):
    failure = describe(error)
    assert failure is not None
    assert failure.code == 2
    for word in words:
        assert word in failure.line


def test_a_refusal_that_came_as_the_text_of_a_traceback_is_found():
    text = "Caught InputError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n  File x\n"
    failure = describe(RuntimeError(f"{text}tissuehint.errors.InputError: a.png: is damaged; replace it\n"))
    assert failure is not None
    assert failure.line == "a.png: is damaged; replace it"


def test_validation_names_the_key():
    class Sizes(BaseModel):
        side: int

    with pytest.raises(ValueError, match="side") as caught:
        Sizes(side="wide")
    failure = describe(caught.value)
    assert failure is not None
    assert failure.line.startswith("side: ")


def test_an_interrupt_that_a_library_turned_into_an_exit_is_an_interrupt():
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 (as Lightning does)
    except SystemExit as error:
        failure = describe(error)
    assert failure is not None
    assert failure.code == 130


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shape mismatch"), SystemExit(1)])
def test_defects_are_not_hidden(error):
    assert describe(error) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_a_redirected_output_is_one_line():
    words = [sys.executable, "-m", "tissuehint", "data", "list", "glas"]
    handle = os.open("/dev/full", os.O_WRONLY)
    try:
        done = subprocess.run(words, stdout=handle, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(handle)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: the disk is full; free space, or choose another folder, and run the same command again"
    ]
