"""The `mmforget` command."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typer import Typer


def application() -> "Typer":
    """Return the command with its verbs; each imports what it needs when it is called."""
    import mmforget.cli.check
    import mmforget.cli.inspect
    import mmforget.cli.store
    import mmforget.cli.work  # noqa: F401  (each adds its verbs to the application)
    from mmforget.cli.base import app

    return app


def main() -> None:
    """Run the command line."""
    application()(prog_name="mmforget")
