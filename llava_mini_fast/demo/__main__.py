"""`python -m llava_mini_fast.demo`, which is what `make run` runs."""

import sys

from llava_mini_fast.demo.program import main

if __name__ == "__main__":
    sys.exit(main())
