"""The page of `diffbir web`: pictures in, restored pictures out, in a browser."""
