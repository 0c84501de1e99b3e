"""``python -m blastnn``."""

from blastnn.cli import main

if __name__ == "__main__":
    main()
