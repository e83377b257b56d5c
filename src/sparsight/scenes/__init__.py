"""The embedded data: an endless, seeded generator of images with exact truth."""
