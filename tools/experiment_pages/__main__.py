"""See `pages`."""

from tools.experiment_pages.pages import main

main()
