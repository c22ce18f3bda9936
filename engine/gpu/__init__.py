"""The steps of drawing on a GPU: the project's operators, recorded and replayed."""
