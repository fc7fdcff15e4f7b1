"""Arithmetic on a config: parameters, FLOPs, memory and traffic. No torch."""
