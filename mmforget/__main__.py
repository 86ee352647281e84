"""`python -m mmforget` is the `mmforget` command."""

from mmforget.cli import main

main()
