"""`python -m smartmops`, where no script of that name is on the path."""

from smartmops.cli import main

main()
