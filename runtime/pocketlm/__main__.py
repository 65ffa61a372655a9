"""`python -m pocketlm`."""

from pocketlm.cli import main

main()
