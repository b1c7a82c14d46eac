"""`python -m qkernels`: the same commands as the `qkernels` script."""

from .commands import main

if __name__ == "__main__":
    raise SystemExit(main())
