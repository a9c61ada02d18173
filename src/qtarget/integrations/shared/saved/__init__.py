"""What a saved model needs to be of use elsewhere: where it stops, a card, and weights without an adapter."""
