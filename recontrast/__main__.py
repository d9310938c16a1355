"""``python -m recontrast``: the command line."""

from recontrast.app.cli import main

if __name__ == "__main__":
    main()
