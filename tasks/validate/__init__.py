"""Check a dataset folder as a maintainer would before accepting a pull request, without a GPU."""
