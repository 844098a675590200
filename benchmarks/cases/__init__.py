"""One file per op: the shapes worth measuring, named after the model they come from."""
