"""One operation a file: documented function, custom operator, autograd. It knows no kernel."""
