"""What a run is: frozen typed sections, the rules across them, and the table of legal layouts. No torch."""
