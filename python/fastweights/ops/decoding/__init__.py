"""A token through a whole decoder in one op."""
