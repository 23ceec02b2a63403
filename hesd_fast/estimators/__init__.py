"""Single numbers and vectors of a matrix that is only known by its products: eigenpairs, trace, diagonal."""
