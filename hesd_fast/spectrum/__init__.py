"""From a block tridiagonal matrix to a spectral measure, and how sure each number of it is."""
