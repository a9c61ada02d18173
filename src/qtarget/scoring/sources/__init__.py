"""Who scores rows: this process, Ray, or a server; all behind one protocol."""
