"""Types of what we use of the `scipy` package, which has none of its own."""
