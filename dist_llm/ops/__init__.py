"""Operations on plain tensors, one a file."""
