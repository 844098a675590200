"""One file per host library. Importing one imports that library."""
