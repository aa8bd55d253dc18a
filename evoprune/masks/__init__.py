"""Which weights a mask keeps, which channels tie layers together, which paths are dead."""
