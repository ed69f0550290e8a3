"""One package per family of ops."""
