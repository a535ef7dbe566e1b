"""Object proposals without labels: boxes that probably hold something, from pixels alone."""
