"""What a run says of itself: its files, the line on the terminal, TensorBoard, the loss picture and the report."""
