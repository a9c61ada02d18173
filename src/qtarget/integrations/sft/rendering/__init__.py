"""What a row becomes: its shape, its text and tokens as TRL makes them, and whether all of it arrived."""
