"""What people look at: numbers as JSON first, and one self-contained HTML page rendered from them."""
