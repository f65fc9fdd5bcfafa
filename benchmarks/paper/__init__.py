"""The analyses of the IPPRO paper (arXiv 2507.14171), one command each: rows, a table, a figure."""
