"""`python -m dsv4.cli`."""

from dsv4.cli import main

main()
