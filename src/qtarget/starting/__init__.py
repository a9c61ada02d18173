"""From a file of rows and a model to a config that trains: what is there, what follows from it, and the files."""
