"""What lies on disk while work goes on: files written whole or not at all, mapped weights, journals, caches."""
