"""User ids for cells: who may hand out which, as root and without."""
