"""Image store: names of images, their metadata, the store itself, and what puts images into it."""
