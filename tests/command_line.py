"""Calls of the command line in this process."""

from typer.testing import CliRunner

from recontrast.app.cli import app


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def works(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments, status=2):
    """The one sentence on stderr of a command that must fail."""
    result = call(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("recontrast: ")]
    assert result.exit_code == status, result.output
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


# Weights are random throughout: what is tested is what the commands do, not how well.
SMALL = [
    "--backbone",
    "test_resnet",
    "--weights",
    "random",
    "--size",
    "64",
    "--batch",
    "2",
    "--steps",
    "2",
    "--device",
    "cpu",
]
