"""``python -m tissuehint`` is ``tissuehint``."""

import sys

from tissuehint.cli import main

if __name__ == "__main__":
    sys.exit(main())
