"""A standing fuzz: random calls of the whole package against the reference in fp64; `make fuzz`."""
