"""Rules for samples of one's own, one a file: a signed label weight ``a = w r A``; the file's name is the rule's name."""
