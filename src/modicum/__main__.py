"""`python -m modicum`, the same as `modicum`."""

from modicum.cli import main

if __name__ == "__main__":
    main()
