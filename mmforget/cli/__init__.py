"""The `mmforget` command."""


def main() -> None:
    """Run the command line; every verb imports what it needs when it is called."""
    from mmforget.cli import check, inspect, store, work  # noqa: F401  (they add their verbs)
    from mmforget.cli.base import app

    app(prog_name="mmforget")
