"""Data: sources, images, chat, batches, and the embedded scenes."""
