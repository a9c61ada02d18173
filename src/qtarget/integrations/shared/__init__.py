"""What every trainer needs: the head, frozen models, one step of the loss, records of the run."""
