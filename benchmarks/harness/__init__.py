"""One fair comparison: arms, cells, the search for matched MACs, and what is reported."""
