"""See `exhaustive`, which is a module of its own so that processes can be started from it."""

from tools.exhaustive.exhaustive import main

main()
