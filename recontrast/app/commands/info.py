"""``recontrast info``: versions, devices, and the kernels in use."""

import typer


def info() -> None:
    """Print versions, devices, and which kernels run and why."""
    from recontrast.app.environment import describe_environment

    for name, value in describe_environment().items():
        typer.echo(f"{name:<18} {value}")
