"""``recontrast doctor``: checks of the installation."""

import typer

from recontrast.app.console import print_line


def doctor() -> None:
    """Check the installation: what works, what is missing for which command, and how fast the kernels are.

    The exit status is 1 if something that was promised does not work.
    """
    from recontrast.app.health import check_installation

    has_failed = False
    for check in check_installation():
        has_failed |= check.state == "failed"
        print_line(f"{check.state:<8} {check.name:<16} {check.text}")
    if has_failed:
        raise typer.Exit(1)
