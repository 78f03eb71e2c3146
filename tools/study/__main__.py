"""See `study`, which is a module of its own so that processes can be started from it."""

from tools.study.study import main

main()
