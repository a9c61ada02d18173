"""What every target and every loss is made of: tensors in, tensors out; torch and nothing else."""
