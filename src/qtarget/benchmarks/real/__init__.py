"""A real instruct model, from a package: what the claims are worth outside of models that were trained here."""
