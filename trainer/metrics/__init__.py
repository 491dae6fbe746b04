"""What a run says about itself: console, files, TensorBoard, spans."""
