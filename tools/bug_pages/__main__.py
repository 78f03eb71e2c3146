"""See `pages`, which is a module of its own so that processes can be started from it."""

from tools.bug_pages.pages import main

main()
