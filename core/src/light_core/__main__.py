"""`python -m light_core` is the `light` command."""

from light_core.cli import main

if __name__ == "__main__":
    main()
