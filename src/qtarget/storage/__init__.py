"""Files as this project writes them: whole or absent."""
