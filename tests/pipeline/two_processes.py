"""Not a test: a script that runs recipes as the command line would, for Lightning to start again in each process.

    python two_processes.py NOTES RECIPE.yaml...

Each process leaves in NOTES what it wrote (one line a pseudo mask) and the state of stage 1 behind its training.
"""

import hashlib
import os
import sys
from pathlib import Path

import tissuehint
from tissuehint.pipeline import stages


def main(notes, recipes):
    rank = os.environ.get("LOCAL_RANK", "0")
    write, finish = stages.write_palette_png, stages.Experiment._finish

    def noted_write(target, mask, palette):
        with (notes / f"written_{rank}.txt").open("a") as file:
            file.write(f"{target.parents[1].name}/{target.name}\n")
        write(target, mask, palette)

    def noted_state(experiment, method, *networks):
        state = b"".join(value.numpy().tobytes() for value in method.state_dict().values())
        (notes / f"state_{experiment.recipe.name}_{rank}.txt").write_text(hashlib.sha256(state).hexdigest())
        return finish(experiment, method, *networks)

    stages.write_palette_png, stages.Experiment._finish = noted_write, noted_state
    for recipe in recipes:
        tissuehint.run(recipe)
    (notes / f"ended_{rank}.txt").write_text(str(os.getpid()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
