"""Rules by host library. A module here imports its library and is imported only once the library
is."""
