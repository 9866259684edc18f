"""Parameters, the pipeline of notebooks, `make study` and the book."""
