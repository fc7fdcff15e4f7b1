"""How a single-device model is split over ranks, one axis a file; `apply.py` has the order."""
