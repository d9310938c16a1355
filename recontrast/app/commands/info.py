"""``recontrast info``: versions, devices, and the kernels in use."""

from recontrast.app.console import print_line


def info() -> None:
    """Print versions, devices, and which kernels run and why."""
    from recontrast.app.environment import describe_environment

    for name, value in describe_environment().items():
        print_line(f"{name:<18} {value}")
