"""Columns of training rows, in Arrow: ids, weights, cache positions; and the batches made of them."""
