"""What is read from disk and written to it, one file per format."""
