"""Data: sources, pictures, chat, batches, and the embedded scenes."""
