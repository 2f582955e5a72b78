"""Not a test: a process of its own that is killed (SIGKILL) at stated moments, each time in a fork, and run again.

    python killed_runs.py RECIPE.yaml FOLDER MOMENT...

Leaves FOLDER/MOMENT/NAME, the directory of a run that was killed at MOMENT and then run to its end.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import tissuehint
from tissuehint.pipeline import stages, training

# a run imports these late; here once, for all forks
for module in ("segmentation_models_pytorch", "timm", "torchvision.transforms.v2"):
    importlib.import_module(module)

die = signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM


def kill_at_call(owner, name, number, *, before=True, only=lambda *words: True):
    """Kill this process at call ``number`` of ``owner.name``."""
    original, calls = getattr(owner, name), 0

    def wrapped(*words, **names):
        nonlocal calls
        calls += only(*words)
        hit = only(*words) and calls == number
        if hit and before:
            os.kill(os.getpid(), die)
        result = original(*words, **names)
        if hit:
            os.kill(os.getpid(), die)
        return result

    setattr(owner, name, wrapped)


def renamed_to(part):
    return lambda path, target: part in str(target)


MOMENTS = {
    # step 4 of stage 1: in the middle of the second round
    "stage1_step": lambda: kill_at_call(training.SeedEachStep, "on_train_batch_start", 4),
    # all steps of stage 1 done and saved, the mark not yet set
    "stage1_unmarked": lambda: kill_at_call(stages.RunDirectory, "mark_done", 1),
    # the third pseudo mask is written under its temporary name
    "pseudo_mask": lambda: kill_at_call(Path, "replace", 3, only=renamed_to("phantom_train")),
    # the best weights of round 2 of stage 2 are written, its checkpoint is not
    "stage2_best": lambda: kill_at_call(training.RoundValidation, "on_train_epoch_end", 2, before=False),
}


def in_fork(work):
    """Exit status of ``work`` in a fork."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(recipe, folder, moments):
    for moment in moments:
        output = str(Path(folder) / moment)

        def killed(moment=moment, output=output):
            MOMENTS[moment]()
            tissuehint.run(recipe, output=output)

        status = in_fork(killed)
        assert status == -die, f"{moment}: ended with {status}, not by the kill"
        status = in_fork(lambda output=output: tissuehint.run(recipe, output=output))
        assert status == 0, f"{moment}: running again ended with {status}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
